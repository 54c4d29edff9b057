"""cpflex beside the rest of the stack: data parallelism in every form, tensor parallelism, the compiler, checkpointing,
accumulation, mixed precision.

Each case trains one step of a small transformer on gloo processes; the truth is the same model on one process, dense,
without cpflex, in float64. Rows of a batch differ in documents and in their number of labels, so that a loss averaged
in a wrong way shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import cpflex
from cpflex.links.processes import ProcessLinks
from cpflex.loss import IGNORE_INDEX, cross_entropy, num_labels, shift_labels
from processes import RankProcesses

# B batch of 1, S tokens, E model dim, H query heads, G heads of keys and values, D head dim

SEQ_LEN, VOCAB, WIDTH, HEADS, KV_HEADS = 150, 29, 32, 4, 2
WINDOWS = torch.tensor([1, 20, 20, 60])
"""Of the heads of a sliding layer: masks may differ by head, and are sliced by head under tensor parallelism."""
CU_SEQLENS = ([0, 40, 41, 150], [0, 97, 150])  # of row 0 and row 1
NUM_PROMPT = 80
"""The first tokens of row 1 are not to be learned."""


# -- the model: attention, and masks[kind] of every layer, are passed in


class Block(nn.Module):
    def __init__(self, kind: str, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.kind, self.attend = kind, attend
        self.norm, self.up_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.query = nn.Linear(WIDTH, WIDTH, bias=False)
        self.key, self.value = (nn.Linear(WIDTH, WIDTH * KV_HEADS // HEADS, bias=False) for _ in range(2))
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.slopes = nn.Parameter(2.0 ** -torch.arange(1.0, 1.0 + HEADS))

    def forward(self, x: Tensor, masks: Mapping[str, Any]) -> Tensor:
        y = self.norm(x)
        q, k, v = (
            project(y).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        slopes = self.slopes.to_local() if isinstance(self.slopes, DTensor) else self.slopes
        y = self.attend(q, k, v, slopes, masks[self.kind]).transpose(1, 2).flatten(2)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(self.up_norm(x))))


class Model(nn.Module):
    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(SEQ_LEN, WIDTH)
        self.blocks = nn.ModuleList(Block(kind, attend) for kind in ("sliding", "full"))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: Tensor, position_ids: Tensor, masks: Mapping[str, Any]) -> Tensor:
        x = self.tokens(tokens) + self.positions(position_ids)
        for block in self.blocks:
            x = block(x, masks)
        return self.head(x)


def attend_over_ranks(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, plan: cpflex.Plan) -> Tensor:
    def alibi(score, b, h, q_idx, kv_idx):
        return score - slopes[h] * (q_idx - kv_idx)

    return cpflex.flex_attention(q, k, v, alibi, plan, enable_gqa=True)


softcap = cpflex.score_mod(lambda score, b, h, q_idx, kv_idx: 2 * torch.tanh(score / 2))


def attend_without_slopes(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, plan: cpflex.Plan) -> Tensor:
    """What the compiler accepts: a score_mod traced beforehand."""
    return cpflex.flex_attention(q, k, v, softcap, plan, enable_gqa=True) + 0 * slopes.sum()


# -- the truth: one process, dense


def dense(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, mask: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if slopes is None:
        scores = 2 * torch.tanh(scores / 2)
    else:
        i = torch.arange(q.shape[2])
        scores = scores - slopes[:, None, None] * (i[:, None] - i)
    return scores.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ v


def dense_without_slopes(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, mask: Tensor) -> Tensor:
    return dense(q, k, v, None, mask) + 0 * slopes.sum()


class Row(NamedTuple):
    """One sequence, whole: tokens, labels not shifted, and where documents start."""

    tokens: Tensor  # int64 [1, S]
    labels: Tensor  # int64 [1, S]
    cu_seqlens: list[int]


def row(index: int) -> Row:
    tokens = torch.randint(VOCAB, (1, SEQ_LEN), generator=torch.Generator().manual_seed(index))
    labels = tokens.clone()
    labels[:, : NUM_PROMPT * index] = IGNORE_INDEX
    return Row(tokens, labels, CU_SEQLENS[index])


def dense_masks(cu_seqlens: list[int]) -> dict[str, Tensor]:
    i = torch.arange(SEQ_LEN)
    ids = torch.searchsorted(torch.tensor(cu_seqlens), i, right=True)
    full = (ids[:, None] == ids) & (i <= i[:, None])
    return {"full": full, "sliding": full & (i > i[:, None] - WINDOWS[:, None, None])}


def mean_loss(model: Model, rows: range) -> Tensor:
    """Mean cross entropy over all labels of the rows."""
    total, count = torch.zeros(()), 0
    for tokens, labels, cu_seqlens in map(row, rows):
        expected = [i for i in range(1, SEQ_LEN) if i not in cu_seqlens and labels[0, i].item() != IGNORE_INDEX]
        logits = model(tokens, torch.arange(SEQ_LEN)[None], dense_masks(cu_seqlens))[0]
        wide = logits[torch.tensor(expected) - 1].to(torch.promote_types(logits.dtype, torch.float32))
        total = total + F.cross_entropy(wide, labels[0, expected], reduction="sum")
        count += len(expected)
    return total / count


def truth(attend: Callable[..., Tensor], rows: range, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Gradients of every parameter."""
    model = Model(attend).to(dtype)
    mean_loss(model, rows).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


