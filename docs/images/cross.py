"""Draws cross.png, the picture of docs/cross-attention.md: `python docs/images/cross.py`."""

from pathlib import Path

import torch

import cpflex

ranks = {"rank": 1, "world_size": 4}
source_ids = torch.arange(20).repeat_interleave(300)
target_ids = torch.arange(20).repeat_interleave(100)
encoder = cpflex.make_plan(cpflex.document(source_ids), 6000, **ranks)
masks = {
    "self": cpflex.causal() & cpflex.document(target_ids),
    "cross": cpflex.cross(cpflex.document(target_ids, kv_ids=source_ids), encoder),
}
decoder = cpflex.make_plan(masks, 2000, **ranks)
decoder.plot(str(Path(__file__).with_name("cross.png")))
