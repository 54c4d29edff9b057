"""What is promised of plans of one sequence holds where keys are another one: each promise once, on a cross kind."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest
from torch.utils.checkpoint import checkpoint

import cpflex
from cases import NODES_OF_TWO
from cpflex.testing import ThreadLinks, run_ranks
from cross_cases import EVERYWHERE, CrossProblem

Q_LEN, KV_LEN = 120, 300
PROBLEM = CrossProblem("monotonic", Q_LEN, KV_LEN, "zigzag", score=False)


def whole(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v of all tokens."""
    random = torch.Generator().manual_seed(0)
    sizes = [(4, Q_LEN), (2, KV_LEN), (2, KV_LEN)]
    return [torch.randn(2, *size, 16, generator=random).to(dtype).requires_grad_() for size in sizes]


def local(plan: cpflex.Plan, keys: cpflex.Plan, tensors: list[Tensor]) -> list[Tensor]:
    return [of.shard(x, dim=2, pad_value=0.0) for of, x in zip((plan, keys, keys), tensors, strict=True)]


def attend(plan: cpflex.Plan, *qkv: Tensor) -> Tensor:
    out = cpflex.flex_attention(*qkv, block_mask=plan["cross"], enable_gqa=True)
    assert isinstance(out, Tensor)
    return out


def on_two_ranks(fn: Callable[[cpflex.Plan, cpflex.Plan], object], problem: CrossProblem = PROBLEM) -> list:
    def on_rank(group: ThreadLinks) -> object:
        plan, keys = problem.plans(group)
        assert keys is not None
        return fn(plan, keys)

    return run_ranks(on_rank, world_size=2)


def test_largest_scores_are_those_of_the_queries_over_the_keys():
    q, k, _ = (x.detach() for x in whole())
    seen = PROBLEM.mask_mod(*(torch.tensor(0),) * 2, torch.arange(Q_LEN)[:, None], torch.arange(KV_LEN))
    scores = (q @ k.repeat_interleave(2, dim=1).mT / 4).masked_fill(~seen, -torch.inf)

    def check(plan: cpflex.Plan, keys: cpflex.Plan) -> None:
        _, aux = cpflex.flex_attention(
            *local(plan, keys, whole()),
            block_mask=plan["cross"],
            enable_gqa=True,
            return_aux=AuxRequest(lse=True, max_scores=True),
        )
        torch.testing.assert_close(plan.unshard(aux.max_scores, dim=2), scores.amax(dim=-1))
        torch.testing.assert_close(plan.unshard(aux.lse.detach(), dim=2), scores.logsumexp(dim=-1))

    on_two_ranks(check)


