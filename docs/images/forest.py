"""Draws forest.png, a picture of docs/trees.md: `python docs/images/forest.py`."""

from pathlib import Path

import torch

import cpflex
from cpflex import trees

random = torch.Generator().manual_seed(0)


def ids(num_tokens: int) -> list[int]:
    return torch.randint(1000, (num_tokens,), generator=random).tolist()


instructions = ids(400)
groups = [(instructions + ids(600 * n), [ids(100 + 60 * i) for i in range(8)]) for n in (1, 2, 3)]
packed = trees.pack(groups)
along = cpflex.tree(packed.tree)
window = along & cpflex.sliding_window(256, positions=packed.position_ids)
plan = cpflex.make_plan({"full": along, "sliding": window}, packed.seq_len, rank=1, world_size=4)
plan.plot(str(Path(__file__).with_name("forest.png")))
print(packed.seq_len, sum(len(prompt) + len(c) for prompt, completions in groups for c in completions))
