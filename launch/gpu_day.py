"""The first minutes on a GPU: what there is to know about it, in one folder, in under nine minutes.

    python launch/gpu_day.py                            # all parts, into runs/gpu_day
    python launch/gpu_day.py --parts times tuning --seconds 300
    python launch/gpu_day.py --pretend 90 --brief       # without a GPU: each part up to its launches, no numbers

Each part of `gpu_parts.py` runs in processes of its own, within its part of the seconds that are left, the most
important first: one that fails or hangs costs its own time and no other's. A part writes what it finds as it finds it,
a JSON line each, to ``PART.jsonl``, and what it says to ``PART.log``; ``summary.txt`` is written anew after each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_parts import PARTS, ROOT, Day

SECONDS = 500.0
GRACE = 10.0
"""Seconds between the time at which a part should stop by itself and that at which it is stopped."""
LEAST = 20.0
"""Seconds of a part, as long as there are any."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("*.jsonl"), *folder.glob("*.log")]:
        old.unlink()
    sys.path[:0] = [str(ROOT)]  # where nothing is installed
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "launch"), os.environ.get("PYTHONPATH", "")])
    context = multiprocessing.get_context("forkserver")  # imports once, before anybody has touched the GPU
    context.set_forkserver_preload(["torch", "triton", "cpflex.kernels.backward", "gpu_parts"])
    begin = time.time()
    first = context.Process(target=time.time)  # what is imported once is on no part's account
    first.start()
    first.join()
    for index, name in enumerate(options.parts):
        left = begin + options.seconds - time.time() - GRACE
        share = PARTS[name].share / sum(PARTS[later].share for later in options.parts[index:])
        seconds = min(left, max(LEAST, share * left))
        ran = run_part(context, Day(folder, name, time.time() + seconds, options.brief, options.pretend))
        with (folder / "parts.jsonl").open("a") as file:
            file.write(json.dumps(ran) + "\n")
        text = summary(folder, options.pretend)
        (folder / "summary.txt").write_text(text)
        print(text.split("\n\n")[-1] if index else text, flush=True)
    print(f"{time.time() - begin:.0f} s; all of it is in {folder}")
    return 0 if all(ran["outcome"] == "done" for ran in records(folder / "parts.jsonl")) else 1


def run_part(context: Any, day: Day) -> dict[str, Any]:
    """How a part ended."""
    begin = time.time()
    workers = 1 if day.brief else PARTS[day.part].workers
    processes = [context.Process(target=work, args=(day.of(worker, workers),)) for worker in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(0.0, day.deadline + GRACE - time.time()))
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
        process.join()
    failed = [process.exitcode for process in processes if process.exitcode and process not in hanging]
    outcome = "stopped: out of time" if hanging else f"failed: exit codes {failed}" if failed else "done"
    return {"part": day.part, "outcome": outcome, "seconds": round(time.time() - begin, 1)}


def work(day: Day) -> None:
    """In the part's process."""
    log = os.open(day.folder / f"{day.part}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.chdir(ROOT)
    try:
        with contextlib.nullcontext() if PARTS[day.part].pretends_itself else day.device():
            PARTS[day.part].run(day)
    except Exception:  # told in the summary, whatever it is
        day.record(error=traceback.format_exc()[-2000:])
        raise


# -- what was found, in words


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def summary(folder: Path, pretended: int) -> str:
    """A paragraph a part."""
    title = f"on a pretended sm_{pretended}: no numbers" if pretended else "on the GPU at hand"
    paragraphs = [f"cpflex, {title}"]
    for ran in records(folder / "parts.jsonl"):
        found = records(folder / f"{ran['part']}.jsonl")
        lines = [f"{ran['part']}: {ran['outcome']}, {ran['seconds']} s, {len(found)} records"]
        lines += [f"  {line}" for line in PARTS[ran["part"]].digest([x for x in found if "error" not in x])]
        lines += [f"  ERROR {x['error'].strip().splitlines()[-1]}" for x in found if "error" in x]
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "gpu_day", help="what an earlier run left goes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="in this order")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all parts (default: %(default)s)")
    parser.add_argument("--brief", action="store_true", help="only the first of everything")
    parser.add_argument("--pretend", type=int, default=0, metavar="CAPABILITY", help="no GPU, but tests/pretend: 90")
    options = parser.parse_args(arguments)
    options.folder = options.folder.resolve()
    return options


if __name__ == "__main__":
    sys.exit(main())
