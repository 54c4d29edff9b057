"""docs/refusals.md: every wrong call that the tests make, and the error that it gets.

python tests/refusal_table.py --write
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.extend(str(Path(__file__).parent / folder) for folder in ("mods", "planning", "masks_from", "paging"))

import test_block_mask
import test_decode_refusals
import test_plan
import test_readers
import test_sequences_of_pages
import test_trace

import test_chunked_sequences
import test_cross_attention
import test_masks
import test_refusals
from cpflex import masks_from
from cpflex.mods.trace import trace_mask_mod

DOC = Path(__file__).parents[1] / "docs" / "refusals.md"
HEAD = """\
# Refusals

Wrong calls, and what they are told; made from the tables that the tests run (`python tests/refusal_table.py --write`). Every mistake in the
arguments of an attention call is raised on all ranks of its group, before anything is exchanged.
"""


def of_attention() -> Iterator[tuple[str, Callable[[], Any]]]:
    for name, (change, *_) in test_refusals.LOCAL.items():
        if name == "a DTensor":  # needs a process group
            continue
        made = test_refusals.arguments()

        def call(change=change, made=made) -> Any:
            change(made, None)
            return test_refusals.attend(made)

        yield name, call
    for name, (make, *_) in test_refusals.WITHOUT_A_PLAN.items():
        yield name, lambda make=make: test_refusals.attend(test_refusals.arguments() | {"block_mask": make()})


def of_pages() -> Iterator[tuple[str, Callable[[], Any]]]:
    for name, (call, *_) in test_sequences_of_pages.REFUSED.items():
        yield name, lambda call=call: call(test_sequences_of_pages.refused_pages())


def of_steps() -> Iterator[tuple[str, Callable[[], Any]]]:
    for name, (change, *_) in test_decode_refusals.LOCAL.items():

        def call(change=change) -> Any:
            made = test_decode_refusals.arguments()
            change(made)
            return test_decode_refusals.step(made)

        yield name, call
    for name, (change, *_) in test_decode_refusals.WITHOUT_A_STEP.items():
        yield name, lambda change=change: change(test_decode_refusals.arguments())


def sections() -> dict[str, list[tuple[str, Callable[[], Any]]]]:
    return {
        "Attention": list(of_attention()),
        "Plans": [(name, make) for name, (make, *_) in test_plan.REFUSED.items()],
        "Plans of two sequences": [(name, make) for name, (make, *_) in test_cross_attention.REFUSED.items()],
        "Plans of chunks": [(name, make) for name, (make, *_) in test_chunked_sequences.REFUSED.items()],
        "Masks": [(name, make) for name, (make, _) in test_masks.REFUSED.items()],
        "Formats of masks": [(name, make) for name, (make, *_) in test_readers.REFUSED.items()],
        "Block masks": [
            (name, lambda make=make: masks_from.block_mask(make()))
            for name, (make, *_) in test_block_mask.REFUSED.items()
        ],
        "Pages": list(of_pages()),
        "Steps of new tokens": list(of_steps()),
        "Mods": [(name, lambda fn=fn: trace_mask_mod(fn)) for name, (fn, _) in test_trace.REFUSED.items()],
    }


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:  # noqa: BLE001 - it is what the table shows
        said = " ".join(str(error).split()).replace("|", "\\|")
        return f"`{type(error).__name__}`: {said if len(said) < 230 else said[:227] + '...'}"
    raise AssertionError("this call was not refused")


def text() -> str:
    parts = [HEAD]
    for title, calls in sections().items():
        rows = "\n".join(f"| {name} | {error_of(call)} |" for name, call in calls)
        parts.append(f"## {title}: {len(calls)}\n\n| what is wrong | error |\n| --- | --- |\n{rows}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        DOC.write_text(text())
    else:
        print(text())
