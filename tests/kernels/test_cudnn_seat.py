"""cuDNN's flex_attention as a backend: the calls that it gets, by a stand-in with its signatures; what is refused."""

from __future__ import annotations

import inspect
from functools import partial
from importlib import metadata
from types import SimpleNamespace

import cudnn_stand_in
import pytest
import torch
from test_flash_seat import call_of, tensors

import cpflex
from cases import LAYOUTS, MASKS, Problem
from cpflex.kernels import cudnn
from cpflex.kernels.row_intervals import row_intervals
from cpflex.mods.evaluate import evaluate
from cpflex.testing import run_ranks
from oracle import assert_within_budget
from runs import assemble, attend_on_rank


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn, "library", lambda: cudnn_stand_in.LIBRARY)
    monkeypatch.setattr(cudnn, "architecture_of", lambda device: 90)
    attention = partial(cpflex.flex_attention, kernel_options={"BACKEND": "CUDNN"})
    monkeypatch.setattr(cpflex, "flex_attention", attention)


PROBLEMS = [
    Problem("full", "none", 127, "gqa", "d16", "bf16", "contiguous", "auto", 1),
    Problem("nothing", "none", 5, "mha", "d16", "bf16", "contiguous", "auto", 1, batch_size=1),
    Problem("causal", "none", 1000, "gqa", "d16", "bf16", "zigzag", "ring", 2, batch_size=1),
    Problem("doc_sliding_causal", "none", 321, "mha", "d16dv24", "fp16", "balanced", "direct", 3),
    Problem("window_per_head", "none", 300, "mqa", "d24", "bf16", "striped", "ring:both", 4),
    Problem("padding", "none", 127, "gqa", "d16", "bf16", "zigzag", "ring", 2),
    Problem("doc_per_batch", "none", 300, "gqa", "d16", "fp16", "zigzag", "auto", 4, ulysses_size=2),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_the_seat_computes_what_one_dense_attention_does(stand_in: None, problem: Problem):
    results = run_ranks(partial(attend_on_rank, problem=problem), problem.world_size, timeout=60)
    assert_within_budget(assemble(results), problem.dense(torch.float32), problem.dense())


INTERVALS = ["full", "causal", "doc_full", "doc_sliding_causal", "two_sided", "prefix_lm", "future_only", "nothing"]
INTERVALS += ["window_per_head", "doc_per_batch", "padding"]


@pytest.mark.parametrize("mask", INTERVALS)
def test_the_intervals_of_a_step_are_the_keys_that_the_mask_shows(mask: str):
    problem = Problem(mask=mask, seq_len=500, heads="gqa", batch_size=3)
    for layout in LAYOUTS.values():
        plan = cpflex.make_plan(
            MASKS[mask](problem),
            500,
            rank=1,
            world_size=3,
            layout=layout,
            batch_size=3,
            num_heads=4,
            schedule=cpflex.ring,
        )
        kind = plan.kinds["mask"]
        for step in kind.steps:
            q_idx, kv_idx = step.tile_mask.q_positions.long(), step.tile_mask.kv_positions.long()
            if not len(kv_idx):
                continue
            b, h = torch.arange(3).view(-1, 1, 1, 1), torch.arange(4).view(-1, 1, 1)
            inputs = {"b": b, "h": h, "q_idx": q_idx[:, None], "kv_idx": kv_idx}
            seen = evaluate(kind.mask.graph, kind.mask.captured, inputs)[0].expand(3, 4, len(q_idx), len(kv_idx))
            intervals = row_intervals(step.tile_mask, kind.mask, 3, 4)
            q, k = torch.empty(3, len(q_idx), 4, 1), torch.empty(3, len(kv_idx), 2, 1)
            assert torch.equal(cudnn_stand_in.create_mask_plan(intervals, q, k, k).seen.expand(seen.shape), seen)


REFUSED = {
    "fp32": (tensors(dtype=torch.float32), call_of(), "takes bfloat16 and float16; got torch.float32"),
    "a head dim of 160": (tensors(dim=160, v_dim=160), call_of(), r"got \(160, 160\)"),
    "a score_mod": (tensors(), call_of(score=lambda s, b, h, q, k: s * 2), "takes no score_mod"),
    "a negative scale": (tensors(), call_of(scale=-1.0), "needs a scale above 0; got -1.0"),
    "the largest scores": (tensors(), call_of(wants_max=True), "does not know the largest scores"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernels_cannot_is_refused_by_name(stand_in: None, name: str):
    (q, _, v), call, said = REFUSED[name]
    with pytest.raises(NotImplementedError, match=said):
        cudnn.require_support(q, v.shape[3], call)


def test_gradients_of_differing_head_dims_under_shared_keys_are_refused(stand_in: None):
    with pytest.raises(NotImplementedError, match=r"no gradient on sm_90 where .* 4 heads on 2, and 192 and 128"):
        cudnn.require_backward(*tensors(kv_heads=2, dim=192, v_dim=128))


def test_a_mask_of_other_rows_than_intervals_is_refused(stand_in: None):
    plan = cpflex.make_plan(lambda b, h, q, k: (q - k) % 5 == 0, 208)
    q = torch.randn(1, 2, 208, 16, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="needs a mask under which each query sees one interval of keys"):
        cpflex.flex_attention(q, q, q, block_mask=plan)


@pytest.mark.parametrize("capability", [0, 80, 101, 120])
def test_another_gpu_is_refused(monkeypatch: pytest.MonkeyPatch, capability: int):
    monkeypatch.setattr(cudnn, "capability_of", lambda device: capability)
    with pytest.raises(NotImplementedError, match="needs sm_90, sm_100 or sm_103"):
        cudnn.architecture_of(torch.device("cpu"))


def test_a_package_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch):
    def missing(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(cudnn.metadata, "version", missing)
    with pytest.raises(NotImplementedError, match="nvidia-cudnn-frontend, which is not installed"):
        cudnn.library.__wrapped__()


def test_a_release_with_other_arguments_is_refused():
    calls = SimpleNamespace(**vars(cudnn_stand_in.LIBRARY) | {"backward": lambda q_tensor, mask_plan: None})
    with pytest.raises(NotImplementedError, match=r"in 9.9, backward takes no .'deterministic', 'dlse_tensor'"):
        cudnn.require_arguments(calls, "9.9")


def is_installed() -> bool:
    try:
        return metadata.version(cudnn.PACKAGE) == cudnn.READ
    except metadata.PackageNotFoundError:
        return False


@pytest.mark.skipif(not is_installed(), reason=f"{cudnn.PACKAGE} {cudnn.READ} is not installed")
@pytest.mark.filterwarnings("ignore")
def test_the_stand_in_has_the_signatures_of_the_package():
    found = cudnn.library()
    for name in cudnn.ARGUMENTS:
        ours, theirs = (inspect.signature(getattr(of, name)).parameters for of in (cudnn_stand_in.LIBRARY, found))
        assert [(x.name, x.kind, x.default) for x in ours.values()] == [
            (x.name, x.kind, x.default) for x in theirs.values()
        ]