# -- one step on ranks


class Shares(NamedTuple):
    """Who shares what: the group of the sequence, that of the mean; and this rank's row of data and heads."""

    cp: DeviceMesh
    mean: DeviceMesh  # 1-D: data and context parallelism together
    row: int
    heads: slice


def shares_of(mesh: DeviceMesh) -> Shares:
    names = mesh.mesh_dim_names
    assert names is not None
    heads = slice(None)
    if "tp" in names:
        num_local = HEADS // mesh["tp"].size()
        heads = slice(mesh["tp"].get_local_rank() * num_local, (mesh["tp"].get_local_rank() + 1) * num_local)
    data = [name for name in names if name not in ("cp", "tp")]
    if not data:
        return Shares(mesh["cp"], mesh["cp"], 0, heads)
    index = 0
    for name in data:
        index = index * mesh[name].size() + mesh[name].get_local_rank()
    return Shares(mesh["cp"], mesh[(*data, "cp")]._flatten("_".join((*data, "cp"))), index, heads)


def plan_of(cu_seqlens: list[int], shares: Shares) -> cpflex.Plan:
    full = cpflex.causal() & cpflex.document(cu_seqlens=cu_seqlens)
    windows = WINDOWS[shares.heads]
    sliding = full & (lambda b, h, q, k: k > q - windows[h])
    return cpflex.make_plan({"full": full, "sliding": sliding}, SEQ_LEN, shares.cp, num_heads=len(windows))


def sharded(index: int, shares: Shares) -> tuple[cpflex.Plan, Tensor, Tensor, Tensor]:
    """(plan, tokens, position_ids, shifted labels) of this rank, of row ``index``."""
    tokens, labels, cu_seqlens = row(index)
    plan = plan_of(cu_seqlens, shares)
    position_ids = torch.arange(SEQ_LEN)[None]
    shifted = shift_labels(labels, cu_seqlens)
    local = [
        plan.shard(x, dim=1, pad_value=pad) for x, pad in ((tokens, 0), (position_ids, 0), (shifted, IGNORE_INDEX))
    ]
    return plan, *local


Wrap = Callable[[Model, DeviceMesh, DeviceMesh], nn.Module]
"""(model, mesh, the 1-D mesh of the mean) -> the model as it is trained."""


def wrapped(mesh_shape: dict[str, int], wrap: Wrap, attend: Callable[..., Tensor]) -> tuple[nn.Module, Shares]:
    mesh = init_device_mesh("cpu", tuple(mesh_shape.values()), mesh_dim_names=tuple(mesh_shape))
    shares = shares_of(mesh)
    return wrap(Model(attend), mesh, shares.mean), shares


def backward_of(model: nn.Module, index: int, shares: Shares) -> None:
    plan, tokens, position_ids, labels = sharded(index, shares)
    logits = model(tokens, position_ids, plan)
    cross_entropy(logits, labels, shares.mean, averaged_over=shares.mean.size()).backward()


