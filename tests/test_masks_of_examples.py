"""The examples of two lengths: their masks mean what their first lines say, and attention with them is dense."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cpflex
from cpflex.testing import ThreadLinks, run_ranks
from cross_cases import EVERYWHERE, CrossProblem, assert_right, on_threads
from oracle import Attention, MaskFn, dense_attention

NAN = float("nan")
EXAMPLES = Path(__file__).parents[1] / "examples"
TEXTS = [b"import this", b"a", b"the next line of a text", b"is longer than the one before it"]
IMAGES_AT = [20, 21, 60, 199]
ANCHORS = [1, 9, 9, 40, 130]


def of_example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


# -- what the masks are, written out: (queries, keys) -> whether seen, and the lengths


def words_and_lines() -> tuple[Callable[[int, int], bool], tuple[int, int]]:
    words = [i for i, text in enumerate(TEXTS) for _ in text.split()[-1]]
    lines = [i for i, text in enumerate(TEXTS) for _ in text]
    return lambda q, k: words[q] == lines[k], (len(words), len(lines))


def text_and_images() -> tuple[Callable[[int, int], bool], tuple[int, int]]:
    before = [[i for i, place in enumerate(IMAGES_AT) if place <= q] for q in range(200)]
    return lambda q, k: before[q][-1:] == [k // 30], (200, 120)


def mask_of_words() -> MaskFn:
    packed = of_example("encoder_decoder")["packed"]
    (_, words), (_, lines) = packed([text.split()[-1] for text in TEXTS], from_end=False), packed(TEXTS, from_end=True)
    return cpflex.document(words, kv_ids=lines)


def mask_of_images() -> MaskFn:
    return of_example("image_keys")["last_image"](torch.tensor(IMAGES_AT), 200, 30)


SHOWN = {"words and lines": (mask_of_words, words_and_lines), "text and images": (mask_of_images, text_and_images)}


@dataclass(frozen=True)
class Shown(CrossProblem):
    """The mask of an example."""

    @cached_property
    def mask_mod(self) -> MaskFn:
        return SHOWN[self.mask][0]()

    def dense(self, precision: torch.dtype = torch.float64) -> Attention:
        sees, (q_len, kv_len) = SHOWN[self.mask][1]()
        seen = torch.tensor([[sees(q, k) for k in range(kv_len)] for q in range(q_len)])
        named = [self.tensors[name] for name in ("q", "k", "v", "grad_out", "grad_lse")]
        return dense_attention(*named, lambda b, h, q, k: seen[q, k], precision=precision)


@pytest.mark.parametrize("keys", [EVERYWHERE, "balanced", "zigzag"])
@pytest.mark.parametrize("name", SHOWN)
def test_attention_with_an_examples_mask_is_dense_attention(name: str, keys: str):
    q_len, kv_len = SHOWN[name][1]()[1]
    problem = Shown(name, q_len, kv_len, keys, world_size=3, score=False)
    results = on_threads(problem)
    assert_right(problem, results)
    assert all(one["unproven"] == 0 for one in results)


# -- a draft: the target's keys, and those of a block


@pytest.mark.parametrize("inside", ["causal", "bidirectional"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_drafts_two_kinds_are_one_softmax(world_size: int, inside: str):
    example = of_example("draft_model")
    block, context = example["BLOCK"], 150
    q_len = block * len(ANCHORS)
    random = torch.Generator().manual_seed(0)
    q, own_k, own_v, grad_out = torch.randn(4, q_len, 2, 16, generator=random)
    memory_k, memory_v = torch.randn(2, context, 2, 16, generator=random)

    def on_rank(group: ThreadLinks) -> list[Tensor]:
        target = cpflex.make_plan(cpflex.causal(), context, group)
        masks = {
            "memory": cpflex.cross(example["before_anchor"](torch.tensor(ANCHORS), context), target),
            "block": example["own_block"](len(ANCHORS), inside),
        }
        plan = cpflex.make_plan(masks, q_len, group, layout=cpflex.striped)
        mine = [plan.shard(x, dim=0, pad_value=NAN).requires_grad_() for x in (q, own_k, own_v)]
        memory = [target.shard(x, dim=0, pad_value=NAN).requires_grad_() for x in (memory_k, memory_v)]
        out = example["attend"](mine[0], memory, mine[1:], plan)
        assert out.isfinite().all(), "pads, too"
        grads = torch.autograd.grad(out, [*mine, *memory], plan.shard(grad_out, dim=0, pad_value=NAN))
        of = [plan, plan, plan, plan, target, target]
        return [one.unshard(x, dim=0) for one, x in zip(of, (out.detach(), *grads), strict=True)]

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        mine = torch.tensor(ANCHORS)[q // block]
        own = k - context
        in_block = (k >= context) & (own // block == q // block) & ((own <= q) | (inside != "causal"))
        return ((k < context) & (k < mine)) | in_block

    k, v = torch.cat([memory_k, own_k]), torch.cat([memory_v, own_v])
    whole = [x.transpose(0, 1)[None] for x in (q, k, v, grad_out)]
    exact = dense_attention(*whole, torch.zeros(1, 2, q_len), seen)
    out, dq, dk, dv = (x[0].transpose(0, 1) for x in (exact.out, exact.dq, exact.dk, exact.dv))
    expected = [out, dq, dk[context:], dv[context:], dk[:context], dv[:context]]
    for found in run_ranks(on_rank, world_size=world_size):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.double(), other, atol=2e-6, rtol=1e-5)
