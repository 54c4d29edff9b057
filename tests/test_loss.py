"""Shares of one loss: the ranks' sum is what one rank computes, and no label is lost at a shard's edge."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import cpflex
from cpflex.loss import (
    IGNORE_INDEX,
    cross_entropy,
    num_labels,
    sequence_log_probs,
    shift_labels,
    sum_over_ranks,
    token_log_probs,
)
from cpflex.testing import run_ranks
from processes import RankProcesses

SEQ_LEN, VOCAB = 203, 11
CU_SEQLENS = [0, 1, 60, 60, 61, 130, SEQ_LEN]  # with one-token documents and an empty one


def sequence(batch_size: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """logits [B, S, V] and labels [B, S], a fifth of them not to be learned; the same ones on every rank."""
    random = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(batch_size, SEQ_LEN, VOCAB, generator=random)
    labels = torch.randint(VOCAB, (batch_size, SEQ_LEN), generator=random)
    hidden = torch.rand(batch_size, SEQ_LEN, generator=random) < 0.2
    return logits.to(dtype), labels.masked_fill(hidden, IGNORE_INDEX)


def document_by_document(labels: Tensor, cu_seqlens: list[int]) -> Tensor:
    """The readable twin of `shift_labels`."""
    shifted = torch.full_like(labels, IGNORE_INDEX)
    for start, stop in pairwise(cu_seqlens):
        for i in range(start, stop - 1):
            shifted[..., i] = labels[..., i + 1]
    return shifted


# -- shift_labels


@pytest.mark.parametrize("shape", ["[S]", "[B, S]"])
@pytest.mark.parametrize("given", [list, torch.tensor, lambda cu: torch.tensor(cu, dtype=torch.int32)])
def test_each_document_is_shifted_by_itself(shape: str, given: Callable[[list[int]], Any]):
    labels = sequence()[1]
    labels = labels if shape == "[B, S]" else labels[0]
    shifted = shift_labels(labels, given(CU_SEQLENS))
    assert torch.equal(shifted, document_by_document(labels, CU_SEQLENS))
    assert shifted.dtype == labels.dtype


def test_without_documents_only_the_last_token_predicts_nothing():
    labels = sequence()[1]
    assert torch.equal(shift_labels(labels), document_by_document(labels, [0, SEQ_LEN]))


def test_rows_may_be_packed_differently():
    labels, cuts = sequence()[1], [[0, 5, 6, SEQ_LEN], [0, 100, 202, SEQ_LEN]]
    ids = torch.stack([torch.arange(3).repeat_interleave(torch.tensor(cu).diff()) for cu in cuts])
    rows = torch.stack([document_by_document(row, cu) for row, cu in zip(labels, cuts, strict=True)])
    assert torch.equal(shift_labels(labels, doc_ids=ids), rows)
    assert torch.equal(shift_labels(labels, doc_ids=ids[0]), document_by_document(labels, cuts[0]))


def test_the_labels_themselves_are_not_changed():
    labels = sequence()[1]
    before = labels.clone()
    shift_labels(labels, CU_SEQLENS)
    assert torch.equal(labels, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cu_seqlens": [0, 5]}, "from 0 to the 6"),
        ({"cu_seqlens": [1, 6]}, "from 0 to the 6"),
        ({"cu_seqlens": [0, 4, 3, 6]}, "from 0 to the 6"),
        ({"cu_seqlens": [6]}, "from 0 to the 6"),
        ({"cu_seqlens": [[0, 6]]}, "from 0 to the 6"),
        ({"cu_seqlens": [0, 6], "doc_ids": torch.zeros(6)}, "not both"),
        ({"doc_ids": torch.zeros(5)}, "doc_ids must be"),
        ({"labels": torch.zeros(6)}, "integers"),
        ({"labels": torch.zeros(1, 1, 6, dtype=torch.int64)}, r"\[S\] or \[B, S\]"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        shift_labels(**{"labels": torch.arange(6)} | options)


# -- shares


def plan_on(group: Any) -> cpflex.Plan:
    mask = cpflex.causal() & cpflex.document(cu_seqlens=CU_SEQLENS)
    return cpflex.make_plan(mask, SEQ_LEN, group)


def share_on(group: Any, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A rank's share, and its gradient on global tokens."""
    logits, labels = sequence(dtype=dtype)
    plan = plan_on(group)
    labels = plan.shard(shift_labels(labels, CU_SEQLENS), dim=1, pad_value=IGNORE_INDEX)
    logits.requires_grad_()
    share = cross_entropy(plan.shard(logits, dim=1, pad_value=0.0), labels, group)
    (grad,) = torch.autograd.grad(share, logits)
    return {"share": share.detach(), "grad": grad, "count": num_labels(labels, group)}