def gradients(dtype: torch.dtype, how: Callable[..., Tensor], context: Callable[[], AbstractContextManager]) -> list:
    def run(plan: cpflex.Plan, keys: cpflex.Plan) -> list[Tensor]:
        leaves = whole(dtype)
        with context():
            out = how(plan, *local(plan, keys, leaves))
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    return on_two_ranks(run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("what", ["checkpointed", "under autocast"])
def test_recomputation_and_autocast_change_no_bit(what: str, dtype: torch.dtype):
    how, context = {
        "checkpointed": (lambda *x: checkpoint(attend, *x, use_reentrant=False), nullcontext),
        "under autocast": (attend, lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
    }[what]
    found, expected = gradients(dtype, how, context), gradients(dtype, attend, nullcontext)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_plan_made_in_inference_mode_computes_the_same_and_trains():
    def run(plan: cpflex.Plan, keys: cpflex.Plan, made: CrossProblem = PROBLEM) -> None:
        leaves = local(plan, keys, whole())
        with torch.inference_mode():
            where = {"rank": plan.rank, "world_size": plan.world_size}
            again = made.plans(**where)[0].bind(plan._links)
            out = attend(again, *leaves)
        trained = attend(again, *leaves)
        assert torch.equal(out, trained)
        trained.sum().backward()

    on_two_ranks(run)


def test_second_derivatives_and_transforms_are_refused():
    def second(plan: cpflex.Plan, keys: cpflex.Plan) -> None:
        q, k, v = whole()
        out = attend(plan, *local(plan, keys, [q, k, v]))
        (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        with pytest.raises(NotImplementedError, match="no second derivative"):
            grad.sum().backward()

    on_two_ranks(second)
    plan = cpflex.make_plan({"self": cpflex.causal(), "cross": cpflex.cross(cpflex.full(), KV_LEN)}, Q_LEN)
    q, k, v = (x.detach() for x in whole())
    q = plan.shard(q, dim=2, pad_value=0.0)
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda q: attend(plan, q, k, v).sum())(q)
    with pytest.raises(RuntimeError):
        torch.func.vmap(lambda q: attend(plan, q, k, v))(q[None])


def test_plans_of_all_lengths_compile_to_one_graph_of_changing_ones():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for q_len, kv_len in [(127, 300), (200, 310), (77, 900), (300, 90), (410, 55)]:
        masks = {"self": cpflex.causal(), "cross": cpflex.cross(cpflex.full(), kv_len)}
        plan = cpflex.make_plan(masks, q_len)
        q, k, v = (torch.randn(1, h, n, 8) for h, n in ((4, plan.local_len), (2, kv_len), (2, kv_len)))
        torch.testing.assert_close(compiled(plan, q, k, v), attend(plan, q, k, v))
    assert counter.frame_count <= 2, "one of the first lengths, one of all others"


def test_ranks_without_queries_or_keys_take_part():
    random = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 2, 8, generator=random), torch.randn(1, 2, 3, 8, generator=random)
    expected = (q @ k.mT / 8**0.5).softmax(dim=-1) @ k

    def on_rank(group: ThreadLinks) -> None:
        keys = cpflex.make_plan(cpflex.full(), 3, group)
        plan = cpflex.make_plan({"self": cpflex.causal(), "cross": cpflex.cross(cpflex.full(), keys)}, 2, group)
        part = keys.shard(k, dim=2, pad_value=torch.nan)
        out = attend(plan, plan.shard(q, dim=2, pad_value=torch.nan), part, part)
        torch.testing.assert_close(plan.unshard(out, dim=2), expected)

    run_ranks(on_rank, world_size=8)


def test_keys_on_every_rank_of_some_and_sharded_on_others_are_told_to_all():
    def on_rank(group: ThreadLinks) -> None:
        keys: cpflex.Plan | int = cpflex.make_plan(cpflex.full(), 64, group) if group.rank else 64
        plan = cpflex.make_plan(cpflex.cross(cpflex.full(), keys), 64, group)
        q, k = (torch.randn(1, 2, n, 8) for n in (plan.local_len, plan.kv_local_len))
        with pytest.raises(cpflex.RankMismatch, match=r"layout of the keys.*on every rank"):
            cpflex.flex_attention(q, k, k, block_mask=plan)

    run_ranks(on_rank, world_size=2)


def test_a_stored_plan_computes_on_the_group_it_is_bound_to():
    def check(plan: cpflex.Plan, keys: cpflex.Plan) -> None:
        again = cpflex.Plan.from_bytes(plan.to_bytes()).bind(plan._links)
        qkv = local(plan, keys, whole())
        assert torch.equal(attend(again, *qkv), attend(plan, *qkv))

    on_two_ranks(check)


@pytest.mark.parametrize("keys", ["zigzag", EVERYWHERE])
def test_weights_and_nodes_count_kinds_of_other_keys(keys: str):
    own = 1200 if keys == EVERYWHERE else cpflex.make_plan(cpflex.full(), 1200, rank=1, world_size=4)
    late = cpflex.cross(lambda b, h, q, k: q >= 3072, own)
    masks = {"self": cpflex.full(), "cross": late}

    def imbalance(**options: object) -> float:
        plan = cpflex.make_plan(masks, 4096, rank=1, world_size=4, **options)  # pyright: ignore[reportArgumentType]
        plan.check()
        assert "of another sequence" in plan.explain()
        return plan.stats["cross"]["imbalance"]

    assert imbalance(weights={"self": 1, "cross": 1000}) < 1.1
    assert imbalance(layout=cpflex.contiguous) == 4
    imbalance(topology=NODES_OF_TWO)
