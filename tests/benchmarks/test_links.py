"""benchmarks/links.py: who sends to whom, what is fitted, and a Topology in the end."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import cpflex
from patience import patience
from processes import RankProcesses

ROOT = Path(__file__).parents[2]
LIKE = cpflex.Topology.named("h100-ib")


def links() -> Any:
    if str(ROOT / "benchmarks") not in sys.path:
        sys.path.append(str(ROOT / "benchmarks"))
    return importlib.import_module("links")


def senders(peers: Any, world_size: int, per_node: int) -> dict[int, int]:
    """Who sends to whom; each is awaited."""
    found = {rank: peers(rank, world_size, per_node) for rank in range(world_size)}
    sent = {(rank, to) for rank, (tos, _) in found.items() for to in tos}
    assert sent == {(source, rank) for rank, (_, sources) in found.items() for source in sources}
    return dict(sorted(sent))


def test_every_message_has_a_sender_and_a_receiver():
    assert senders(links().inside, 4, 2) == {0: 1, 1: 0, 2: 3, 3: 2}
    assert senders(links().inside, 5, 3) == {0: 1, 1: 2, 2: 0, 3: 4, 4: 3}
    assert senders(links().across, 6, 2) == {0: 2, 1: 3, 2: 4, 3: 5, 4: 0, 5: 1}
    assert senders(links().across, 5, 2) == {0: 2, 1: 3, 2: 0, 3: 1}
    assert senders(links().across_alone, 4, 2) == {0: 2, 2: 0}
    assert senders(links().inside, 2, 1) == senders(links().across, 2, 2) == {}
    senders(links().fan(3), 5, 2)


def test_latency_and_rate_are_found_again():
    sizes = [4096 << shift for shift in range(0, 14, 2)]
    latency, rate = links().fit(sizes, [12e-6 + size / 47e9 for size in sizes])
    assert (latency, rate) == (pytest.approx(12.0), pytest.approx(47.0))
    uneven = [(12e-6 + size / 47e9) * (1.05 if place % 2 else 0.95) for place, size in enumerate(sizes)]
    latency, rate = links().fit(sizes, uneven)
    assert (latency, rate) == (pytest.approx(12.0, rel=0.1), pytest.approx(47.0, rel=0.1))


def test_times_that_do_not_grow_are_no_rate():
    with pytest.raises(ValueError, match="4096 bytes took 50 us and 65536 bytes 40 us - measure larger ones"):
        links().fit([4096, 65536], [50e-6, 40e-6])


def test_what_is_not_measured_is_that_of_like():
    one_node = links().topology_from(LIKE, {"inside": (5.0, 300.0)}, [9.0, 9.5, 10.2])
    assert (one_node.intra_latency_us, one_node.intra_gb_per_s, one_node.message_us) == (5.0, 300.0, 0.55)
    assert (one_node.inter_latency_us, one_node.inter_gb_per_s) == (LIKE.inter_latency_us, LIKE.inter_gb_per_s)
    across = links().topology_from(LIKE, {"across": (30.0, 24.0)}, [9.0])
    assert (across.inter_latency_us, across.inter_gb_per_s, across.message_us) == (30.0, 24.0, LIKE.message_us)


def measured(group: dist.ProcessGroup, per_node: int) -> tuple[cpflex.Topology, dict[str, Any], list[str]]:
    """Messages are real; times, on a machine where other tests run, are not."""
    options = links().parse(["--mib", "1", "--repeats", "1", "--ranks-per-node", str(per_node)])
    lines: list[str] = []
    really = links().timed

    def timed(group_links: Any, device: torch.device, peers: Any, per_node: int, num_bytes: int, repeats: int) -> float:
        assert really(group_links, device, peers, per_node, num_bytes, repeats) > 0
        return 20e-6 + num_bytes / 3e9

    with mock.patch.object(links(), "timed", timed):
        return *links().measure(group, torch.device("cpu"), LIKE, options, lines.append), lines


@pytest.mark.parametrize(
    ("processes", "per_node", "patterns", "missing"),
    [
        (4, 2, ["across", "across, one GPU a node", "inside"], []),
        (2, 2, ["inside"], ["across"]),
        (2, 1, ["across"], ["inside"]),
    ],
    indirect=["processes"],
)
def test_processes_measure_their_links_alike(
    processes: RankProcesses, per_node: int, patterns: list[str], missing: list[str]
):
    results = processes.run(measured, per_node)
    (topology, notes, lines), *others = results
    assert all(other[0] == topology for other in others)
    assert topology.gpus_per_node == per_node
    assert topology.intra_gb_per_s == (LIKE.intra_gb_per_s if "inside" in missing else 3.0)
    assert topology.inter_gb_per_s == (LIKE.inter_gb_per_s if "across" in missing else 3.0)
    assert sorted({row["pattern"] for row in notes["rows"] if "peers" not in row["pattern"]}) == patterns
    assert notes["not measured, of --like"] == missing
    assert any("fitted:" in line for line in lines)


@pytest.mark.by_day(4)
def test_a_run_writes_a_topology_that_plans_take(tmp_path: Path):
    out = tmp_path / "topology.json"
    options = ["--ranks", "2", "--device", "cpu", "--mib", "64", "--repeats", "2", "--out", str(out)]
    command = [sys.executable, str(ROOT / "launch" / "bench.py"), "links", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience(200), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    topology = cpflex.Topology.load(out)
    assert topology.gpus_per_node == 2
    assert json.loads(out.read_text())["notes"]["versions"]["torch"] == torch.__version__
    cpflex.make_plan(cpflex.causal(), 512, rank=0, world_size=2, topology=topology)