def gradients_on_rank(
    group: dist.ProcessGroup, mesh_shape: dict[str, int], wrap: Wrap, attend: Callable[..., Tensor] = attend_over_ranks
) -> dict[str, Tensor]:
    model, shares = wrapped(mesh_shape, wrap, attend)
    backward_of(model, shares.row, shares)
    return whole_gradients(model)


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    grads = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        grads[name.removeprefix("module.").replace("_orig_mod.", "")] = grad
    return grads


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Within 1e-5 of the largest number of each tensor."""
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        error, largest = (found[name] - grad).abs().max().item(), grad.abs().max().item()
        assert error <= 1e-5 * largest, f"{name}: wrong by {error:.1e}, of {largest:.1e}"


# -- data parallelism

DP_CP = {"dp": 2, "cp": 2}


def as_ddp(model: Model, mesh: DeviceMesh, mean: DeviceMesh) -> nn.Module:
    return DistributedDataParallel(model, process_group=mean.get_group())


def as_fsdp(model: Model, mesh: DeviceMesh, mean: DeviceMesh, **options: Any) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, mesh=mean, **options)
    return fully_shard(model, mesh=mean, **options)


def as_hsdp(model: Model, mesh: DeviceMesh, mean: DeviceMesh) -> nn.Module:
    """Parameters sharded over dp_shard x cp, replicated over dp_replicate."""
    mesh["dp_shard", "cp"]._flatten("dp_shard_cp")
    return as_fsdp(model, mesh, mesh["dp_replicate", "dp_shard_cp"])


@pytest.mark.parametrize(
    ("mesh_shape", "wrap"),
    [
        (DP_CP, as_ddp),
        (DP_CP, as_fsdp),
        ({"dp_replicate": 2, "dp_shard": 1, "cp": 2}, as_hsdp),
        ({"dp": 1, "cp": 4}, as_fsdp),
        ({"dp_replicate": 1, "dp_shard": 2, "cp": 2}, as_hsdp),
    ],
    ids=["ddp", "fsdp", "hsdp", "fsdp over one sequence", "hsdp with one replica"],
)
def test_gradients_are_those_of_one_process(mesh_shape: dict[str, int], wrap: Wrap, four_processes: RankProcesses):
    num_rows = 4 // mesh_shape["cp"]
    expected = truth(dense, range(num_rows))
    for grads in four_processes.run(gradients_on_rank, mesh_shape, wrap):
        assert_equal(grads, expected)


def gradients_with_a_silent_row(group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Nobody on the second row has a label."""
    model, shares = wrapped(DP_CP, as_fsdp, attend_over_ranks)
    plan, tokens, position_ids, labels = sharded(shares.row, shares)
    labels = labels.masked_fill(torch.tensor(shares.row == 1), IGNORE_INDEX)
    logits = model(tokens, position_ids, plan)
    cross_entropy(logits, labels, shares.mean, averaged_over=shares.mean.size()).backward()
    return whole_gradients(model)


def test_a_row_without_labels_adds_nothing_and_stops_nobody(four_processes: RankProcesses):
    expected = truth(dense, range(1))
    for grads in four_processes.run(gradients_with_a_silent_row):
        assert_equal(grads, expected)


def parameters_after_steps(group: dist.ProcessGroup) -> dict[str, Tensor]:
    model, shares = wrapped(DP_CP, as_fsdp, attend_over_ranks)
    train(model, lambda: backward_of(model, shares.row, shares))
    return {name: parameter.full_tensor().detach() for name, parameter in model.named_parameters()}