def mean_on_one(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, int]:
    logits, labels = sequence(dtype=dtype)
    labels = document_by_document(labels, CU_SEQLENS)
    leaf = logits.double().requires_grad_()
    mean = F.cross_entropy(leaf.flatten(0, 1), labels.flatten())
    return mean.detach(), torch.autograd.grad(mean, leaf)[0], int((labels != IGNORE_INDEX).sum())


def assert_shares_of_the_mean(results: list[dict[str, Tensor]]) -> None:
    mean, grad, count = mean_on_one()
    torch.testing.assert_close(torch.stack([r["share"] for r in results]).sum().double(), mean, rtol=1e-6, atol=1e-7)
    total = torch.stack([r["grad"] for r in results]).sum(dim=0)
    torch.testing.assert_close(total.double(), grad, rtol=1e-5, atol=1e-9)
    assert [int(r["count"]) for r in results] == [count] * len(results)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_the_shares_of_all_ranks_sum_to_the_mean(world_size: int):
    assert_shares_of_the_mean(run_ranks(share_on, world_size))


@pytest.mark.parametrize("processes", [2, 4], indirect=True)
def test_processes_share_the_mean_too(processes: RankProcesses):
    assert_shares_of_the_mean(processes.run(share_on))


def test_without_a_group_the_share_is_the_mean():
    assert_shares_of_the_mean([share_on(None)])


