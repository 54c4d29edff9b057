"""The table of what works with models of transformers, made of the tables of the tests.

python tests/integrations/support_matrix.py --write
python tests/integrations/support_matrix.py --ran latest    the tests passed with the versions installed here: write that too
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "support-matrix.md"
FAMILIES = Path(__file__).parent / "families.json"
"""What `families.py` found."""

GENERATIONS = Path(__file__).parent / "generations.json"
"""What `generations.py` found."""

VERSIONS = Path(__file__).parent / "versions.json"
"""With which versions the tests passed, by `make` target: written after they have."""

PACKAGES = ("torch", "triton", "numpy", "transformers", "accelerate")
HEAD = """\
# Models of transformers

Made by `python tests/integrations/support_matrix.py --write` from the tables of the tests; a test keeps it current.
How to use it: `cpflex/integrations/transformers/`.

## All families

"""
FAMILIES_HEAD = """\
Every type for which transformers TRANSFORMERS has a causal language model, made small by one recipe with random weights in which
each type of layer occurs, put through `python tests/integrations/families.py --write` with torch TORCH on DAY: loss and all
parameter gradients on 2 and on 4 gloo processes, against transformers' own eager attention in one process, each document by
itself. NUM_VERIFIED of NUM types are equal: they are `VERIFIED`, and the others are refused, unless `verified_only=False` for
those that nobody could compare. Models of text and images are there with text alone; layers that mix tokens outside of
attention are attached as the last column says ([hybrids.md](hybrids.md)). `VERIFIED` is that of the newest release with a table that is not newer than the one installed.

The numbers are the largest error of the loss and of any gradient, against fp64, relative to its norm: 1e-5 at most. A gradient that is a
small difference of large terms is not that exact in one process either: its bar is three times the error of eager attention in
fp32, of that gradient or of the median one, and at most 1e-3. Those are named, with their errors and bars.

"""
WORDS = {"refused": "", "differs": "it differs: ", "fails": "it fails: ", "not built": "not made small: "}
GENERATING = """\

## Generating over ranks

NUM types that are `VERIFIED`, by `python tests/integrations/generations.py --write` with torch TORCH, last on DAY: `prefill`,
then transformers' own `generate`, on 2 gloo processes, and NUM_FOUR of them on 4 as well, beside `generate` in one process with eager attention. Greedy,
and again after further tokens of the user; sampled, with an end that one row meets early; rows padded on the left, one of them
to a single token; a prompt of 2 tokens. NUM_EQUAL give the tokens of one process, to the last, and
its logits to WORST of the largest at most: EQUAL.

"""
BY_HAND = """\

## All kinds of batches

Yes: the unmodified class, with small sizes and random weights, has the loss and all parameter gradients of one process
with `attn_implementation="eager"`, to 1e-5 in fp32, on 2 and on 4 gloo processes, with `attn_implementation="cpflex"`
(`make test-hf`).

"""
OTHERS = """
The same with recurrent and convolutional layers, truth being each document by itself: HYBRIDS.

With images and without, loss and all gradients of text model, vision tower and projector, on 2 gloo processes
(`tests/integrations/test_multimodal.py`, transformers 5.24): IMAGES.

"""
NOTES = """
In one process `gpt_oss` does not see where packed documents begin; with cpflex it does, and is compared with masks written
out. Labels of padding, and of the first token after padding on the left, are ignored.

For `llama4_text` the temperature of layers without RoPE depends on the index in the whole sequence, packed or not, as in
one process.

## Versions

The tests pass with these, on CPUs with gloo (builds of torch with CUDA among them). `make test-latest` and `make test-oldest` run the quick tests
and all tests of models, and write their row.

VERSIONS_TABLE
## With conditions

| | |
| --- | --- |
| RoPE of type `dynamic` or `longrope` | yes where all ranks find the same longest position or none beyond the limit, else refused |
| ALiBi: Bloom, MPT, Falcon | load them as they are, then `replace_attention(model)`: their classes compute attention by themselves, and transformers raises `KeyError: 'cpflex'` where Falcon is loaded with that implementation. Falcon's ALiBi is that of its sdpa attention; eager attention of transformers 5.24 adds it twice |
| BERT and its kind | as decoders, `is_decoder=True`; else refused |
| other model types | refused; `verified_only=False` after comparing with one process |
| mask functions of users (`and_mask_function`, `or_mask_function`) | yes, if pointwise |
| activation checkpointing | yes |

## Refused

Before anything is exchanged, on every rank, with an error that says:

| | |
| --- | --- |
"""


def support_matrix() -> str:
    from hf_hybrids import HYBRIDS
    from hf_models import ARCHITECTURES
    from hf_refusals import REFUSALS
    from hf_runs import TOKENS

    from cpflex.integrations.transformers import multimodal

    lines = [f"| model type | what it needs | {' | '.join(TOKENS)} |", "| --- " * (2 + len(TOKENS)) + "|"]
    for name, architecture in ARCHITECTURES.items():
        lines.append(f"| `{name}` | {', '.join(architecture.features)} | {' | '.join(['yes'] * len(TOKENS))} |")
    refused = [f"| {what} | {error.__name__}: ... {message} ... |" for what, (_, error, message) in REFUSALS.items()]
    return (
        HEAD
        + _families()
        + _generating()
        + BY_HAND
        + "\n".join(lines)
        + "\n"
        + OTHERS.replace("HYBRIDS", _names(HYBRIDS)).replace("IMAGES", _names(multimodal.VERIFIED))
        + NOTES.replace("VERSIONS_TABLE", _versions())
        + "\n".join(refused)
        + "\n"
    )


def _names(model_types: Iterable[str]) -> str:
    return ", ".join(f"`{model_type}`" for model_type in sorted(model_types))


def _families() -> str:
    older, (release, table) = (releases := list(json.loads(FAMILIES.read_text()).items()))[:-1], releases[-1]
    families: dict[str, Any] = table["families"]
    verified = {name: row for name, row in families.items() if _is_equal(row)}
    head = FAMILIES_HEAD
    for word, value in {
        "NUM_VERIFIED": len(verified),
        "NUM": len(families),
        "TRANSFORMERS": release,
        "TORCH": table["torch"],
        "DAY": table["day"],
    }.items():
        head = head.replace(word, f"{value}")
    kinds = list(next(iter(verified.values()))["worst"])
    also = [f"also with {other}" for other, _ in older]
    lines = ["| " + " | ".join(["model type", "layers", *kinds, *also, "bars of its own", "needs"]) + " |"]
    lines.append("| --- " * (4 + len(kinds) + len(also)) + "|")
    for name, row in verified.items():
        errors = [f"{error:.0e}" for error in row["worst"].values()]
        layers = ", ".join(layer.removesuffix("_attention") for layer in row["layers"])
        yes = ["yes" if _is_equal(other["families"].get(name, {})) else "" for _, other in older]
        cells = [f"`{name}`", layers, *errors, *yes, _bars(row.get("bars", {})), row["needs"]]
        lines.append("| " + " | ".join(cells) + " |")
    why: dict[str, list[str]] = {}
    for name, row in families.items():
        if not _is_equal(row):
            why.setdefault(WORDS[row["outcome"]] + row["why"], []).append(f"`{name}`")
    lines += ["", "| not verified, because | model types |", "| --- | --- |"]
    lines += [f"| {reason} | {', '.join(names)} |" for reason, names in sorted(why.items())]
    return head + "\n".join(lines) + "\n"


def _generating() -> str:
    (_, table) = list(json.loads(GENERATIONS.read_text()).items())[-1]
    types: dict[str, Any] = table["types"]
    equal = {name: row for name, row in types.items() if row["outcome"] == "equal"}
    text = GENERATING
    for word, value in {
        "NUM_EQUAL": len(equal),
        "NUM_FOUR": sum("4 ranks" in row["worst"] for row in equal.values()),
        "NUM": len(types),
        "TORCH": table["torch"],
        "DAY": table["day"],
        "WORST": f"{max(max(row['worst'].values()) for row in equal.values()):.0e}",
        "EQUAL": _names(equal),
    }.items():
        text = text.replace(word, f"{value}")
    why: dict[str, list[str]] = {}
    for name, row in types.items():
        if row["outcome"] != "equal":
            why.setdefault(row["why"], []).append(f"`{name}`")
        for way, reason in row.get("refused", {}).items():
            why.setdefault(f"{way}: {reason}", []).append(f"`{name}`")
    lines = ["| refused by name, because | model types |", "| --- | --- |"]
    lines += [f"| {reason} | {', '.join(names)} |" for reason, names in sorted(why.items())]
    return text + "\n".join(lines) + "\n"


def _is_equal(row: Mapping[str, Any]) -> bool:
    return row.get("outcome") in ("exact", "derived")


def _bars(bars: Mapping[str, tuple[float, float] | None]) -> str:
    """None is a gradient that is nothing but rounding."""
    if len(bars) > 6:
        errors, limits = zip(*filter(None, bars.values()), strict=True)
        return f"{len(bars)} gradients, {max(errors):.0e} at most, of {max(limits):.0e}"
    return ", ".join(
        f"`{name}` " + ("is 0 but for rounding" if bar is None else f"{bar[0]:.0e} of {bar[1]:.0e}")
        for name, bar in bars.items()
    )


def _versions() -> str:
    rows = [f"| | day | Python | {' | '.join(PACKAGES)} |", "| --- " * (3 + len(PACKAGES)) + "|"]
    for target, ran in json.loads(VERSIONS.read_text()).items():
        rows.append(f"| `make {target}` | {ran['day']} | {ran['python']} | {' | '.join(ran[p] for p in PACKAGES)} |")
    return "\n".join(rows) + "\n"


def record(target: str) -> None:
    ran = {"day": f"{datetime.date.today()}", "python": platform.python_version()}
    known = json.loads(VERSIONS.read_text()) | {target: ran | {package: version(package) for package in PACKAGES}}
    VERSIONS.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace docs/support-matrix.md")
    parser.add_argument("--ran", metavar="TARGET", help="of make, whose tests have passed; implies --write")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    if options.ran:
        record(options.ran)
    text = support_matrix()
    if options.write or options.ran:
        DOCUMENT.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
