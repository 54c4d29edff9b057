"""FlashAttention-4 as a backend: the calls that it gets, by a stand-in with its signatures; what is refused; and, where it
is installed, that its kernels compile with our mods.
"""

from __future__ import annotations

import inspect
from functools import partial
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import flash_stand_in
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import cpflex
from another_process import another_process
from cases import Problem
from cpflex.kernels import Call, flash
from cpflex.kernels.parts import merge
from cpflex.mods.trace import UnsupportedMod, trace_mask_mod, trace_score_mod
from cpflex.testing import run_ranks
from oracle import assert_within_budget
from processes import RankProcesses
from runs import assemble, attend_on_rank


class Detached(Problem):
    """Its score_mod captures no tensor that wants a gradient."""

    def captured(self):
        return [x.detach() for x in super().captured()]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "library", lambda: flash_stand_in.LIBRARY)
    monkeypatch.setattr(flash, "architecture_of", lambda device: 90)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    attention = partial(cpflex.flex_attention, kernel_options={"BACKEND": "FLASH"})
    monkeypatch.setattr(cpflex, "flex_attention", attention)


PROBLEMS = [
    Detached("full", "gelu", 127, "gqa", "d16", "bf16", "contiguous", "auto", 1),
    Detached("nothing", "none", 5, "mha", "d16", "bf16", "contiguous", "auto", 1, batch_size=1),
    Detached("causal", "none", 1000, "gqa", "d16", "bf16", "zigzag", "ring", 2, batch_size=1),
    Detached("doc_sliding_causal", "softcap", 321, "mha", "d16dv24", "fp16", "balanced", "direct", 3),
    Detached("window_per_head", "alibi", 300, "mqa", "d24", "bf16", "striped", "ring:both", 4),
    Detached("padding", "key_bias", 127, "gqa", "d16", "bf16", "zigzag", "ring", 2),
    Detached("doc_per_batch", "log_position", 300, "gqa", "d16", "fp16", "zigzag", "auto", 4, ulysses_size=2),
    Detached("eviction", "relative_bias", 321, "mha", "d16", "bf16", "contiguous", "gather", 2),
    Detached("tree_windowed", "temperature", 300, "mha", "d16", "bf16", "balanced", "direct", 2, batch_size=1),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_the_seat_computes_what_one_dense_attention_does(stand_in: None, problem: Problem):
    results = run_ranks(partial(attend_on_rank, problem=problem), problem.world_size, timeout=60)
    reference, exact = problem.dense(torch.float32), problem.dense()
    reference.d_captured = exact.d_captured = []
    assert_within_budget(assemble(results), reference, exact)


def test_a_step_without_pairs_calls_no_kernel(stand_in: None, monkeypatch: pytest.MonkeyPatch):
    plan = cpflex.make_plan(lambda b, h, q, k: q < 0, 208)
    q, k, v = (torch.randn(1, 2, 208, 16, dtype=torch.bfloat16) for _ in range(3))
    cpflex.flex_attention(q, k, v, block_mask=plan)  # compiles
    monkeypatch.setattr(flash, "library", lambda: 1 / 0)
    call, tile_mask = call_of(), plan.kinds["mask"].steps[0].tile_mask
    out, lse, _ = flash.attend_and_finish(q, k, v, tile_mask, call, None)
    assert not out.any()
    assert (lse == -torch.inf).all()
    dq = torch.full_like(q, torch.nan)
    dk, dv = flash.attend_backward(q, k, v, out, lse, lse, tile_mask, call, dq, [])
    assert not (dq.any() or dk.any() or dv.any())


def test_merging_parts_is_attending_to_all_their_keys():
    def part(keys: int, seen: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scores = torch.randn(1, 2, 9, keys).masked_fill(torch.rand(1, 2, 9, keys) > seen, -torch.inf)
        v, lse = torch.randn(1, 2, keys, 4), scores.logsumexp(dim=-1)
        return scores, v, (scores - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)).exp() @ v, lse

    torch.manual_seed(3)
    parts = [part(5, seen=0.2), part(1), part(7, seen=0.0), part(12, seen=0.9)]
    state = cpflex.kernels.empty(torch.zeros(1, 2, 9, 4), 4)
    for _, _, out, lse in parts:
        merge(state, out, lse)
    out, lse = cpflex.kernels.finish(state, torch.float32)
    scores, v = torch.cat([x[0] for x in parts], dim=-1), torch.cat([x[1] for x in parts], dim=2)
    torch.testing.assert_close(out, scores.softmax(dim=-1) @ v)
    torch.testing.assert_close(lse, scores.logsumexp(dim=-1))


# -- refusals


def call_of(**changes: Any) -> Call:
    score = trace_score_mod(changes.pop("score")).graph if "score" in changes else None
    return Call(trace_mask_mod(changes.pop("mask", cpflex.causal())), changes.pop("scale", 0.3), score, **changes)


def tensors(heads: int = 4, kv_heads: int = 4, dim: int = 64, v_dim: int = 64, dtype=torch.bfloat16) -> list[Tensor]:
    return [torch.zeros(1, h, 8, d, dtype=dtype) for h, d in ((heads, dim), (kv_heads, dim), (kv_heads, v_dim))]


FORWARD = {
    "fp32": (tensors(dtype=torch.float32), call_of(), "takes bfloat16 and float16; got torch.float32"),
    "a head dim of 20": (tensors(dim=20, v_dim=20), call_of(), "multiples of 8 up to 128.*got 20 and 20"),
    "a head dim of 160": (tensors(dim=160, v_dim=160), call_of(), "192/128 and 256 on sm_90; got 160 and 160"),
    "a negative scale": (tensors(), call_of(scale=-1.0), "needs a scale above 0; got -1.0"),
    "the largest scores": (tensors(), call_of(wants_max=True), "does not know the largest scores"),
    "a float remainder": (tensors(), call_of(score=lambda s, b, h, q, k: s % 3.0), "remainder .float32. has no CuTe form"),
    "a mask in float64": (
        tensors(),
        call_of(mask=lambda b, h, q, k: q.double() * 0.3 > k),
        "float64. has no CuTe form",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORWARD)
def test_what_the_kernels_cannot_is_refused_by_name(stand_in: None, name: str):
    (q, _, v), call, said = FORWARD[name]
    with pytest.raises((NotImplementedError, UnsupportedMod), match=said):
        flash.require_support(q, v.shape[3], call)


BACKWARD = {
    "a captured tensor that wants a gradient": (tensors(), call_of(wanted=(0,)), "gives no gradient to tensors that"),
    "head dims that differ under shared keys": (
        tensors(kv_heads=2, dim=192, v_dim=128), call_of(), "no gradient on sm_90 where .* 4 heads on 2, and 192 and 128"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BACKWARD)
def test_gradients_that_the_kernels_cannot_are_refused_by_name(stand_in: None, name: str):
    made, call, said = BACKWARD[name]
    with pytest.raises(NotImplementedError, match=said):
        flash.require_backward(*made, call)


def test_gradients_in_a_fixed_order_are_refused():
    assert torch.are_deterministic_algorithms_enabled()
    with pytest.raises(NotImplementedError, match="adds up gradients in no fixed order"):
        flash.require_backward(*tensors(), call_of())


@pytest.mark.parametrize("capability", [0, 1, 80, 89, 120])
def test_another_gpu_is_refused(monkeypatch: pytest.MonkeyPatch, capability: int):
    monkeypatch.setattr(flash, "capability_of", lambda device: capability)
    with pytest.raises(NotImplementedError, match="needs sm_90 or sm_100"):
        flash.architecture_of(torch.device("cpu"))


@pytest.mark.parametrize(("capability", "architecture"), [(90, 90), (100, 100), (103, 100)])
def test_the_gpus_that_it_has_kernels_for(monkeypatch: pytest.MonkeyPatch, capability: int, architecture: int):
    monkeypatch.setattr(flash, "capability_of", lambda device: capability)
    assert flash.architecture_of(torch.device("cpu")) == architecture


def test_a_release_with_other_arguments_is_refused():
    def of_another_release(q, k, v, softmax_scale=None):
        raise AssertionError

    found = SimpleNamespace(forward=of_another_release, backward=flash_stand_in.backward)
    with pytest.raises(NotImplementedError, match=r"in 9.9, of_another_release takes no .'aux_tensors', 'block_sparse"):
        flash.require_arguments(found, "9.9")


def attend_with_packages_on(group: dist.ProcessGroup, ranks: tuple[int, ...]) -> None:
    def missing(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash, "architecture_of", lambda device: 90)
        patch.setattr(flash.metadata, "version", missing)
        if group.rank() in ranks:
            patch.setattr(flash, "library", lambda: flash_stand_in.LIBRARY)
        plan = cpflex.make_plan(cpflex.causal(), 200, group)
        q = torch.randn(1, 2, plan.local_len, 16, dtype=torch.bfloat16)
        cpflex.flex_attention(q, q, q, block_mask=plan, kernel_options={"BACKEND": "FLASH"})


@pytest.mark.parametrize("ranks", [(), (1,)], ids=["nowhere", "on one rank"])
def test_a_package_that_is_not_installed_is_refused_on_all_ranks(two_processes: RankProcesses, ranks: tuple[int, ...]):
    outcomes = two_processes.outcomes(attend_with_packages_on, ranks, timeout=20)
    for rank, outcome in enumerate(outcomes):
        assert isinstance(outcome.error, cpflex.RankMismatch if rank in ranks else NotImplementedError)
        assert "needs the package flash-attn-4, which is not installed" in str(outcome.error)


# -- with the package


def is_installed() -> bool:
    try:
        return metadata.version(flash.PACKAGE) == flash.READ
    except metadata.PackageNotFoundError:
        return False


installed = pytest.mark.skipif(not is_installed(), reason=f"{flash.PACKAGE} {flash.READ} is not installed")


@installed
@pytest.mark.filterwarnings("ignore")  # it warns of what it will rename
def test_the_stand_in_has_the_signatures_of_the_package():
    found = flash.library()
    for ours, theirs in ((flash_stand_in.forward, found.forward), (flash_stand_in.backward, found.backward)):
        ours, theirs = (inspect.signature(fn).parameters for fn in (ours, theirs))
        assert list(ours) == list(theirs)
        assert [x.default for x in ours.values()] == [x.default for x in theirs.values()]
    tables = flash_stand_in.BlockSparseTensors
    assert tables._fields == found.BlockSparseTensors._fields
    assert tables._field_defaults == found.BlockSparseTensors._field_defaults


COMPILED = [
    (90, "doc_causal", "none", 128, 128, "gqa"),
    (90, "causal", "alibi", 64, 64, "gqa"),
    (90, "prefix_lm_per_batch", "softcap", 192, 128, "mha"),
    (90, "sliding17", "relative_bias", 256, 256, "gqa"),
    (90, "neighbourhood_2d", "gelu", 96, 96, "mqa"),
    (100, "doc_causal", "none", 128, 128, "gqa"),
    (100, "causal", "alibi", 64, 64, "gqa"),
    (100, "causal", "softcap", 192, 128, "mha"),
]


@installed
@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED, ids=lambda case: "-".join(map(str, case)))
def test_its_kernels_compile_with_our_mods_ahead_of_time(case: tuple[int, str, str, int, int, str]):
    from flash_ahead import compile_both

    target = {"FLASH_ATTENTION_ARCH": f"sm_{case[0]}", "CUTE_DSL_ARCH": f"sm_{case[0]}a", "FLASH_ATTENTION_NUM_SMS": "132"}  # fmt: skip
    with another_process(**target) as call:
        call(compile_both, *case)
