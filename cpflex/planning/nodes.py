"""topology_of: which ranks of a group lie on one node, found by asking all of them once."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Sequence
from dataclasses import replace

from cpflex.links.processes import Group, links_of
from cpflex.links.protocol import all_gather_number
from cpflex.ring.agreement import number_of
from cpflex.topology import Topology

PLAN = "the topology of the group"
"""What a rank that waits in vain is told to wait for."""


def topology_of(group: Group, like: Topology, *, node: str | None = None) -> Topology:
    """A topology whose ``gpus_per_node`` is that of the group. All ranks of the group must call it, once per job: they
    gather one number each. `make_plan` never does.

    Args:
        group: a process group or a 1-D device mesh.
        like: links such as these: a preset, or what `Topology.load` reads. A GPU keeps its share of the NICs, so the
            group may have fewer ranks on a node than the node has GPUs.
        node: the name of what this rank reaches by its fast links, alike on the ranks that share it; the host's name
            if None. Hosts that one NVLink domain joins need the domain's.

    >>> topology = cpflex.topology_of(mesh["cp"], like=cpflex.Topology.named("h100-ib"))

    Raises:
        ValueError: on every rank, if the ranks of a node do not follow one another, or nodes but the last differ in
            size; the message names ranks and nodes.
    """
    if not isinstance(like, Topology):
        raise TypeError(f"like must be a cpflex.Topology; got {type(like).__name__}")
    links = links_of(group)
    name = socket.gethostname() if node is None else node
    words = {"node": name}
    number = number_of(words)
    links.say(number, words)
    numbers = all_gather_number(links, number, PLAN)
    sizes = [len(list(same)) for _, same in itertools.groupby(numbers)]
    if len(sizes) != len(set(numbers)) or len({*sizes[:-1], max(sizes[0], sizes[-1])}) > 1:
        names = {number: words["node"] for number, words in links.find(set(numbers)).items()}
        raise ValueError(_refusal([names.get(number, f"node {number:x}") for number in numbers]))
    if sizes[0] == like.gpus_per_node:
        return like
    return replace(like, gpus_per_node=sizes[0], inter_gb_per_s=like.nic_gb_per_s, nics_per_node=None)


def _refusal(nodes: Sequence[str]) -> str:
    """``nodes``: by rank."""
    runs = [(node, [rank for rank, _ in same]) for node, same in itertools.groupby(enumerate(nodes), lambda x: x[1])]
    placed = ", ".join(
        f"{node}: " + (f"ranks {ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else f"rank {ranks[0]}")
        for node, ranks in runs
    )
    return (
        "ranks of a node must follow one another, equally many on each node but the last, which may have fewer; got "
        f"{placed} - order the ranks by node, for instance make the mesh's dim of this group the innermost"
    )
