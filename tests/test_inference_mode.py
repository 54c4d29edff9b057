"""In `torch.inference_mode` and `torch.no_grad` everything works as outside, and what is made there can train."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cpflex
from cpflex.attention import ScoreMod
from cpflex.loss import cross_entropy, num_labels, shift_labels
from cpflex.testing import ThreadLinks, run_ranks

SEQ_LEN = 100
IDS = torch.arange(SEQ_LEN) // 30


def table(ids: Tensor) -> Callable[..., Tensor]:
    """A mask of a user's own, that does something to what it captures: torch itself would show that differently."""
    return lambda b, h, q, k: ids.to("cpu")[q] >= ids.select(0, 0) + ids.long()[k]


MASKS = {
    "causal": lambda: cpflex.causal(),
    "window": lambda: cpflex.causal() & cpflex.sliding_window(9),
    "band": lambda: cpflex.sliding_window(9, 3),
    "prefix": lambda: cpflex.prefix_lm(20),
    "documents": lambda: cpflex.document(IDS.clone()) & cpflex.causal(),
    "cu_seqlens": lambda: cpflex.document(cu_seqlens=[0, 41, SEQ_LEN]) & ~cpflex.prefix_lm(3),
    "a user's own": lambda: table(IDS.clone()),
}


def slopes(tensor: Tensor) -> Callable[..., Tensor]:
    return lambda score, b, h, q, k: score - tensor[h] * (q - k)


def scaled(number: Tensor) -> Callable[..., Tensor]:
    return lambda score, b, h, q, k: score * number.to(q.device)


SCORE_MODS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "traced at each call": lambda: lambda score, b, h, q, k: 2 * torch.tanh(score / 2),
    "captures": lambda: cpflex.score_mod(slopes(torch.tensor([0.5, 0.25]))),
    "captures a number": lambda: cpflex.score_mod(scaled(torch.tensor(0.5))),
}


def inside(make: Callable[[], Any]) -> Any:
    with torch.inference_mode():
        return make()


def leaves(requires_grad: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, SEQ_LEN, 16, generator=generator).requires_grad_(requires_grad) for _ in range(3)]


def trained(plan: cpflex.Plan, score_mod: Any = None) -> list[Tensor]:
    whole = leaves()
    q, k, v = (plan.shard(x, 2, pad_value=0.0) for x in whole)
    out = cpflex.flex_attention(q, k, v, score_mod, plan)
    assert isinstance(out, Tensor)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), whole)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", MASKS)
def test_plans_made_in_inference_mode_train_as_those_made_outside(name: str):
    make = MASKS[name]

    def plan(mask: Any = None) -> cpflex.Plan:
        return cpflex.make_plan(make() if mask is None else mask, SEQ_LEN)

    outside = plan()
    expected = trained(outside)
    mask = inside(make)
    for made in (inside(plan), plan(mask), inside(lambda: plan(mask)), inside(lambda: plan().to("cpu"))):
        assert made.to_bytes() == outside.to_bytes()
        assert_same(trained(made), expected)


def test_plans_read_in_inference_mode_train_as_those_read_outside():
    plan = cpflex.make_plan(MASKS["documents"](), SEQ_LEN)
    expected, data = trained(plan), plan.to_bytes()
    for read in (lambda: pickle.loads(pickle.dumps(plan)), lambda: cpflex.Plan.from_bytes(data)):
        found = inside(read)
        assert_same(trained(found), expected)
        # an index is saved for backward
        weight = torch.randn(found.local_len + SEQ_LEN, 2, requires_grad=True)
        torch.nn.functional.embedding(inside(lambda plan=found: plan.positions), weight).sum().backward()
    inside(plan.check)
    assert inside(plan.to_bytes) == data


@pytest.mark.parametrize("name", SCORE_MODS)
def test_score_mods_made_in_inference_mode_train_as_those_made_outside(name: str):
    plan = cpflex.make_plan(cpflex.causal(), SEQ_LEN)
    made = inside(SCORE_MODS[name])
    assert_same(trained(plan, made), trained(plan, SCORE_MODS[name]()))


def test_a_captured_tensor_of_inference_mode_is_read_at_each_call():
    plan, captured = cpflex.make_plan(cpflex.causal(), SEQ_LEN), inside(lambda: torch.tensor([0.5, 0.25]))
    score_mod = cpflex.score_mod(slopes(captured))
    assert_same(trained(plan, score_mod), trained(plan, slopes(torch.tensor([0.5, 0.25]))))
    inside(lambda: captured.mul_(2))
    assert_same(trained(plan, score_mod), trained(plan, slopes(torch.tensor([1.0, 0.5]))))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", SCORE_MODS)
def test_attention_where_nothing_is_recorded_is_the_attention_of_training(name: str, compiled: bool):
    score_mod = SCORE_MODS[name]()
    if compiled and score_mod is not None and not isinstance(score_mod, ScoreMod):
        score_mod = cpflex.score_mod(score_mod)

    def attend(q: Tensor, k: Tensor, v: Tensor, plan: cpflex.Plan) -> Any:
        return cpflex.flex_attention(q, k, v, score_mod, plan)

    expected = trained(cpflex.make_plan(cpflex.causal(), SEQ_LEN), score_mod)
    if compiled:
        torch._dynamo.reset()
    run = torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend
    for mode in (torch.inference_mode, torch.no_grad):
        plan = cpflex.make_plan(cpflex.causal(), SEQ_LEN)
        with mode():
            for tensors in (leaves(), leaves(requires_grad=False)):
                out = run(*(plan.shard(x, 2, pad_value=0.0) for x in tensors), plan)
                assert torch.equal(out, expected[0])
        # its tables are made by now, where nothing is recorded
        assert_same(trained(plan, score_mod), expected)


def evaluated(group: ThreadLinks, mode: Callable[[], Any]) -> list[Tensor]:
    """All that a rank does to a batch, but for backward."""
    with mode():
        plan = cpflex.make_plan(MASKS["documents"](), SEQ_LEN, group)
        labels = plan.shard(shift_labels(torch.arange(SEQ_LEN), doc_ids=IDS), 0, pad_value=-100)
        q, k, v = (plan.shard(x, 2, pad_value=0.0) for x in leaves())
        out = cpflex.flex_attention(q, k, v, SCORE_MODS["captures"](), plan)
        assert isinstance(out, Tensor)
        logits = out[0, 0] @ torch.ones(16, SEQ_LEN)
        return [plan.unshard(out, 2), num_labels(labels, group), cross_entropy(logits, labels, group), plan.positions]


def test_ranks_evaluate_in_inference_mode_what_they_evaluate_outside():
    found, expected = (
        run_ranks(lambda group, m=mode: evaluated(group, m), 2) for mode in (torch.inference_mode, torch.enable_grad)
    )
    for rank in range(2):
        assert_same(found[rank], expected[rank])
