"""The plug-in for torchtitan, called as its trainer does: permute, prepare metadata, shard, attend.

Against a stand-in for the interface (`titan`), under both of its names, as no release has it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import Any

import pytest
import titan
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from cpflex.integrations import torchtitan
from processes import RankProcesses

SEQ_LEN, HEADS, KV_HEADS, DIM, WINDOW = 512, 4, 2, 16, 40
CU_SEQLENS = [0, 1, 130, 300, SEQ_LEN]
POSITIONS = torch.cat([torch.arange(b - a) for a, b in pairwise(CU_SEQLENS)])
KINDS = {
    "full": titan.FlexInnerAttention.Config(),
    "sliding": titan.SlidingWindowFlexInnerAttention.Config(window_size=WINDOW),
}
BALANCERS: dict[str, Callable[[], Any]] = {
    "contiguous": lambda: None,
    "head-tail": titan.HeadTailCPLoadBalancer.Config,
    "scattered": titan.ScatteredCPLoadBalancer.Config,
    "cpflex": lambda: torchtitan.load_balancer().Config(),
}

JOINS_SLOTS = pytest.mark.skipif(sys.version_info < (3, 11), reason="configurations of the older seam join slots")


def tensors() -> dict[str, Tensor]:
    """q, k, v, grad_out [S, H, D] and sinks [H]; the same ones on every rank."""
    random = torch.Generator().manual_seed(0)
    heads = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS, "grad_out": HEADS}
    made = {name: torch.randn(SEQ_LEN, h, DIM, generator=random) for name, h in heads.items()}
    return made | {"sinks": torch.randn(HEADS, generator=random)}


def softcap(score, b, h, q_idx, kv_idx):
    return 3 * torch.tanh(score / 3) - 0.01 * (q_idx - kv_idx)


def with_sinks(sinks: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda out, lse: out * torch.sigmoid(lse - sinks).unsqueeze(-1)


def results_on_rank(
    group: dist.ProcessGroup, seam: str, kind: str, balancer: str, with_mods: bool
) -> dict[str, Tensor]:
    """out, dq, dk, dv and d_sinks of the local tokens, and which tokens these are."""
    mesh = init_device_mesh("cpu", (group.size(),), mesh_dim_names=("cp",))
    with titan.installed(seam) as asserted, titan.current_mesh(mesh):
        transform = titan.ContextParallelTransform(inner_attention_map=torchtitan.inner_attention_map())
        config = transform.transform(KINDS[kind])
        masks = {one: KINDS[one].build_attention_metadata(POSITIONS) for one in KINDS}
        permutation = torch.arange(SEQ_LEN)[None]
        if (balancing := BALANCERS[balancer]()) is not None:
            shown = masks if seam == "CPInnerAttention" else masks["full"]  # the newer shows that of the first layer
            permutation = balancing.build(seq_len=SEQ_LEN, attention_metadata=shown).generate_permutation()
        metadata = config._owner.prepare_cp_metadata(
            masks[kind], permutation=None if balancer == "contiguous" else permutation
        )
        mine = permutation[0].view(group.size(), -1)[group.rank()]
        q, k, v, grad_out = (tensors()[name][mine].requires_grad_() for name in ("q", "k", "v", "grad_out"))
        sinks = tensors()["sinks"].requires_grad_()
        options = {"score_mod": softcap, "out_transform": with_sinks(sinks), "scale": 0.3} if with_mods else {}
        out = config.build()(q, k, v, attention_metadata=metadata, enable_gqa=True, **options)
        (out * grad_out).sum().backward()
        spec = (("dp", "cp"), "tp", None)
        local = (len(mine), HEADS)
        assert asserted == [((*local, DIM), "local type", spec), (local, "local type", spec[:-1])]
    d_sinks = torch.zeros(HEADS) if sinks.grad is None else sinks.grad
    return {"tokens": mine, "out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad, "d_sinks": d_sinks}


def dense(kind: str, with_mods: bool) -> dict[str, Tensor]:
    """One process, float64."""
    given = {name: x.double().requires_grad_() for name, x in tensors().items()}
    q, k, v = (given[name].transpose(0, 1) for name in "qkv")
    i = torch.arange(SEQ_LEN)
    document = torch.bucketize(i, torch.tensor(CU_SEQLENS[1:]), right=True)
    seen = (i <= i[:, None]) & (document == document[:, None])
    if kind == "sliding":
        seen &= i > i[:, None] - WINDOW
    scores = q @ k.repeat_interleave(HEADS // KV_HEADS, dim=0).mT * (0.3 if with_mods else DIM**-0.5)
    if with_mods:
        scores = softcap(scores, 0, 0, i[:, None], i)
    scores = scores.masked_fill(~seen, -torch.inf)
    out = (scores.softmax(dim=-1) @ v.repeat_interleave(HEADS // KV_HEADS, dim=0)).transpose(0, 1)
    if with_mods:
        out = with_sinks(given["sinks"])(out, scores.logsumexp(dim=-1).transpose(0, 1))
    (out * given["grad_out"]).sum().backward()
    d_sinks = given["sinks"].grad if with_mods else torch.zeros(HEADS).double()
    return {
        "out": out.detach(),
        "dq": given["q"].grad,
        "dk": given["k"].grad,
        "dv": given["v"].grad,
        "d_sinks": d_sinks,
    }


@pytest.mark.parametrize(
    ("processes", "seam"),
    [(2, "CPAttention"), (4, "CPAttention"), pytest.param(2, "CPInnerAttention", marks=JOINS_SLOTS)],
    indirect=["processes"],
)
@pytest.mark.parametrize("with_mods", [False, True], ids=["plain", "score_mod and sinks"])
@pytest.mark.parametrize("balancer", BALANCERS)
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_compute_what_one_would(kind: str, balancer: str, with_mods: bool, seam: str, processes: RankProcesses):
    results = processes.run(results_on_rank, seam, kind, balancer, with_mods)
    order = torch.cat([r["tokens"] for r in results]).argsort()
    expected = dense(kind, with_mods)
    for name in ("out", "dq", "dk", "dv"):
        whole = torch.cat([r[name] for r in results])[order]
        torch.testing.assert_close(
            whole.double(), expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    d_sinks = torch.stack([r["d_sinks"] for r in results]).sum(dim=0)
    torch.testing.assert_close(d_sinks.double(), expected["d_sinks"], rtol=1e-5, atol=1e-5)


def test_the_balancer_balances_all_kinds_and_keeps_runs_together():
    masks = {kind: config.build_attention_metadata(POSITIONS).mask_mod for kind, config in KINDS.items()}
    permutation = torchtitan.balanced_permutation(masks, SEQ_LEN, 4)
    assert permutation.shape == (1, SEQ_LEN)
    assert permutation[0].sort().values.equal(torch.arange(SEQ_LEN))
    for mask in masks.values():
        i = torch.arange(SEQ_LEN)
        work = mask(0, 0, i[:, None], i).sum(dim=1)[permutation[0]].view(4, -1).sum(dim=1)
        contiguous = mask(0, 0, i[:, None], i).sum(dim=1).view(4, -1).sum(dim=1)
        assert work.max() < contiguous.max()


# -- refusals


def refuse(group: dist.ProcessGroup, what: str) -> str:
    mesh = init_device_mesh("cpu", (group.size(),), mesh_dim_names=("cp",))
    mask = KINDS["full"].build_attention_metadata(POSITIONS)
    every_other = torch.arange(SEQ_LEN).view(-1, 2).T.reshape(1, -1)
    with titan.installed(), titan.current_mesh(mesh):
        over_ranks = torchtitan.inner_attention_map()[titan.FlexInnerAttention]
        try:
            match what:
                case "rows":
                    over_ranks.prepare_cp_metadata(mask, permutation=torch.arange(SEQ_LEN).expand(2, -1))
                case "single tokens":
                    over_ranks.prepare_cp_metadata(mask, permutation=every_other)
                case "no BlockMask":
                    over_ranks.prepare_cp_metadata({"full": mask}, permutation=None)
                case "cross attention":
                    cross = titan.create_block_mask(lambda b, h, q, k: q >= 0, 1, None, 256, SEQ_LEN, device="cpu")
                    over_ranks.prepare_cp_metadata(cross, permutation=None)
                case _:
                    metadata = over_ranks.prepare_cp_metadata(mask, permutation=None)
                    q = torch.randn(SEQ_LEN // group.size(), 1, DIM)
                    options = {"kernel options": {"kernel_options": {"BLOCK_M": 64}}}.get(what, {})
                    module = over_ranks.Config(**options).build()
                    arguments = {"an unknown argument": {"dropout": 0.1}}.get(what, {})
                    module(q, q, q, attention_metadata=mask if what == "a BlockMask" else metadata, **arguments)
        except (ValueError, TypeError, NotImplementedError) as error:
            return str(error)
    return ""


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("rows", "all rows alike"),
        ("single tokens", "fewer than 16 tokens"),
        ("no BlockMask", "must be a BlockMask; got dict"),
        ("cross attention", "256 queries, 512 keys"),
        ("kernel options", "BLOCK_M"),
        ("an unknown argument", r"dropout"),
        ("a BlockMask", "must come from prepare_cp_metadata"),
    ],
)
def test_what_cannot_be_honoured_is_refused(what: str, message: str, two_processes: RankProcesses):
    for said in two_processes.run(refuse, what):
        assert message in said


def test_without_a_mesh_there_is_no_group():
    mask = KINDS["full"].build_attention_metadata(POSITIONS)
    with titan.installed():
        over_ranks = torchtitan.inner_attention_map()[titan.FlexInnerAttention]
        with pytest.raises(RuntimeError, match="no context-parallel axis"):
            over_ranks.prepare_cp_metadata(mask, permutation=None)


def test_a_balancer_needs_a_block_mask_and_a_length_without_padding():
    with titan.installed(), pytest.raises(ValueError, match="at least one kind"):
        torchtitan.load_balancer().Config().build(seq_len=SEQ_LEN, attention_metadata={"linear": object()})
    with pytest.raises(ValueError, match="multiple of 128"):
        torchtitan.balanced_permutation({"full": lambda b, h, q, k: q >= k}, 500, 2)


# -- binding


@pytest.mark.parametrize(
    ("seam", "home"),
    [
        pytest.param(seam, home, marks=JOINS_SLOTS if seam == "CPInnerAttention" else ())
        for seam in torchtitan.SEAMS
        for home in torchtitan.HOMES[seam]
    ],
)
def test_the_seam_is_found_under_both_names_in_all_homes(seam: str, home: str):
    with titan.installed(seam, cp_home=f"torchtitan.{home}"):
        found = torchtitan.inner_attention_map()
        titan.ContextParallelTransform(inner_attention_map=found).transform(KINDS["sliding"])
    assert set(found) == {titan.FlexInnerAttention, titan.SlidingWindowFlexInnerAttention}
    assert [x.__name__ for x in found.values()] == ["CpflexFlexInnerAttention", "CpflexSlidingWindowFlexInnerAttention"]


@JOINS_SLOTS
def test_where_both_names_are_the_attentions_are_both():
    class Derived(titan.CPAttention):
        pass

    with titan.installed(CPInnerAttention=Derived):
        for found in torchtitan.inner_attention_map().values():
            assert issubclass(found, Derived)


def test_classes_are_made_once():
    with titan.installed():
        assert torchtitan.inner_attention_map() == torchtitan.inner_attention_map()
        assert torchtitan.load_balancer() is torchtitan.load_balancer()


def test_another_torchtitan_is_refused_with_the_versions_that_fit():
    says = r"no CPAttention and no CPInnerAttention; .* September 2026, under either name, .*no release up to 0\.3\.0"
    with titan.installed(cp_home="torchtitan.elsewhere"), pytest.raises(ImportError, match=says):
        torchtitan.inner_attention_map()


def test_a_seam_that_wants_what_is_not_known_is_refused():
    says = r"CPBatchAttention is to have \['prepare_cp_batch_metadata'\]"
    with titan.installed(cp_attention=titan.CPBatchAttention), pytest.raises(ImportError, match=says):
        torchtitan.inner_attention_map()


@pytest.mark.skipif(sys.version_info >= (3, 11), reason="joins slots")
def test_the_older_seam_is_refused_where_slots_cannot_be_joined():
    with titan.installed("CPInnerAttention"), pytest.raises(ImportError, match=r"use Python 3\.11"):
        torchtitan.inner_attention_map()


def test_an_installed_torchtitan_without_the_seam_or_none_at_all_is_named():
    """What is imported above needs none."""
    try:
        installed = f"torchtitan {version('torchtitan')}"
    except PackageNotFoundError:
        installed = "no torchtitan"
    with pytest.raises(ImportError, match=f"{installed} is installed"):
        torchtitan.inner_attention_map()
