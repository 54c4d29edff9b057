"""The simulator: other libraries as they were studied, cpflex's strategies beside them, the command, the picture."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

import cpflex
from cpflex.__main__ import main
from cpflex.planning.timing import Kernels
from cpflex.seeing.documents import draw_documents
from cpflex.seeing.simulate import Outcome, Workload, simulate, table
from cpflex.seeing.timeline import LANES, bars
from cpflex.topology import Device, Heads, Machine, Topology

MACHINE = Machine(Topology.named("h100-ib"), Device(), Heads())
K = 1 << 10


def documents(seq_len: int) -> cpflex.MaskMod:
    return cpflex.causal() & cpflex.document(cu_seqlens=draw_documents(seq_len, 0))


@cache
def dense(ranks: int, lead_us: float = 1000.0) -> Outcome:
    device = Device(lead_us=lead_us)
    workload = Workload({"mask": cpflex.causal()}, 64 * K, documents={"mask": []})
    return simulate(workload, ranks, MACHINE._replace(device=device))


STUDIED = {
    "all-gather (torch)": 0.82,
    "zigzag ring (TE, RFA)": 0.41,
    "double ring (LoongTrain)": 0.67,
    "Ulysses": 0.76,
    "MagiAttention a2av": 0.51,
    "MagiAttention hierarchical": 0.75,
}
"""64k dense tokens on 32 ranks, as another simulator of the same assumptions has them."""


@pytest.mark.parametrize("peer", STUDIED)
def test_other_libraries_fare_as_an_independent_simulator_has_them(peer: str):
    outcome = dense(32, lead_us=0.0)
    (found,) = (s for s in outcome.strategies if s.name == peer)
    assert outcome.efficiency(found) == pytest.approx(STUDIED[peer], abs=0.011)


def test_cpflex_is_at_or_above_every_other_and_far_above_itself_without_a_topology():
    for ranks, least in ((8, 0.95), (32, 0.89)):
        outcome = dense(ranks)
        ours, theirs = (outcome.efficiency(outcome.best(ours=whose)) for whose in (True, False))
        assert round(ours, 3) >= max(least, round(theirs, 3))
    (plain,) = (s for s in dense(32).strategies if "topology not given" in s.name)
    assert dense(32).efficiency(plain) < 0.5


def test_what_is_ideal_is_the_products_alone():
    outcome = dense(32)
    tiles = 64 * K // 128
    pairs = tiles * (tiles + 1) / 2 * 128**2
    assert outcome.ideal_us == pytest.approx(pairs / 32 * 4 * 32 * 128 * 3.5 / 500e6)
    for strategy in outcome.strategies:
        assert outcome.efficiency(strategy) < 1
        assert 0 <= strategy.nic_use < 1
        assert 0 <= strategy.exposed_us < strategy.total_us


def test_kinds_are_weighed_and_may_share_heads_among_different_numbers_of_ranks():
    masks = {"full": documents(128 * K), "sliding": documents(128 * K) & cpflex.sliding_window(512)}
    found = simulate(Workload(masks, 128 * K, {"full": 1.0, "sliding": 5.0}), 16, MACHINE)
    for strategy in found.strategies:
        one = {kind: passes.seconds * 1e6 for kind, passes in strategy.passes.items()}
        assert strategy.total_us == pytest.approx(one["full"] + 5 * one["sliding"])
    best = found.best(ours=True)
    assert best.ours is not None
    assert {kind: one.degree for kind, one in best.ours.items()} == {"full": 8, "sliding": 1}
    assert not any("ring (" in strategy.name for strategy in found.strategies), "rings know no windows"


def test_the_table_has_a_line_for_each_strategy_and_an_arrow_for_the_best():
    workload = Workload({"mask": cpflex.causal()}, 64 * K)
    text = table(workload, 32, MACHINE, dense(32), everything=True)
    lines = text.splitlines()[5:]
    assert len(lines) == len(dense(32).strategies)
    marked = [line for line in lines if line.startswith("->")]
    assert len(marked) == 1
    assert dense(32).best(ours=True).name in marked[0]
    assert "a model, not a measurement" in text
    assert len(table(workload, 32, MACHINE, dense(32)).splitlines()) < len(text.splitlines())


def test_bars_are_what_a_rank_does_and_when():
    best = dense(32).best(ours=True)
    for timeline in best.passes["mask"][:2]:
        drawn = list(bars(timeline, 3))
        assert {bar.lane for bar in drawn} == set(LANES)
        kernels = [bar.end - bar.start for bar in drawn if bar.lane == "kernels"]
        assert sum(kernels) == pytest.approx(float(timeline.busy[3]))
        assert len(kernels) == sum(isinstance(step, Kernels) for step in timeline.program)
        assert all(0 <= bar.start < bar.end <= timeline.makespan + 1e-12 for bar in drawn)


WHERE = ["--seq-len", "32k", "--ranks", "16", "--gpus-per-node", "4"]


def test_the_command_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "timeline.png"
    links = ["--links", "nvlink:300,ib:20", "--tflops", "400", "--heads", "16,4,64", "--plot", str(path)]
    main(["simulate", "--mask", "causal,docs:3", *WHERE, *links])
    said = capsys.readouterr().out
    assert path.read_bytes().startswith(b"\x89PNG")
    for words in (
        "4 nodes of 4: 300 GB/s inside, 20 GB/s",
        "400 TFLOP/s, 16/4 heads of 64",
        "zigzag ring",
        f"wrote {path}",
    ):
        assert words in said
    topology = replace(MACHINE.topology, gpus_per_node=4, intra_gb_per_s=300.0, inter_gb_per_s=20.0)
    machine = Machine(topology, Device(tflops=400.0), Heads(16, 4, 64))
    mask = cpflex.causal() & cpflex.document(cu_seqlens=draw_documents(32 * K, 3))
    best = simulate(Workload({"mask": mask}, 32 * K), 16, machine).best(ours=True)
    assert re.search(rf"^-> {re.escape(best.name)} +{best.forward_us / 1000:.2f} ms", said, flags=re.M)


def test_kinds_and_weights_reach_the_simulator(capsys: pytest.CaptureFixture[str]):
    kinds = ["--mask", "full=causal", "--mask", "sliding=causal,window:512", "--weights", "full=1,sliding=5"]
    main(["simulate", *kinds, *WHERE, "--all"])
    said = capsys.readouterr().out
    assert "layers: 1 x full, 5 x sliding" in said
    assert "zigzag" not in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--links", "nvlink=300"], "--links must look like nvlink:370,ib:47"),
        (["--links", "warp:300"], "--links must look like"),
        (["--heads", "32x8"], "--heads must look like 32,8,128"),
        (["--topology", "h200"], "there is no 'h200'; there are h100-ib"),
        (["--tflops", "-1"], "tflops must be a positive number"),
    ],
)
def test_wrong_options_are_refused_by_name(options: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        main(["simulate", "--mask", "causal", *WHERE, *options])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
