"""The table of what works with models of transformers, made of the tables of the tests.

python tests/integrations/support_matrix.py --write
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "support-matrix.md"
HEAD = """\
# Models of transformers

Made by `python tests/integrations/support_matrix.py --write` from the tables of the tests; a test keeps it current.

Yes: the unmodified class, with small sizes and random weights, has the loss and all parameter gradients of one process
with `attn_implementation="eager"`, to 1e-5 in fp32, on 2 and on 4 gloo processes, with `attn_implementation="cpflex"`
(`make test-hf`). How to use it: `cpflex/integrations/transformers/`.

"""
NOTES = """
In one process `gpt_oss` does not see where packed documents begin; with cpflex it does, and is compared with masks written
out. Labels of padding, and of the first token after padding on the left, are ignored.

For `llama4_text` the temperature of layers without RoPE depends on the index in the whole sequence, packed or not, as in
one process.

## With conditions

| | |
| --- | --- |
| RoPE of type `dynamic` or `longrope` | yes where all ranks find the same longest position or none beyond the limit, else refused |
| other model types | refused; `verified_only=False` after comparing with one process |
| mask functions of users (`and_mask_function`, `or_mask_function`) | yes, if pointwise |
| activation checkpointing | yes |

## Refused

Before anything is exchanged, on every rank, with an error that says:

| | |
| --- | --- |
"""


def support_matrix() -> str:
    from hf_models import ARCHITECTURES
    from hf_refusals import REFUSALS
    from hf_runs import TOKENS

    lines = [f"| model type | what it needs | {' | '.join(TOKENS)} |", "| --- " * (2 + len(TOKENS)) + "|"]
    for name, architecture in ARCHITECTURES.items():
        lines.append(f"| `{name}` | {', '.join(architecture.features)} | {' | '.join(['yes'] * len(TOKENS))} |")
    refused = [f"| {what} | {error.__name__}: ... {message} ... |" for what, (_, error, message) in REFUSALS.items()]
    return HEAD + "\n".join(lines) + "\n" + NOTES + "\n".join(refused) + "\n"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    text = support_matrix()
    if "--write" in sys.argv:
        DOCUMENT.write_text(text)
    else:
        print(text, end="")