def train(model: nn.Module, backward: Callable[[], None]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()


def test_parameters_stay_those_of_one_process_over_clipped_steps(four_processes: RankProcesses):
    model = Model(dense).double()
    train(model, lambda: mean_loss(model, range(2)).backward())
    for parameters in four_processes.run(parameters_after_steps):
        assert_equal(parameters, model.state_dict())


# -- tensor parallelism


def as_tp(model: Model, mesh: DeviceMesh, mean: DeviceMesh) -> nn.Module:
    """Heads over tp, with the slopes that belong to them; what is left is sharded over cp."""
    for block in model.blocks:
        split = {name: ColwiseParallel() for name in ("query", "key", "value")}
        parallelize_module(block, mesh["tp"], {**split, "out": RowwiseParallel()})
        block.slopes = nn.Parameter(distribute_tensor(block.slopes, mesh["tp"], [Shard(0)]))
    return as_fsdp(model, mesh, mean)


@pytest.mark.parametrize(
    "mesh_shape", [{"cp": 2, "tp": 2}, {"dp": 2, "cp": 1, "tp": 2}], ids=["beside cp", "beside dp, cp of one rank"]
)
def test_heads_may_be_sharded_beside_the_sequence(mesh_shape: dict[str, int], four_processes: RankProcesses):
    expected = truth(dense, range(mesh_shape.get("dp", 1)))
    for grads in four_processes.run(gradients_on_rank, mesh_shape, as_tp):
        assert_equal(grads, expected)


# -- the compiler


def compiled_on_rank(group: dist.ProcessGroup, backend: str) -> tuple[list[int], dict[str, Tensor]]:
    """(graphs made after one step and after another with a new plan, gradients of the latter)."""
    counter = CompileCounterWithBackend(backend)

    def as_compiled(model: Model, mesh: DeviceMesh, mean: DeviceMesh) -> nn.Module:
        for block in model.blocks:
            block.compile(fullgraph=True, backend=counter)
        return as_fsdp(model, mesh, mean)

    torch._dynamo.reset()
    model, shares = wrapped(DP_CP, as_compiled, attend_without_slopes)
    counts = []
    for index in (1 - shares.row, shares.row):
        model.zero_grad()
        backward_of(model, index, shares)
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    return counts, whole_gradients(model)


@pytest.mark.by_day(3)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_blocks_may_be_compiled_and_a_new_plan_compiles_nothing(backend: str, four_processes: RankProcesses):
    expected = truth(dense_without_slopes, range(2))
    for counts, grads in four_processes.run(compiled_on_rank, backend, timeout=200.0):
        assert counts == [2, 2]
        assert_equal(grads, expected)


# -- activation checkpointing


def save_attention(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    saved = op == torch.ops.cpflex.attention.default
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def checkpointed(model: Model, mesh: DeviceMesh, mean: DeviceMesh, selectively: bool) -> nn.Module:
    contexts = {"context_fn": partial(create_selective_checkpoint_contexts, save_attention)} if selectively else {}
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **contexts)
    return as_fsdp(model, mesh, mean)


@contextmanager
def counted_exchanges() -> Iterator[list[int]]:
    """Numbers of messages that this rank sends, one for each exchange with any."""
    exchange, sent = ProcessLinks.exchange, []

    def counting(links, sends, receives):
        sent.extend([len(sends)] if sends else [])
        return exchange(links, sends, receives)

    ProcessLinks.exchange = counting
    try:
        yield sent
    finally:
        ProcessLinks.exchange = exchange


def messages_and_gradients(group: dist.ProcessGroup, wrap: Wrap) -> tuple[list[int], dict[str, Tensor]]:
    with counted_exchanges() as sent:
        return sent, gradients_on_rank(group, {"dp": 2, "cp": 2}, wrap)


def test_selective_checkpointing_exchanges_once(four_processes: RankProcesses):
    wraps = {
        "none": as_fsdp,
        "whole": partial(checkpointed, selectively=False),
        "selective": partial(checkpointed, selectively=True),
    }
    results = {name: four_processes.run(messages_and_gradients, wrap) for name, wrap in wraps.items()}
    expected = truth(dense, range(2))
    for rank in range(4):
        num_sent = {name: len(result[rank][0]) for name, result in results.items()}
        assert num_sent["none"] > 0
        assert num_sent["selective"] == num_sent["none"] < num_sent["whole"]
        for result in results.values():
            assert_equal(result[rank][1], expected)


# -- gradient accumulation


def accumulated_on_rank(group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Two microbatches, each with a plan of its own, both forward before either goes backward."""
    model, shares = wrapped(DP_CP, as_fsdp, attend_over_ranks)
    batches = [sharded(index, shares) for index in (shares.row, 1 - shares.row)]
    num_items = sum(num_labels(labels, shares.mean) for *_, labels in batches)
    losses = [
        cross_entropy(
            model(tokens, position_ids, plan), labels, None, num_items=num_items, averaged_over=shares.mean.size()
        )
        for plan, tokens, position_ids, labels in batches
    ]
    for is_last, loss in enumerate(losses):
        model.set_requires_gradient_sync(bool(is_last))
        loss.backward()
    return whole_gradients(model)


def test_microbatches_accumulate_with_two_plans_in_flight(four_processes: RankProcesses):
    """Every row is computed twice: the mean is that of the two rows."""
    expected = truth(dense, range(2))
    for grads in four_processes.run(accumulated_on_rank):
        assert_equal(grads, expected)


# -- mixed precision


def in_bf16(model: Model, mesh: DeviceMesh, mean: DeviceMesh) -> nn.Module:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return as_fsdp(model, mesh, mean, mp_policy=policy)


def test_bf16_over_ranks_is_as_exact_as_bf16_on_one(four_processes: RankProcesses):
    expected, alike = truth(dense, range(2)), truth(dense, range(2), torch.bfloat16)

    def error(grads: dict[str, Tensor]) -> float:
        """Of all gradients as one vector, relative to its norm."""
        wrong, size = (
            torch.cat([grad.flatten() for grad in of]).norm()
            for of in ([grads[name] - grad for name, grad in expected.items()], expected.values())
        )
        return (wrong / size).item()

    for grads in four_processes.run(gradients_on_rank, DP_CP, in_bf16):
        assert {grad.dtype for grad in grads.values()} == {torch.float32}
        assert error(grads) <= 2 * error(alike)
