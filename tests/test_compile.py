"""The one operator under the compiler, under checkpointing, and between microbatches."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import cpflex
from cases import Problem
from cpflex.ring.operator import _refuse_capture as refuse_capture
from cpflex.ring.operator import attention
from cpflex.testing import ThreadLinks, run_ranks

DIM, HEADS = 32, 2


class Block(nn.Module):
    """Attention between two projections, with a residual."""

    def __init__(self, score_mod: cpflex.attention.ScoreMod | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.score_mod = score_mod

    def forward(self, x: Tensor, plan: cpflex.Plan) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y, lse = cpflex.flex_attention(q, k, v, score_mod=self.score_mod, block_mask=plan, return_lse=True)
        y = y * torch.sigmoid(lse).unsqueeze(-1)
        return x + self.out(y.transpose(1, 2).flatten(2))


def plans(count: int) -> list[cpflex.Plan]:
    """Other documents, windows and lengths, the last ones of another local length."""
    made = []
    for i in range(count):
        cuts = sorted(torch.randperm(198, generator=torch.Generator().manual_seed(i))[:5].add(1).tolist())
        mask = cpflex.causal() & cpflex.document(cu_seqlens=[0, *cuts, 200]) & cpflex.sliding_window(10 + i)
        made.append(cpflex.make_plan(mask, 200))
    return made


def gradients(fn: Callable, block: nn.Module, x: Tensor, plan: cpflex.Plan) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = fn(x, plan)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


SLOPES = torch.tensor([0.5, 0.25], requires_grad=True)
SCORE_MODS = {
    "no score mod": lambda: None,
    "softcap": lambda: cpflex.score_mod(lambda s, b, h, q, k: 5 * torch.tanh(s / 5)),
    "captured": lambda: cpflex.score_mod(lambda s, b, h, q, k: s - SLOPES[h] * (q - k)),
}


@pytest.mark.parametrize("name", SCORE_MODS)
def test_twenty_plans_are_one_graph(name: str):
    counter = CompileCounterWithBackend("aot_eager")
    block = Block(SCORE_MODS[name]())
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for seed, plan in enumerate(plans(20)):
        x = torch.randn(2, plan.local_len, DIM, generator=torch.Generator().manual_seed(seed))
        for ours, eager in zip(gradients(compiled, block, x, plan), gradients(block, block, x, plan), strict=True):
            torch.testing.assert_close(ours, eager)
    assert counter.frame_count == 1


def test_plans_of_several_ranks_are_one_graph_too():
    """As each rank of a job sees it, one process per rank: here, one rank alone with plans that need no other."""
    counter = CompileCounterWithBackend("aot_eager")
    block = Block()
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for plan in plans(4):
        two = cpflex.make_plan({"a": cpflex.causal(), "b": cpflex.full()}, 200)
        x = torch.randn(2, plan.local_len, DIM)
        compiled(x, plan), compiled(x, two["a"]), compiled(x, two["b"])
    assert counter.frame_count == 1


@pytest.mark.slow
def test_inductor_compiles_it():
    block = Block(SCORE_MODS["softcap"]())
    compiled = torch.compile(block, fullgraph=True)
    for plan in plans(2):
        x = torch.randn(2, plan.local_len, DIM)
        for ours, eager in zip(gradients(compiled, block, x, plan), gradients(block, block, x, plan), strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


def test_a_plain_score_mod_under_the_compiler_is_refused_with_what_to_do():
    def softcap(s, b, h, q, k):
        return 5 * torch.tanh(s / 5)

    def attend(q: Tensor, plan: cpflex.Plan) -> Tensor:
        return cpflex.flex_attention(q, q, q, softcap, plan)

    with pytest.raises(Exception, match=r"cpflex\.score_mod\(fn\)"):
        torch.compile(attend, fullgraph=True, backend="eager")(torch.randn(1, 1, 208, 16), plans(1)[0])


# -- checkpointing


def plain(block: Block, x: Tensor, plan: cpflex.Plan) -> Tensor:
    return block(x, plan)


def checkpointed(block: Block, x: Tensor, plan: cpflex.Plan) -> Tensor:
    return checkpoint(block, x, plan, use_reentrant=False)


def selectively(block: Block, x: Tensor, plan: cpflex.Plan) -> Tensor:
    def policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
        saved = op == torch.ops.cpflex.attention.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(block, x, plan, use_reentrant=False, context_fn=contexts)


def exchanges_and_gradients(group: ThreadLinks, run: Callable, shared: Block) -> tuple[list[int], list[Tensor]]:
    """(exchanges in forward, in backward), gradients."""
    problem = Problem("causal", seq_len=384, layout="zigzag", schedule="ring")
    plan = problem.plan(group)
    block, counts = copy.deepcopy(shared), [0]
    x = plan.shard(torch.randn(2, 384, DIM, generator=torch.Generator().manual_seed(5)), dim=1).requires_grad_()
    y = run(block, x, plan)
    counts.append(group.num_exchanges)
    grads = torch.autograd.grad(y.square().sum(), [x, *block.parameters()])
    counts.append(group.num_exchanges)
    return [b - a for a, b in itertools.pairwise(counts)], [y.detach(), *grads]


@pytest.mark.parametrize("world_size", [2, 3])
def test_checkpointing_gives_equal_gradients_and_selective_checkpointing_exchanges_once(world_size: int):
    # one backward: a K/V exchange and a gradient exchange per hop
    hops, block = world_size - 1, Block()
    runs = {
        run: run_ranks(partial(exchanges_and_gradients, run=run, shared=block), world_size)
        for run in (plain, checkpointed, selectively)
    }
    expected = {plain: [hops, 2 * hops], checkpointed: [hops, 3 * hops], selectively: [hops, 2 * hops]}
    for run, results in runs.items():
        for (counts, grads), (_, reference) in zip(results, runs[plain], strict=True):
            assert counts == expected[run], run.__name__
            for ours, theirs in zip(grads, reference, strict=True):
                assert torch.equal(ours, theirs), run.__name__


def test_reentrant_checkpointing_gives_equal_gradients_too():
    (plan,) = plans(1)
    block, x = Block(), torch.randn(2, plan.local_len, DIM)
    expected = gradients(block, block, x, plan)[2:]
    checkpoint(block, x.requires_grad_(), plan, use_reentrant=True).square().sum().backward()
    for parameter, theirs in zip(block.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, theirs, rtol=0, atol=0)


def test_a_compiled_block_is_checkpointed_too():
    (plan,) = plans(1)
    block, x = Block(), torch.randn(2, plan.local_len, DIM)
    compiled = torch.compile(partial(checkpointed, block), fullgraph=True, backend="aot_eager")
    for ours, eager in zip(gradients(compiled, block, x, plan), gradients(block, block, x, plan), strict=True):
        torch.testing.assert_close(ours, eager)


# -- the life of a plan


def test_a_second_derivative_is_refused():
    (plan,) = plans(1)
    q = torch.randn(1, 1, plan.local_len, 16, requires_grad=True)
    (first,) = torch.autograd.grad(cpflex.flex_attention(q, q, q, block_mask=plan).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivative; do not use create_graph=True"):
        torch.autograd.grad(first.sum(), q)


def test_a_plan_may_be_dropped_before_backward():
    (plan,) = plans(1)
    score_mod = cpflex.score_mod(lambda s, b, h, q, k: s * 0.5)
    q = torch.randn(1, 1, plan.local_len, 16, requires_grad=True)
    (expected,) = torch.autograd.grad(cpflex.flex_attention(q, q, q, score_mod, plan).sum(), q)
    out = cpflex.flex_attention(q, q, q, score_mod, plan)
    del plan, score_mod
    gc.collect()
    (found,) = torch.autograd.grad(out.sum(), q)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_score_mod_may_be_made_again_and_the_old_one_dropped():
    """As in a notebook cell that runs twice: the new one exists before the old one goes."""

    def make() -> cpflex.attention.ScoreMod:
        return cpflex.score_mod(lambda s, b, h, q, k: s * 0.125)

    (plan,) = plans(1)
    q = torch.randn(1, 1, plan.local_len, 16)
    softcap = make()
    expected = cpflex.flex_attention(q, q, q, softcap, plan)
    softcap = make()
    gc.collect()
    torch.testing.assert_close(cpflex.flex_attention(q, q, q, softcap, plan), expected, rtol=0, atol=0)


def two_in_flight(group: ThreadLinks) -> bool:
    """Forward of two microbatches, then backward of both, against one after the other; each has its own plan."""
    problems = [
        Problem(mask, seq_len=300, schedule=schedule)
        for mask, schedule in (("doc_causal", "direct"), ("causal", "ring"))
    ]
    made = [problem.plan(group) for problem in problems]
    leaves = [plan.shard(problem.tensors["q"], 2, pad_value=0.0) for plan, problem in zip(made, problems, strict=True)]

    def forward(i: int, x: Tensor) -> Tensor:
        return cpflex.flex_attention(x, x, x, block_mask=made[i])

    alone = []
    for i, leaf in enumerate(leaves):
        x = leaf.clone().requires_grad_()
        alone.append(torch.autograd.grad(forward(i, x).sum(), x)[0])
    together = [leaf.clone().requires_grad_() for leaf in leaves]
    outs = [forward(i, x) for i, x in enumerate(together)]
    first_last = [torch.autograd.grad(outs[i].sum(), together[i])[0] for i in (1, 0)]
    return torch.equal(first_last[1], alone[0]) and torch.equal(first_last[0], alone[1])


def test_two_microbatches_with_two_plans_may_be_in_flight():
    assert all(run_ranks(two_in_flight, 3))


@pytest.mark.parametrize("operator", ["attention", "attention_backward"])
def test_the_operators_say_that_a_cuda_graph_may_not_hold_them(operator: str):
    if not hasattr(torch.Tag, "cudagraph_unsafe"):
        pytest.skip("this torch has no such tag")
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.cpflex, operator).default.tags


def test_capture_in_a_cuda_graph_is_refused(monkeypatch: pytest.MonkeyPatch):
    """A replay would keep the tables of an old plan."""
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        refused = pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph")
        with refused if capturing else contextlib.nullcontext():
            refuse_capture(torch.device("cuda", 0))
        refuse_capture(torch.device("cpu"))


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_both_directions_look_whether_they_are_captured(name: str, monkeypatch: pytest.MonkeyPatch):
    plan = cpflex.make_plan(cpflex.causal(), 100)
    x = torch.randn(1, 1, plan.local_len, 16, requires_grad=True)
    out = cpflex.flex_attention(x, x, x, block_mask=plan)

    def refuse(device: torch.device) -> None:
        raise RuntimeError(f"captured on {device}")

    monkeypatch.setattr(sys.modules["cpflex.ring.operator"], "_refuse_capture", refuse)
    with pytest.raises(RuntimeError, match="captured on cpu"):
        if name == "forward":
            cpflex.flex_attention(x, x, x, block_mask=plan)
        else:
            torch.autograd.grad(out.sum(), x)


# opcheck's own, of torch 2.15
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("needs_grad", [False, True], ids=["forward", "and backward"])
def test_the_operator_passes_torchs_own_checks(needs_grad: bool, layout: str, monkeypatch: pytest.MonkeyPatch):
    (plan,) = plans(1)
    score_mod = cpflex.score_mod(lambda s, b, h, q, k: s - SLOPES[h] * (q - k))
    if layout == "contiguous":
        q, k, v = (torch.randn(2, 2, plan.local_len, 8) for _ in range(3))
    else:
        q, k, v = torch.randn(2, plan.local_len, 3, 2, 8).permute(2, 0, 3, 1, 4)
    calls = []

    def noted(*args):
        calls.append(args)
        return attention(*args)

    monkeypatch.setattr(sys.modules["cpflex.attention"], "attention", noted)
    cpflex.flex_attention(*(x.detach().requires_grad_(needs_grad) for x in (q, k, v)), score_mod, plan)
    torch.library.opcheck(attention, calls[0])


def test_gradients_of_strided_tensors_have_the_strides_that_the_compiler_was_told():
    (plan,) = plans(1)
    leaves = [x.detach().requires_grad_() for x in torch.randn(2, plan.local_len, 3, 2, 8).permute(2, 0, 3, 1, 4)]
    out = cpflex.flex_attention(*leaves, block_mask=plan)
    assert [x.is_contiguous() for x in torch.autograd.grad(out.sum(), leaves)] == [True] * 3