def share_over_data_and_sequence(group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """(share, count): two rows of data, each on two ranks of its own."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    dp_cp = mesh["dp", "cp"]._flatten("dp_cp")
    row = mesh["dp"].get_local_rank()
    logits, labels = (x[row : row + 1] for x in sequence())
    plan = plan_on(mesh["cp"])
    labels = plan.shard(shift_labels(labels, CU_SEQLENS), dim=1, pad_value=IGNORE_INDEX)
    share = cross_entropy(plan.shard(logits, dim=1, pad_value=0.0), labels, dp_cp, averaged_over=dp_cp.size())
    return share, num_labels(labels, dp_cp)


def test_over_data_and_sequence_the_mean_of_the_scaled_shares_is_the_mean(four_processes: RankProcesses):
    mean, _, count = mean_on_one()
    shares, counts = zip(*four_processes.run(share_over_data_and_sequence), strict=True)
    torch.testing.assert_close(torch.stack(shares).mean().double(), mean, rtol=1e-6, atol=1e-7)
    assert list(map(int, counts)) == [count] * 4


def test_microbatches_that_share_a_count_weigh_by_their_labels():
    mean, _, count = mean_on_one()
    logits, labels = sequence()
    labels = shift_labels(labels, CU_SEQLENS)
    shares = [cross_entropy(logits[i], labels[i], None, num_items=count) for i in range(2)]
    torch.testing.assert_close(sum(shares).double(), mean, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("num_labels_elsewhere", [0, 5])
def test_a_rank_without_labels_has_a_loss_of_zero_with_a_graph(num_labels_elsewhere: int):
    logits = torch.randn(1, 6, VOCAB, requires_grad=True)
    share = cross_entropy(logits, torch.full((1, 6), IGNORE_INDEX), None, num_items=num_labels_elsewhere)
    (grad,) = torch.autograd.grad(share, logits)
    assert share.item() == 0.0
    assert torch.equal(grad, torch.zeros_like(grad))


def test_bf16_logits_lose_nothing_more_than_their_own_rounding():
    """Sums of many terms in bf16 would be off in the second digit; large logits would overflow."""
    found, (mean, _, _) = share_on(None, torch.bfloat16), mean_on_one(torch.bfloat16)
    assert found["share"].dtype == torch.float32
    torch.testing.assert_close(found["share"].double(), mean, rtol=1e-6, atol=1e-7)
    large = torch.tensor([[3e38, -3e38]], dtype=torch.bfloat16)
    assert torch.isfinite(cross_entropy(large, torch.tensor([0]), None))


def test_logits_of_other_tokens_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 5, 11\) for \(1, 6\)"):
        cross_entropy(torch.zeros(1, 5, VOCAB), torch.zeros(1, 6, dtype=torch.int64), None)


# -- label smoothing and z-loss

OPTIONS = {
    "smoothed": {"label_smoothing": 0.1},
    "smoothed all the way": {"label_smoothing": 1.0},
    "z-loss": {"z_loss": 1e-2},
    "both": {"label_smoothing": 0.2, "z_loss": 1e-2},
}


def share_with(group: Any, options: dict[str, float]) -> dict[str, Tensor]:
    logits, labels = sequence()
    plan = plan_on(group)
    labels = plan.shard(shift_labels(labels, CU_SEQLENS), dim=1, pad_value=IGNORE_INDEX)
    logits.requires_grad_()
    share = cross_entropy(plan.shard(logits, dim=1, pad_value=0.0), labels, group, **options)
    return {"share": share.detach(), "grad": torch.autograd.grad(share, logits)[0]}


def smoothed_mean_on_one(label_smoothing: float = 0.0, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """In fp64, from the definitions: the target is spread evenly; Z is the sum of exponentials."""
    logits, labels = sequence()
    labels = document_by_document(labels, CU_SEQLENS)
    leaf = logits.double().requires_grad_()
    rows, targets = leaf[labels != IGNORE_INDEX], labels[labels != IGNORE_INDEX]
    target = (1 - label_smoothing) * F.one_hot(targets, VOCAB) + label_smoothing / VOCAB
    log_z = rows.exp().sum(dim=-1).log()
    mean = (log_z - (target * rows).sum(dim=-1) + z_loss * log_z**2).mean()
    return mean.detach(), torch.autograd.grad(mean, leaf)[0]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_smoothed_labels_and_z_loss_are_shared_too(world_size: int, options: dict[str, float]):
    mean, grad = smoothed_mean_on_one(**options)
    results = run_ranks(lambda group: share_with(group, options), world_size)
    torch.testing.assert_close(torch.stack([r["share"] for r in results]).sum().double(), mean, rtol=1e-6, atol=1e-7)
    total = torch.stack([r["grad"] for r in results]).sum(dim=0)
    torch.testing.assert_close(total.double(), grad, rtol=1e-5, atol=1e-9)


def test_label_smoothing_is_torchs():
    logits, labels = sequence(batch_size=1)
    ours = cross_entropy(logits, labels, None, label_smoothing=0.3)
    torch.testing.assert_close(ours, F.cross_entropy(logits[0], labels[0], label_smoothing=0.3))


def test_the_largest_logits_of_bf16_have_a_finite_z_loss():
    large = torch.tensor([[1e5, -1e5]], dtype=torch.bfloat16)
    assert torch.isfinite(cross_entropy(large, torch.tensor([0]), None, z_loss=1e-4))


@pytest.mark.parametrize("label_smoothing", [-0.1, 1.1, float("nan")])
def test_a_smoothing_that_is_no_part_of_one_is_refused(label_smoothing: float):
    with pytest.raises(ValueError, match="between 0 and 1"):
        cross_entropy(
            torch.zeros(1, 6, VOCAB), torch.zeros(1, 6, dtype=torch.int64), None, label_smoothing=label_smoothing
        )


# -- a number for each whole sequence

BETA = 0.003
PAIRS = (0, 2, 4), (1, 3, 5)
"""Documents of a packed row, chosen and rejected; the second is empty, as is the label of the third."""


def preference(log_probs: Tensor, chosen: Any, rejected: Any) -> Tensor:
    """A loss that is no sum over tokens, different for each sequence."""
    return -F.logsigmoid(BETA * (log_probs[list(chosen)] - log_probs[list(rejected)])).square().sum()


def packed_docs(num_rows: int = 1) -> tuple[Tensor, int]:
    """([B, S], how many): no document begins where another row's does, the first 5 tokens are of none."""
    ids = torch.arange(len(CU_SEQLENS) - 1).repeat_interleave(torch.tensor(CU_SEQLENS).diff())
    rows = torch.stack([ids + row * (len(CU_SEQLENS) - 1) for row in range(num_rows)])
    rows[:, 60:65] = -1
    return rows, num_rows * (len(CU_SEQLENS) - 1)


def preferred_on(group: Any, packed: bool, options: dict[str, Any]) -> dict[str, Tensor]:
    """The whole loss, and this rank's gradient on global tokens."""
    logits, labels = sequence()
    plan = plan_on(group)
    labels = plan.shard(shift_labels(labels, CU_SEQLENS), dim=1, pad_value=IGNORE_INDEX)
    logits.requires_grad_()
    if packed:
        docs, num_docs = packed_docs(2)
        options = options | {"doc_ids": plan.shard(docs, dim=1, pad_value=-1), "num_docs": num_docs}
    log_probs = sequence_log_probs(plan.shard(logits, dim=1, pad_value=0.0), labels, group, **options)
    loss = preference(log_probs, *(PAIRS if packed else ([0], [1])))
    return {"log_probs": log_probs.detach(), "loss": loss.detach(), "grad": torch.autograd.grad(loss, logits)[0]}


def preferred_on_one(packed: bool, average: bool = False, temperature: float = 1.0) -> dict[str, Tensor]:
    """In fp64, sequence by sequence."""
    logits, labels = sequence()
    labels = document_by_document(labels, CU_SEQLENS)
    leaf = logits.double().requires_grad_()
    log_p = (leaf / temperature).log_softmax(dim=-1)
    docs, num_docs = packed_docs(2) if packed else (torch.arange(2)[:, None].expand(2, SEQ_LEN), 2)
    found = []
    for doc in range(num_docs):
        where = (docs == doc) & (labels != IGNORE_INDEX)
        terms = log_p[where].gather(1, labels[where][:, None])
        found.append(terms.sum() / max(1, len(terms)) if average else terms.sum())
    log_probs = torch.stack(found)
    loss = preference(log_probs, *(PAIRS if packed else ([0], [1])))
    return {"log_probs": log_probs.detach(), "loss": loss.detach(), "grad": torch.autograd.grad(loss, leaf)[0]}


LOG_PROBS = {
    "rows": (False, {}),
    "rows, averaged": (False, {"average": True}),
    "rows, of another temperature": (False, {"temperature": 0.7}),
    "packed": (True, {}),
    "packed, averaged": (True, {"average": True, "temperature": 1.3}),
}


def assert_preferred_alike(results: list[dict[str, Tensor]], packed: bool, options: dict[str, Any]) -> None:
    """The same value on every rank; gradients that sum to those of one process, without dividing by anything."""
    expected = preferred_on_one(packed, **options)
    for found in results:
        torch.testing.assert_close(found["log_probs"].double(), expected["log_probs"], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found["loss"].double(), expected["loss"], rtol=1e-5, atol=1e-7)
    total = torch.stack([r["grad"] for r in results]).sum(dim=0).double()
    assert (total - expected["grad"]).norm() <= 1e-5 * expected["grad"].norm()
    assert expected["grad"].any()


@pytest.mark.parametrize(("packed", "options"), LOG_PROBS.values(), ids=LOG_PROBS)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_log_probability_of_a_sequence_is_that_of_one_rank(world_size: int, packed: bool, options: dict[str, Any]):
    results = run_ranks(lambda group: preferred_on(group, packed, options), world_size)
    assert_preferred_alike(results, packed, options)


@pytest.mark.parametrize("processes", [2, 4], indirect=True)
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_processes_agree_on_the_log_probability_too(processes: RankProcesses, packed: bool):
    assert_preferred_alike(processes.run(preferred_on, packed, {}), packed, {})


def test_without_a_group_the_log_probability_is_that_of_the_rows():
    assert_preferred_alike([preferred_on(None, False, {})], False, {})


def summed(group: Any) -> tuple[Tensor, Tensor]:
    """A sum that is used twice, of a tensor that lies across memory, and its gradient on this rank."""
    x = (torch.arange(6.0).view(2, 3) + 10 * group.rank()).requires_grad_()
    total = sum_over_ranks(x.T, group)
    loss = (total * torch.arange(6.0).view(3, 2)).sum() + total.square().sum()
    return total.detach(), torch.autograd.grad(loss, x)[0]


@pytest.mark.parametrize("processes", [2, 4], indirect=True)
def test_the_gradient_of_the_sum_goes_to_each_rank_as_it_is(processes: RankProcesses):
    num_ranks = processes.world_size
    total = num_ranks * torch.arange(6.0).view(2, 3).T + 10 * sum(range(num_ranks))
    for found, grad in processes.run(summed):
        assert torch.equal(found, total)
        assert torch.equal(grad, (torch.arange(6.0).view(3, 2) + 2 * total).T)


def test_the_log_probability_of_a_token_without_label_is_zero_and_has_no_gradient():
    logits = torch.randn(1, 4, VOCAB, requires_grad=True)
    log_probs = token_log_probs(logits, torch.tensor([[3, IGNORE_INDEX, 0, IGNORE_INDEX]]))
    (grad,) = torch.autograd.grad(log_probs.sum(), logits)
    assert torch.equal(log_probs[0, 1::2], torch.zeros(2))
    assert torch.equal(grad[0, 1::2], torch.zeros(2, VOCAB))
    assert (log_probs[0, ::2] < 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shifted_labels": torch.zeros(1, 5, dtype=torch.int64)}, r"\(1, 6, 11\) for \(1, 5\)"),
        ({"temperature": 0.0}, "above 0"),
        ({"num_docs": 2}, "both, or neither"),
        ({"doc_ids": torch.zeros(6, dtype=torch.int64)}, "how many documents all ranks hold"),
        ({"doc_ids": torch.zeros(5, dtype=torch.int64), "num_docs": 1}, r"\(1, 6\); got \(5,\)"),
        ({"doc_ids": torch.arange(6), "num_docs": 5}, "below num_docs=5; got 5"),
    ],
)
def test_sequences_that_do_not_fit_are_refused(options: dict[str, Any], message: str):
    given = {"logits": torch.zeros(1, 6, VOCAB), "shifted_labels": torch.zeros(1, 6, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        sequence_log_probs(**(given | options), group=None)
