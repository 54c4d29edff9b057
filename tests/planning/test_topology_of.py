"""topology_of: nodes are found by one question to all ranks, and an order that plans cannot use is refused on each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import cpflex
from cpflex.links import processes as processes_of_links
from cpflex.testing import run_ranks
from processes import RankProcesses

LIKE = cpflex.Topology.named("h100-ib")


def ask(group: Any, nodes: Sequence[str], like: cpflex.Topology = LIKE) -> cpflex.Topology:
    rank = group.rank() if isinstance(group, dist.ProcessGroup) else group.rank
    return cpflex.topology_of(group, like, node=nodes[rank])


@pytest.mark.parametrize(("nodes", "gpus"), [("a", 1), ("aaa", 3), ("aabb", 2), ("aabbc", 2), ("aaabb", 3), ("abc", 1)])
def test_the_ranks_of_a_node_are_counted(nodes: str, gpus: int):
    found = run_ranks(partial(ask, nodes=nodes), len(nodes), timeout=30)
    assert found == [replace(LIKE, gpus_per_node=gpus)] * len(nodes)


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ("abab", "a: rank 0, b: rank 1, a: rank 2, b: rank 3"),
        ("abb", "a: rank 0, b: ranks 1-2"),
        ("aabcc", "a: ranks 0-1, b: rank 2, c: ranks 3-4"),
        ("aaba", "a: ranks 0-1, b: rank 2, a: rank 3"),
    ],
)
def test_an_order_that_is_not_by_node_is_refused_on_every_rank(nodes: str, said: str):
    def refused(group: Any) -> str:
        with pytest.raises(ValueError, match="order the ranks by node") as caught:
            ask(group, nodes)
        return str(caught.value)

    for text in run_ranks(refused, len(nodes), timeout=30):
        assert f"got {said} - " in text


def test_a_gpu_keeps_its_share_of_the_nics_of_a_node_that_the_group_does_not_fill():
    like = replace(LIKE, nics_per_node=4)
    (found, _) = run_ranks(partial(ask, nodes="aa", like=like), 2, timeout=30)
    assert (found.gpus_per_node, found.nic_gb_per_s) == (2, like.nic_gb_per_s)
    assert run_ranks(partial(ask, nodes="a" * 8, like=like), 8, timeout=30)[0] == like


def ask_by_processes(group: dist.ProcessGroup, nodes: Sequence[str]) -> tuple[Any, ...]:
    """What a process group, a mesh, and the name of this host say, and how often ranks met for the first."""
    with mock.patch.object(
        processes_of_links.ProcessLinks, "compare", autospec=True, side_effect=processes_of_links.ProcessLinks.compare
    ) as gathered:
        by_group = ask(group, nodes)
    mesh = init_device_mesh("cpu", (group.size(),), mesh_dim_names=("cp",))
    return (
        by_group,
        cpflex.topology_of(mesh["cp"], LIKE, node=nodes[group.rank()]),
        cpflex.topology_of(group, LIKE),
        (gathered.call_count),
    )


def test_processes_ask_once_and_know_their_own_host(two_processes: RankProcesses):
    by_group, by_mesh, by_host, num_gathered = two_processes.run(ask_by_processes, "ab")[0]
    assert (by_group.gpus_per_node, by_mesh.gpus_per_node, by_host.gpus_per_node) == (1, 1, 2)
    assert num_gathered == 1


def test_processes_are_told_the_names_of_nodes(four_processes: RankProcesses):
    for outcome in four_processes.outcomes(ask, ["node7", "node8", "node8", "node7"]):
        assert isinstance(outcome.error, ValueError)
        assert re.search("node7: rank 0, node8: ranks 1-2, node7: rank 3", str(outcome.error))


def test_like_must_be_a_topology():
    with pytest.raises(TypeError, match=r"like must be a cpflex.Topology; got str"):
        cpflex.topology_of(mock.Mock(), "h100-ib")  # type: ignore[arg-type]
