"""The parts of `gpu_day.py`: each is a function of the day, and writes what it finds with `Day.record`."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Day:
    """What a part is given."""

    folder: Path
    part: str
    deadline: float
    """Seconds since the epoch; a part begins nothing after it."""
    brief: bool
    pretend: int
    """The capability of the GPU that is pretended; 0: a real one."""
    worker: int = 0
    workers: int = 1

    def of(self, worker: int, workers: int) -> Day:
        return replace(self, worker=worker, workers=workers)

    def record(self, **facts: Any) -> None:
        with (self.folder / f"{self.part}.jsonl").open("a") as file:
            file.write(json.dumps(_plain(facts, bool(self.pretend))) + "\n")

    def each(self, items: Sequence[Any]) -> Iterator[Any]:
        """Of the items, as many as there is time for; the others are recorded as left out."""
        items = items[:1] if self.brief else items
        for i, item in enumerate(items):
            if time.time() > self.deadline:
                self.record(left_out=[str(x) for x in items[i:]])
                return
            yield item

    @contextlib.contextmanager
    def surviving(self, what: object) -> Iterator[None]:
        """What fails inside is recorded, and the part goes on with the next."""
        try:
            yield
        except Exception:  # noqa: BLE001 - a kernel, a peer, a compiler: anything may fail on a GPU that was never seen
            self.record(error=f"{what}: {traceback.format_exc()[-2000:]}")

    def device(self) -> contextlib.AbstractContextManager:
        """The GPU, or what stands for it."""
        if not self.pretend:
            return contextlib.nullcontext()
        pretending = module("pretended", "tests/pretend").pretending
        return pretending(self.pretend, compiles=not self.brief, computes_up_to=1 << 17)


def module(name: str, folder: str) -> Any:
    """A module of another folder of the repository."""
    if str(ROOT / folder) not in sys.path:
        sys.path.insert(0, str(ROOT / folder))
    return importlib.import_module(name)


def _plain(x: Any, is_pretended: bool) -> Any:
    """What JSON has; on a pretended GPU nothing was measured, and no number is written that looks so."""
    if isinstance(x, dict):
        return {str(key): _plain(value, is_pretended) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(value, is_pretended) for value in x]
    if isinstance(x, float):
        return x if math.isfinite(x) and not is_pretended else None
    return x if isinstance(x, (int, str, bool, type(None))) else str(x)


# -- what is here


def environment(day: Day) -> None:
    import torch
    import triton

    gpu = torch.cuda.get_device_properties(0)
    day.record(
        gpu=gpu.name, capability=torch.cuda.get_device_capability(0), gib=gpu.total_memory >> 30,
        multiprocessors=gpu.multi_processor_count, l2_mib=gpu.L2_cache_size >> 20, torch=torch.__version__,
        triton=triton.__version__, cuda=torch.version.cuda, python=platform.python_version(), cpus=os.cpu_count(),
        devices=torch.cuda.device_count(),
    )  # fmt: skip
    for tool in ("nvidia-smi", "compute-sanitizer", "gcc"):
        day.record(tool=tool, path=shutil.which(tool))
    if shutil.which("nvidia-smi") and not day.pretend:
        said = subprocess.run(["nvidia-smi", "-q", "-d", "CLOCK,POWER"], capture_output=True, text=True, timeout=30)
        day.record(nvidia_smi=said.stdout[-6000:])


def of_environment(found: Records) -> list[str]:
    return [f"{x['gpu']}, {x['gib']} GiB, torch {x['torch']}, triton {x['triton']}" for x in found if "gpu" in x]


# -- does it run, and is it right?


def smoke(day: Day) -> None:
    """One training step of each dtype, and how far it is from the plain backend's."""
    import torch

    for dtype in day.each([torch.bfloat16, torch.float16, torch.float32]):
        with day.surviving(dtype):
            day.record(dtype=dtype, **_difference_of_backends(dtype))


