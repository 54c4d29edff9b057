"""What several GPUs do together, each a function of how a group is made and of this rank's device.

Run by torchrun over NCCL (`test_nccl.py`), and on the CPU over gloo, where they are only rehearsed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import cpflex
from cases import Problem
from oracle import assert_within_budget
from runs import assemble, attend_on_rank

MakeGroup = Callable[[], dist.ProcessGroup]
Scenario = Callable[[MakeGroup, torch.device], None]

ZOO = [
    ("causal", "none", 321, "gqa", "bf16", "zigzag", "ring"),
    ("full", "softcap", 127, "mha", "bf16", "contiguous", "ring"),
    ("doc_sliding_causal", "none", 1000, "mqa", "fp32", "contiguous", "direct"),
    ("prefix_lm_per_document", "softcap", 1000, "gqa", "bf16", "balanced", "direct"),
    ("window_per_head", "none", 300, "gqa", "fp16", "balanced", "auto"),
    ("nothing", "none", 321, "mha", "bf16", "striped", "auto"),
]
DIM, HEADS = 64, 4
REFUSAL = "query and key must have one head dim"


def zoo_sample(make_group: MakeGroup, device: torch.device) -> None:
    """A sample of masks, layouts and schedules, forward and backward, within the error budget on the last rank."""
    group = make_group()
    for mask, score, seq_len, heads, dtype, layout, schedule in ZOO:
        problem = Problem(mask, score, seq_len, heads, "d16", dtype, layout, schedule)
        tensors = {name: x.to(device) for name, x in problem.tensors.items()}
        found = attend_on_rank(group, problem, tensors)
        found = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in found.items()}
        everyones: list[Any] = [None] * group.size()
        dist.all_gather_object(everyones, found, group=group)
        if group.rank() == group.size() - 1:
            assert_within_budget(assemble(everyones), problem.dense(torch.float32), problem.dense())


def idle_ranks(make_group: MakeGroup, device: torch.device) -> None:
    """The first and the last rank have no messages in the first call of a group whose communicator is not made."""
    group = make_group()
    length, size = 256, group.size()
    cuts = sorted({0, length, (size - 1) * length, size * length})
    mask = cpflex.causal() & cpflex.document(cu_seqlens=cuts)
    plan = cpflex.make_plan(mask, size * length, group, layout=cpflex.contiguous, schedule=cpflex.direct)
    messages = [t for step in plan.steps[1:] for t in (*step.exchange.sends, *step.exchange.receives)]
    assert bool(messages) == (0 < group.rank() < size - 1 and size > 3)
    attend(plan, device).sum().backward()
    total = torch.ones(1, device=device)
    dist.all_reduce(total, group=group)
    assert total.item() == size


def disagreement_in_the_first_call(make_group: MakeGroup, device: torch.device) -> None:
    group = make_group()
    plans = planned(group)
    with raises(cpflex.RankMismatch, "the ranks disagree about mask kind: group rank 0: sliding; group rank"):
        attend(plans["sliding" if group.rank() == 0 else "full"], device)


def refusal_in_the_first_call(make_group: MakeGroup, device: torch.device) -> None:
    group = make_group()
    refuse_on_rank_0(group, planned(group)["full"], device)


def refusal_in_the_first_call_of_another_plan(make_group: MakeGroup, device: torch.device) -> None:
    group = make_group()
    attend(planned(group)["full"], device).sum().backward()
    refuse_on_rank_0(group, planned(group, seq_len=200)["full"], device)
    attend(planned(group)["full"], device)


def fsdp_on_the_same_group(make_group: MakeGroup, device: torch.device) -> None:
    group = make_group()
    train_sharded(group, group, device)


def fsdp_on_another_group(make_group: MakeGroup, device: torch.device) -> None:
    train_sharded(make_group(), make_group(), device)


# -- after these the device may be stopped for good


def disagreement_in_a_later_call(make_group: MakeGroup, device: torch.device) -> None:
    group = make_group()
    plans = planned(group)
    for kind in ("full", "sliding"):
        attend(plans[kind], device)
    with said("the ranks disagree about mask kind: group rank 0: sliding; group rank"):
        attend(plans["sliding" if group.rank() == 0 else "full"], device)
        synchronize(device)


def refusal_in_a_later_call(make_group: MakeGroup, device: torch.device) -> None:
    group = make_group()
    plan = planned(group)["full"]
    attend(plan, device)
    synchronize(device)
    if group.rank() == 0:
        refuse(plan, device)
    else:
        with said(f"group rank 0 raised ValueError: {REFUSAL}"):
            attend(plan, device)
            synchronize(device)


SAFE: dict[str, Scenario] = {
    fn.__name__: fn
    for fn in (
        zoo_sample,
        idle_ranks,
        disagreement_in_the_first_call,
        refusal_in_the_first_call,
        refusal_in_the_first_call_of_another_plan,
        fsdp_on_the_same_group,
        fsdp_on_another_group,
    )
}
LAST: dict[str, Scenario] = {fn.__name__: fn for fn in (disagreement_in_a_later_call, refusal_in_a_later_call)}


# -- pieces


def planned(group: dist.ProcessGroup, seq_len: int = 300) -> cpflex.Plan:
    masks = {"full": cpflex.full(), "sliding": cpflex.sliding_window(9)}
    return cpflex.make_plan(masks, seq_len, group, schedule=cpflex.ring)


def attend(plan: cpflex.Plan, device: torch.device) -> Tensor:
    q, k, v = (torch.randn(1, 2, plan.local_len, 32, device=device, requires_grad=True) for _ in "qkv")
    out = cpflex.flex_attention(q, k, v, block_mask=plan)
    assert isinstance(out, Tensor)
    return out


def refuse(plan: cpflex.Plan, device: torch.device) -> None:
    q = torch.randn(1, 2, plan.local_len, 32, device=device)
    with raises(ValueError, REFUSAL):
        cpflex.flex_attention(q, q[..., :8], q, block_mask=plan)


def refuse_on_rank_0(group: dist.ProcessGroup, plan: cpflex.Plan, device: torch.device) -> None:
    """The first call of its kind: all hosts learn the reason, and go on."""
    if group.rank() == 0:
        refuse(plan, device)
    else:
        with raises(cpflex.RankMismatch, f"group rank 0 raised ValueError: {REFUSAL}"):
            attend(plan, device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def raises(kind: type[Exception], words: str) -> Iterator[None]:
    try:
        yield
    except kind as error:
        assert words in str(error), f"{words!r} is not in {error}"
        return
    raise AssertionError(f"no {kind.__name__}: {words}")


@contextmanager
def said(words: str) -> Iterator[None]:
    """``words`` are raised inside, or logged soon after: the error of a stopped device may come anywhere."""
    lines: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logging.getLogger("cpflex").addHandler(kept := Kept())
    try:
        yield
        lines.append("nothing was raised")
    except RuntimeError as error:
        lines.append(str(error))
    deadline = time.monotonic() + 20
    while not any(words in line for line in lines) and time.monotonic() < deadline:
        time.sleep(0.05)
    logging.getLogger("cpflex").removeHandler(kept)
    assert any(words in line for line in lines), f"{words!r} is not in {lines}"
    assert "nothing was raised" not in lines


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, plan: cpflex.Plan) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = cpflex.flex_attention(q, k, v, block_mask=plan)
        assert isinstance(y, Tensor)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor, plan: cpflex.Plan) -> Tensor:
        for layer in self.layers:
            x = layer(x, plan)
        return x


def train_sharded(group: dist.ProcessGroup, shards: dist.ProcessGroup, device: torch.device) -> None:
    """Gradients of layers sharded over ``shards`` are those of one rank, with attention over ``group``."""
    mask, seq_len = cpflex.causal() & cpflex.document(cu_seqlens=[0, 170, 500]), 500
    plan, alone = (cpflex.make_plan(mask, seq_len, ranks) for ranks in (group, None))
    x = torch.randn(1, seq_len, DIM, generator=torch.Generator().manual_seed(1)).to(device)
    one, many = (Layers().to(device) for _ in range(2))
    mesh = DeviceMesh.from_group(shards, device.type)
    for layer in (*many.layers, many):
        fully_shard(layer, mesh=mesh)

    def loss(model: Layers, plan: cpflex.Plan) -> Tensor:
        tokens = model(plan.shard(x, dim=1, pad_value=0.0), plan)
        real = (plan.positions < seq_len).to(device)
        return (tokens * real[:, None]).square().sum()

    for _ in range(2):
        loss(one, alone).backward()
        loss(many, plan).backward()
    for (name, ours), theirs in zip(many.named_parameters(), one.parameters(), strict=True):
        assert isinstance(ours.grad, DTensor)
        whole = ours.grad.full_tensor() * group.size()  # FSDP averages
        torch.testing.assert_close(whole, theirs.grad, rtol=2e-3, atol=2e-3 * theirs.grad.abs().max().item(), msg=name)
