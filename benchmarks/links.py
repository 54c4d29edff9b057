"""What messages between ranks achieve on this machine, as a Topology that make_plan takes.

    torchrun --nproc-per-node 8 launch/bench.py links                      one node
    torchrun --nnodes 2 --nproc-per-node 8 ... launch/bench.py links       across nodes too
    python launch/bench.py links --ranks 4 --ranks-per-node 2              a trial: as if 4 processes were on 2 nodes

Every rank sends and receives at once, by the exchange that attention uses: to the next GPU of its node, to the GPU in
its place on the next node (all GPUs of a node together, and one alone), and small messages to more and more peers. A
time is the slowest rank's, the median of the repeats. Latency and rate are fitted to all sizes by least squares of
relative errors. What cannot be measured, as the links between nodes on one node, is taken from --like, and the file
says so. Oversubscription of the network above the nodes does not show between two: take it from your network's plan.
"""

from __future__ import annotations

import argparse
import json
import platform
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import cpflex
from cpflex.links.processes import links_of
from cpflex.links.protocol import Links, all_gather_number

sys.path.append(str(Path(__file__).parents[1] / "launch"))

import ranks

SMALLEST = 4096
"""Bytes."""

ROUNDS = {"cpu": 1, "cuda": 10}
"""Exchanges, one after the other, in one time."""

Peers = Callable[[int, int, int], tuple[list[int], list[int]]]
"""(rank, world_size, ranks of a node) -> whom a rank sends to, and whom it receives from."""

Say = Callable[[str], object]


def inside(rank: int, world_size: int, per_node: int) -> tuple[list[int], list[int]]:
    """The neighbours in a ring of the node's ranks."""
    first = rank - rank % per_node
    size = min(per_node, world_size - first)
    return ring(rank - first, size, first, 1)


def across(rank: int, world_size: int, per_node: int) -> tuple[list[int], list[int]]:
    """The ranks in the same place on the next node and on the one before; a smaller last node stays out."""
    nodes, place = world_size // per_node, rank % per_node
    return ([], []) if rank // per_node >= nodes else ring(rank // per_node, nodes, place, per_node)


def across_alone(rank: int, world_size: int, per_node: int) -> tuple[list[int], list[int]]:
    """The same, of the first rank of each node only."""
    return across(rank, world_size, per_node) if rank % per_node == 0 else ([], [])


def ring(place: int, size: int, first: int, stride: int) -> tuple[list[int], list[int]]:
    if size < 2:
        return [], []
    return [first + (place + 1) % size * stride], [first + (place - 1) % size * stride]


def fan(num_peers: int) -> Peers:
    """So many ranks after one, and before it."""

    def peers(rank: int, world_size: int, per_node: int) -> tuple[list[int], list[int]]:
        away = range(1, num_peers + 1)
        return [(rank + i) % world_size for i in away], [(rank - i) % world_size for i in away]

    return peers