def _difference_of_backends(dtype: Any) -> dict[str, dict[str, float]]:
    import torch

    import cpflex

    plan = cpflex.make_plan(cpflex.causal() & cpflex.document(cu_seqlens=[0, 300, 1000]), 1000)
    drawn = [torch.randn(1, h, plan.local_len, 64, device="cuda").to(dtype) for h in (4, 2, 2, 4)]
    results, seconds = {}, {}
    for backend in ("triton", "reference"):
        q, k, v = (x.detach().requires_grad_() for x in drawn[:3])
        begin = time.perf_counter()
        out = cpflex.flex_attention(q, k, v, None, plan, enable_gqa=True, kernel_options={"backend": backend})
        results[backend] = [out, *torch.autograd.grad(out, (q, k, v), drawn[3])]  # type: ignore[arg-type]
        torch.cuda.synchronize()
        seconds[backend] = time.perf_counter() - begin
    pairs = zip(("out", "dq", "dk", "dv"), *results.values(), strict=True)
    return {"differences": {n: (x.float() - y.float()).abs().max().item() for n, x, y in pairs}, "seconds": seconds}


def of_smoke(found: Records) -> list[str]:
    return [f"{x['dtype']}: differs from the plain backend by {x['differences']}" for x in found if "differences" in x]


def correctness(day: Day) -> None:
    """The tests of a GPU: errors against float64, carried state, masked rows, poison, bits."""
    import pytest

    class Report:
        def pytest_collection_modifyitems(self, items: list[Any]) -> None:
            kept = [item for item in items if "memcheck" not in item.name][day.worker :: day.workers]
            items[:] = kept[:1] if day.brief else kept

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                said = report.longreprtext[-1500:] if report.failed else ""
                day.record(test=report.nodeid, outcome=report.outcome, seconds=report.duration, said=said)

        def pytest_runtest_logfinish(self, nodeid: str) -> None:
            if time.time() > day.deadline:
                pytest.exit("no time is left for the other tests", returncode=0)

    arguments = ["-m", "gpu", "-p", "no:cacheprovider", "--tb=short", "tests/gpu"]
    if day.pretend:
        sys.path.insert(0, str(ROOT / "tests" / "pretend"))
        arguments += ["-p", "pretended_gpu", "--pretend-capability", str(day.pretend)]
        arguments += [] if day.brief else ["--pretend-compiles"]
    sys.exit(int(pytest.main(arguments, plugins=[Report()])))


def of_correctness(found: Records) -> list[str]:
    outcomes = [x["outcome"] for x in found if "outcome" in x]
    lines = [f"{outcomes.count(outcome)} {outcome}" for outcome in dict.fromkeys(outcomes)]
    return lines + [f"FAILED {x['test']}: {x['said'].splitlines()[-1:]}" for x in found if x.get("outcome") == "failed"]


def sanitizer(day: Day) -> None:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists() or day.pretend:
        day.record(left_out=f"no {tool}" if not day.pretend else "it watches a real GPU")
        return
    for check in day.each(["memcheck", "racecheck", "synccheck"]):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "tests/gpu/small_run.py"]
        # an allocation for each tensor, so that memory beside it is nobody's
        alone = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        with day.surviving(check):
            left = max(1.0, day.deadline - time.time())
            done = subprocess.run(command, capture_output=True, text=True, env=alone, timeout=left)
            day.record(check=check, code=done.returncode, said=(done.stdout + done.stderr)[-2000:])


def of_sanitizer(found: Records) -> list[str]:
    return [
        f"{x['check']}: {'nothing found' if x['code'] == 0 else 'see sanitizer.jsonl'}" for x in found if "check" in x
    ]


# -- the Gluon kernels of sm_90: are they right, and faster?


def hopper(day: Day) -> None:
    module("gpu_hopper", "launch").proof(day)


def of_hopper(found: Records) -> list[str]:
    return module("gpu_hopper", "launch").of_proof(found)


def hopper_times(day: Day) -> None:
    module("gpu_hopper", "launch").times(day)


def of_hopper_times(found: Records) -> list[str]:
    return module("gpu_hopper", "launch").of_times(found)


# -- how fast is it?

ROWS = [
    *[("causal", "none", 128, 16384), ("full", "none", 128, 16384), ("doc_causal", "none", 128, 16384)],
    *[("causal", "none", 64, 16384), ("causal", "none", 256, 16384), ("causal", "none", 128, 16384, 4)],
    *[("window", "none", 128, 16384), ("causal", "softcap", 128, 16384), ("causal", "alibi", 128, 16384)],
    *[("causal", "none", 128, 4096), ("causal", "none", 128, 65536), ("full", "none", 64, 16384)],
    *[("doc_window", "none", 128, 16384), ("doc_causal", "none", 64, 16384), ("full", "none", 256, 16384)],
    *[("window", "none", 64, 16384), ("causal", "softcap", 64, 16384), ("causal", "alibi", 64, 16384)],
    *[("causal", "none", 128, 32768), ("causal", "none", 128, 8192), ("causal", "none", 64, 16384, 8)],
    *[("doc_causal", "none", 256, 16384), ("causal", "softcap", 256, 16384), ("full", "none", 128, 65536)],
]
"""Mask, score, head dim, tokens, and query heads a key head; the most telling first."""


def times(day: Day) -> None:
    """Beside cuDNN, compiled FlexAttention and FlashAttention-2, by `benchmarks/kernels.py`."""
    import torch

    bench = module("kernels", "benchmarks")
    if day.pretend:
        bench.PEERS = {name: bench.PEERS[name] for name in ("kernel", "call")}
    day.record(setting=bench.setting(), gemm_tflops=bench.gemm_tflops())
    compilations = bench.Compilations()
    for row in day.each([bench.Row(*row) for row in ROWS]):
        with day.surviving(row.name):
            day.record(**bench.measure(row, compilations))
        torch.cuda.empty_cache()


def of_times(found: Records) -> list[str]:
    def cells(x: dict[str, Any], stage: str) -> str:
        return "  ".join(f"{name} {_number(value)}" for name, value in x[f"{stage}_tflops"].items())

    rows = [x for x in found if "row" in x]
    lines = [f"{x['row']:20} {stage:9} TFLOP/s: {cells(x, stage)}" for x in rows for stage in ("forward", "backward")]
    return lines + [f"{x['row']}: {name} failed: {why}" for x in rows for name, why in x["failed"].items()]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


DECODE_ROWS = [
    *[("causal", 64, 16), ("causal", 64, 64), ("causal", 64, 1), ("window", 64, 16), ("alibi", 64, 16)],
    *[("causal", 16, 16), ("causal", 128, 16), ("sinks", 64, 64), ("softcap", 64, 16), ("causal", 64, 4)],
]
"""Mask or score, page size and sequences; the most telling first. The tests of `correctness` prove these kernels."""


def decode(day: Day) -> None:
    """New tokens and keys in pages, beside PagedAttention and FlashInfer, by `benchmarks/decode_kernel.py`."""
    import torch

    bench, timed = module("decode_kernel", "benchmarks"), module("kernels", "benchmarks").interleaved
    if day.pretend:
        bench.PEERS = {name: bench.PEERS[name] for name in ("kernel", "call")}
        bench.TOKENS = 1 << 12
    speed = bench.copy_gb_per_s(timed, 1 << 20 if day.pretend else 1 << 30)
    day.record(copy_gb_per_s=speed)
    for row in day.each([bench.Row(*row) for row in DECODE_ROWS]):
        with day.surviving(row.name):
            day.record(**bench.measure(row, timed, speed or math.nan))  # none of a pretended GPU
        torch.cuda.empty_cache()


def of_decode(found: Records) -> list[str]:
    rows = [x for x in found if "row" in x]
    lines = [f"copy: {_number(x['copy_gb_per_s'])} GB/s" for x in found if "copy_gb_per_s" in x]
    for x in rows:
        cells = "  ".join(f"{name} {_number(value)}" for name, value in x["gb_per_s"].items())
        part = x["of_a_copy"].get("kernel")
        lines.append(f"{x['row']:26} GB/s: {cells}" + ("" if part is None else f"; {part:.0%} of a copy"))
    return lines + [f"{x['row']}: {name} failed: {why}" for x in rows for name, why in x["failed"].items()]