def fit(num_bytes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Latency in us and 10^9 bytes a second of ``seconds = latency + bytes / rate``: least squares of relative errors.

    Raises:
        ValueError: longer messages did not take longer.
    """
    n, t = (torch.tensor(x, dtype=torch.float64) for x in (num_bytes, seconds))
    latency, per_byte = torch.linalg.lstsq(torch.stack([1 / t, n / t], dim=1), torch.ones_like(t)[:, None]).solution[
        :, 0
    ]
    if per_byte <= 0 or seconds[-1] <= seconds[0]:
        raise ValueError(
            f"longer messages must take longer; {num_bytes[0]} bytes took {1e6 * seconds[0]:.0f} us and "
            f"{num_bytes[-1]} bytes {1e6 * seconds[-1]:.0f} us - measure larger ones "
            "(--mib), on a machine where nothing else runs"
        )
    return max(0.0, 1e6 * float(latency)), 1e-9 / float(per_byte)


def timed(links: Links, device: torch.device, peers: Peers, per_node: int, num_bytes: int, repeats: int) -> float:
    """Seconds of one exchange in which each message has so many bytes: of the slowest rank, the median."""
    to, source = peers(links.rank, links.world_size, per_node)
    sent, received = (
        [(peer, torch.zeros(num_bytes, dtype=torch.uint8, device=device)) for peer in side] for side in (to, source)
    )
    found = []
    for _ in range(repeats + 1):
        meet(links, device)
        begin = time.perf_counter()
        for _ in range(ROUNDS[device.type]):
            links.exchange(sent, received).wait()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        nanoseconds = int(1e9 * (time.perf_counter() - begin) / ROUNDS[device.type])
        everyones = all_gather_number(links, max(1, nanoseconds), "a measurement of links", device)
        found.append(max(everyones) / 1e9)
    return statistics.median(found[1:])  # the first makes connections


def meet(links: Links, device: torch.device) -> None:
    all_gather_number(links, 1, "a measurement of links", device)


def measure(
    group: Any, device: torch.device, like: cpflex.Topology, options: argparse.Namespace, say: Say
) -> tuple[cpflex.Topology, dict[str, Any]]:
    """The topology, and what was measured; on all ranks alike."""
    links = links_of(group)
    node = None if options.ranks_per_node is None else f"pretended node {links.rank // options.ranks_per_node}"
    per_node = cpflex.topology_of(group, like, node=node).gpus_per_node
    num_nodes = -(-links.world_size // per_node)
    say(f"{links.world_size} ranks on {num_nodes} nodes, {device.type}; every rank sends and receives at once")
    patterns: dict[str, tuple[bool, Peers]] = {
        "inside": (min(per_node, links.world_size) > 1, inside),
        "across": (links.world_size >= 2 * per_node, across),
        "across, one GPU a node": (links.world_size >= 2 * per_node and per_node > 1, across_alone),
    }
    sizes = [SMALLEST << shift for shift in range(0, 40, 2) if SMALLEST << shift <= options.mib << 20]
    rows, fits = [], {}
    for name, (is_there, peers) in patterns.items():
        if not is_there:
            say(f"{name}: left out, there is {'one GPU a node' if name == 'inside' else 'one node'}")
            continue
        seconds = []
        for size in sizes:
            seconds.append(timed(links, device, peers, per_node, size, options.repeats))
            rows.append({"pattern": name, "bytes": size, "us": 1e6 * seconds[-1], "gb_per_s": size / seconds[-1] / 1e9})
            say(f"{name:24}{size:>12,} bytes{1e6 * seconds[-1]:12.1f} us{size / seconds[-1] / 1e9:10.2f} GB/s")
        fits[name] = fit(sizes, seconds)
        say(f"{name:24}fitted: {fits[name][0]:.1f} us and {fits[name][1]:.2f} GB/s")
    fans = []
    for num_peers in range(1, min(links.world_size - 1, 8) + 1):
        fans.append(1e6 * timed(links, device, fan(num_peers), per_node, SMALLEST, options.repeats))
        rows.append({"pattern": f"{num_peers} peers", "bytes": SMALLEST, "us": fans[-1]})
        say(f"{num_peers} peers, {SMALLEST} bytes each{fans[-1]:25.1f} us")
    topology = topology_from(replace(like, gpus_per_node=per_node, nics_per_node=None), fits, fans)
    taken = [name for name in ("inside", "across") if name not in fits]
    return topology, {"rows": rows, "not measured, of --like": taken}


def topology_from(
    like: cpflex.Topology, fits: dict[str, tuple[float, float]], fans: Sequence[float]
) -> cpflex.Topology:
    """``fits``: us and GB/s by pattern; ``fans``: us with 1, 2, ... peers."""
    if "inside" in fits:
        like = replace(like, intra_latency_us=round(fits["inside"][0], 2), intra_gb_per_s=round(fits["inside"][1], 3))
    if "across" in fits:
        like = replace(like, inter_latency_us=round(fits["across"][0], 2), inter_gb_per_s=round(fits["across"][1], 3))
    if len(fans) > 1:
        more = statistics.median((us - fans[0]) / peers for peers, us in enumerate(fans[1:], start=1))
        like = replace(like, message_us=round(max(0.0, more), 2))
    return like


def notes(measured: dict[str, Any], device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    is_cuda = device.type == "cuda"
    return {
        "command": "launch/bench.py links " + " ".join(sys.argv[1:]),
        "how": f"batch_isend_irecv, {options.repeats} repeats, the slowest rank's median",
        "host": socket.gethostname() if options.ranks_per_node is None else "pretended nodes",
        "device": torch.cuda.get_device_name(device) if is_cuda else platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "cpflex": cpflex.__version__}
        | ({"nccl": ".".join(map(str, torch.cuda.nccl.version()))} if is_cuda else {}),
    } | measured


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("topology.json"), help="(%(default)s)")
    parser.add_argument("--like", default="h100-ib", help="a preset, or a file, for what is not measured (%(default)s)")
    parser.add_argument("--mib", type=int, default=64, help="longest message (%(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="(%(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--ranks", type=int, help="to start, without torchrun (default: one per GPU, 2 on the CPU)")
    parser.add_argument(
        "--ranks-per-node", type=int, help="pretend: so many ranks are on a node (default: ask the hosts)"
    )
    options = parser.parse_args(arguments)
    for name in ("mib", "repeats", "ranks", "ranks_per_node"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1; got {value}")
    if not Path(options.like).exists() and options.like not in cpflex.topology.TOPOLOGIES:
        parser.error(f"--like must be a file or one of {', '.join(cpflex.topology.TOPOLOGIES)}; got {options.like!r}")
    return options


def main() -> None:
    options = parse()
    if not ranks.started():
        ranks.start(__file__, sys.argv[1:], num_ranks=options.ranks, device_type=options.device)
        return
    path = Path(options.like)
    like = cpflex.Topology.load(path) if path.exists() else cpflex.Topology.named(options.like)
    with ranks.joined(options.device) as (group, device):
        say = print_now if dist.get_rank() == 0 else ignore
        topology, measured = measure(group, device, like, options, say)
        if dist.get_rank() == 0:
            topology.save(options.out, notes=notes(measured, device, options))
            say(f"{topology}\nwrote {options.out}: topology=cpflex.Topology.load({json.dumps(str(options.out))})")


def print_now(text: str) -> None:
    print(text, flush=True)


def ignore(text: str) -> None:
    """What another rank says."""


if __name__ == "__main__":
    main()