def host(day: Day) -> None:
    """Microseconds of the host per call, which it need not wait for, at a size that costs the GPU nothing."""
    import torch

    import cpflex

    slopes = torch.rand(4, device="cuda")
    mods = {"none": None, "alibi": cpflex.score_mod(lambda s, b, h, q, k: s - slopes[h] * (q - k).abs())}
    for name, mod in day.each(list(mods.items())):
        plan = cpflex.make_plan(cpflex.causal(), 256)
        q, k, v = (torch.zeros(1, 4, 256, 64, dtype=torch.bfloat16, device="cuda").requires_grad_() for _ in "qkv")
        grad_out, seconds = torch.zeros_like(q), {"forward": [], "backward": []}
        for _ in range(5 if day.brief else 200):
            begin = time.perf_counter()
            out = cpflex.flex_attention(q, k, v, mod, plan)
            middle = time.perf_counter()
            torch.autograd.grad(out, (q, k, v), grad_out)  # type: ignore[arg-type]
            seconds["forward"].append(middle - begin)
            seconds["backward"].append(time.perf_counter() - middle)
        torch.cuda.synchronize()
        first = {f"first_{stage}_us": 1e6 * found[0] for stage, found in seconds.items()}
        day.record(score=name, **{f"{stage}_us": 1e6 * sorted(x)[len(x) // 4] for stage, x in seconds.items()}, **first)


def of_host(found: Records) -> list[str]:
    rows = [x for x in found if "score" in x]
    return [
        f"{x['score']}: forward {_number(x['forward_us'])} us, backward {_number(x['backward_us'])} us" for x in rows
    ]


def bandwidth(day: Day) -> None:
    """GB/s of copies: within the device, to it and from it."""
    import torch

    elements = 1 << 20 if day.brief else 1 << 28
    here, there = (torch.empty(elements, dtype=torch.uint8, device="cuda") for _ in range(2))
    host_memory = torch.empty(elements, dtype=torch.uint8, pin_memory=True)
    for name, (target, source) in {
        "within": (there, here),
        "to": (here, host_memory),
        "from": (host_memory, here),
    }.items():
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        target.copy_(source, non_blocking=True)
        begin.record()
        for _ in range(10):
            target.copy_(source, non_blocking=True)
        end.record()
        end.synchronize()
        day.record(copy=name, gb_per_s=10 * elements / begin.elapsed_time(end) / 1e6)


def of_bandwidth(found: Records) -> list[str]:
    return [f"{x['copy']} the device: {_number(x['gb_per_s'])} GB/s" for x in found if "copy" in x]


# -- would another row be faster?


def tuning(day: Day) -> None:
    """Each row that matters against those that differ from it in one number, by `launch/tune.py`."""
    import torch

    from cpflex.kernels import tuning as table

    tune = module("tune", "launch")
    major, minor = torch.cuda.get_device_capability(0)
    rows = table.rows_for(10 * major + minor, torch.bfloat16)
    of_pages = [("decode", 128), ("decode", 64)]
    passes = [(which, dim) for dim in (128, 64, 256) for which in ("forward", "dkdv", "dq")]
    for which, dim in day.each([*passes[:3], *of_pages, *passes[3:]]):
        with day.surviving((which, dim)):
            made = (tune.page_problems if which == "decode" else tune.problems)(dim, torch.bfloat16)
            for config in day.each([rows[which, dim], *neighbours(rows[which, dim])]):
                day.record(which=which, head_dim=dim, config=str(config), ms=tune.tried(which, config, made))
        torch.cuda.empty_cache()


def neighbours(row: Any) -> list[Any]:
    """Rows that differ in one number."""
    choices = {"block_q": (32, 64, 128), "block_kv": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)}
    return [replace(row, **{name: n}) for name, values in choices.items() for n in values if n != getattr(row, name)]


def of_tuning(found: Records) -> list[str]:
    lines = []
    for key in dict.fromkeys((x["which"], x["head_dim"]) for x in found if "which" in x):
        timed = [x for x in found if (x.get("which"), x.get("head_dim")) == key and x["ms"] and None not in x["ms"]]
        if timed:
            best = min(timed, key=lambda x: math.prod(x["ms"]))
            lines.append(f"{key}: {timed[0]['ms']} ms now; best {best['ms']} ms by {best['config']}")
    return lines


# -- several ranks on one GPU


def ranks(day: Day) -> None:
    """Two processes read each other's memory, as ranks of a node would over NVLink."""
    if day.pretend:
        day.record(left_out="symmetric memory needs a real GPU")
        return
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    store = str(day.folder / f"store-{os.getpid()}")
    peers = [context.Process(target=peer, args=(day, rank, store)) for rank in range(2)]
    for process in peers:
        process.start()
    for process in peers:
        process.join(max(0.0, day.deadline - time.time()))
    for process in peers:
        if process.is_alive():
            process.kill()
            raise TimeoutError("the other rank's memory did not come in time")
        assert process.exitcode == 0, "see ranks.log"


def peer(day: Day, rank: int, store: str) -> None:
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"  # two ranks on one GPU
    import torch
    import torch.distributed as dist
    import torch.distributed._symmetric_memory as symmetric

    torch.cuda.set_device(0)
    dist.init_process_group("cpu:gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    group = dist.group.WORLD
    assert group is not None, "the group was just made"
    elements = 1 << 26
    mine = symmetric.empty(elements, dtype=torch.bfloat16, device=torch.device("cuda", 0)).fill_(rank + 1)
    theirs = symmetric.rendezvous(mine, group.group_name).get_buffer(1 - rank, (elements,), torch.bfloat16)
    torch.cuda.synchronize()
    dist.barrier()
    copied = torch.empty_like(mine)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(10):
        copied.copy_(theirs)
    end.record()
    end.synchronize()
    is_right = bool((copied == 2 - rank).all())
    day.record(rank=rank, is_right=is_right, gb_per_s=20 * elements / begin.elapsed_time(end) / 1e6)
    dist.barrier()
    dist.destroy_process_group()
    assert is_right, "a peer's memory was read wrongly"


def of_ranks(found: Records) -> list[str]:
    rows = [x for x in found if "rank" in x]
    return [f"rank {x['rank']} read its peer at {_number(x['gb_per_s'])} GB/s, rightly: {x['is_right']}" for x in rows]


def links(day: Day) -> None:
    """What messages between the GPUs of this node achieve, by `benchmarks/links.py`."""
    import torch

    if day.pretend or torch.cuda.device_count() < 2:
        day.record(left_out="links need two GPUs or more")
        return
    out = day.folder / "topology.json"
    command = [sys.executable, str(ROOT / "launch" / "bench.py"), "links", "--out", str(out)]
    left = max(1.0, day.deadline - time.time())
    done = subprocess.run(command, capture_output=True, text=True, timeout=left, check=False)
    day.record(code=done.returncode, said=(done.stdout + done.stderr)[-2000:])


def of_links(found: Records) -> list[str]:
    return [f"{'see topology.json' if x['code'] == 0 else x['said'].splitlines()[-1:]}" for x in found if "code" in x]


class Part(NamedTuple):
    run: Callable[[Day], None]
    digest: Callable[[Records], list[str]]
    """What it found, in lines."""
    share: float
    """Of the seconds."""
    workers: int = 1
    pretends_itself: bool = False


PARTS = {
    "environment": Part(environment, of_environment, 2),
    "hopper": Part(hopper, of_hopper, 14, workers=4),
    "hopper_times": Part(hopper_times, of_hopper_times, 26),
    "smoke": Part(smoke, of_smoke, 6),
    "correctness": Part(correctness, of_correctness, 26, workers=4, pretends_itself=True),
    "times": Part(times, of_times, 30),
    "decode": Part(decode, of_decode, 8),
    "host": Part(host, of_host, 3),
    "bandwidth": Part(bandwidth, of_bandwidth, 2),
    "sanitizer": Part(sanitizer, of_sanitizer, 9),
    "ranks": Part(ranks, of_ranks, 5),
    "links": Part(links, of_links, 1),
    "tuning": Part(tuning, of_tuning, 13),
}
"""In the order in which they run."""
