"""What a machine can do, as plain data: links between GPUs, the GPUs themselves, and the heads of an attention.

Planning reads them and asks nothing else: no clock, no device, no environment. Without them it assumes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

Known = TypeVar("Known")

FORMAT = 1
"""Version of the files that `Topology.save` and `Device.save` write."""


def _require_numbers(of: object, positive: tuple[str, ...], other: tuple[str, ...]) -> None:
    for name in (*positive, *other):
        value = getattr(of, name)
        if not isinstance(value, int | float) or not (value > 0 if name in positive else value >= 0) or value > 1e12:
            kind = "positive" if name in positive else "non-negative"
            raise ValueError(f"{name} must be a {kind} number; got {value!r}")


def _named(name: str, known: Mapping[str, Known]) -> Known:
    if name not in known:
        raise ValueError(f"there is no {name!r}; there are {', '.join(known)}")
    return known[name]


def _save(value: Any, path: str | Path, notes: Mapping[str, Any] | None) -> None:
    head = {"cpflex": type(value).__name__, "format": FORMAT}
    text = json.dumps(head | asdict(value) | ({"notes": dict(notes)} if notes else {}), indent=1)
    Path(path).write_text(text + "\n")


def _load(kind: type[Known], path: str | Path) -> Known:
    name = kind.__name__
    try:
        found = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} must hold JSON, as {name}.save writes it; {error}") from error
    if not isinstance(found, dict) or found.pop("cpflex", None) != name:
        raise ValueError(f'{path} must hold a {name}, {{"cpflex": "{name}", ...}}; make one with {name}.save')
    if (version := found.pop("format", None)) != FORMAT:
        raise ValueError(f"{path} is of format {version!r}; this version reads format {FORMAT}: save it again")
    found.pop("notes", None)
    known = {field.name: field.default is MISSING for field in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(found.keys() - known.keys()):
        raise ValueError(f"{path} has fields that a {name} has not: {', '.join(unknown)}; it has {', '.join(known)}")
    if missing := [field for field, is_needed in known.items() if is_needed and field not in found]:
        raise ValueError(f"{path} must give a {name} its {', '.join(missing)}")
    return kind(**found)


@dataclass(frozen=True)
class Topology:
    """The links of a group whose ranks are ordered by node: rank r is GPU ``r % gpus_per_node`` of node ``r //
    gpus_per_node``; the last node may have fewer. Rates are those that messages achieve, not those on the box.

    >>> topology = dataclasses.replace(cpflex.Topology.named("h100-ib"), gpus_per_node=4)
    """

    gpus_per_node: int
    """Ranks of the group on one node: fewer than the node has GPUs, if other dims of the mesh lie inside it."""
    intra_gb_per_s: float
    """10^9 bytes a second that a GPU sends, and at once receives, inside its node."""
    inter_gb_per_s: float
    """The same of one NIC."""
    nics_per_node: int | None = None
    """NICs that serve these ranks; as many as ``gpus_per_node`` if None."""
    oversubscription: float = 1.0
    """How many times the NICs of a node together are faster than the network above them."""
    intra_latency_us: float = 10.0
    """Of a batch of messages inside a node: launch, rendezvous, first bytes."""
    inter_latency_us: float = 20.0
    message_us: float = 0.5
    """More for each further peer in a batch."""

    def __post_init__(self) -> None:
        counts = {"gpus_per_node": self.gpus_per_node, "nics_per_node": self.nics_per_node or 1}
        for name, count in counts.items():
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ValueError(f"{name} must be an integer of at least 1; got {count!r}")
        rates = ("intra_gb_per_s", "inter_gb_per_s", "oversubscription")
        _require_numbers(self, positive=rates, other=("intra_latency_us", "inter_latency_us", "message_us"))
        if self.oversubscription < 1:
            raise ValueError(f"oversubscription must be at least 1; got {self.oversubscription}")

    @staticmethod
    def named(name: str) -> Topology:
        """One of `TOPOLOGIES`.

        Raises:
            ValueError: there is none of this name; the message lists them.
        """
        return _named(name, TOPOLOGIES)

    def save(self, path: str | Path, notes: Mapping[str, Any] | None = None) -> None:
        """Write a file of JSON that `load` reads, with notes for people, such as how it was measured."""
        _save(self, path, notes)

    @staticmethod
    def load(path: str | Path) -> Topology:
        """What `save` wrote, or a file like it; fields that are left out have their defaults.

        Raises:
            ValueError: the file holds something else, another format, or fields that are not known.
        """
        return _load(Topology, path)

    @property
    def nic_gb_per_s(self) -> float:
        """A GPU's share of its node's NICs."""
        return self.inter_gb_per_s * (self.nics_per_node or self.gpus_per_node) / self.gpus_per_node

    def num_nodes(self, world_size: int) -> int:
        """Nodes of a group of so many ranks."""
        return -(-world_size // self.gpus_per_node)

    def node_of(self, rank: int) -> int:
        """The node on which a rank lies."""
        return rank // self.gpus_per_node


@dataclass(frozen=True)
class Device:
    """What one GPU and its host achieve in attention."""

    tflops: float = 500.0
    """10^12 floating-point operations a second of the kernels in the model's dtype, as 4 x pairs x query heads x head
    dim in forward, 2.5 times that in backward (FlashAttention-2, arXiv:2307.08691, section 4.1).
    """
    memory_gb_per_s: float = 2800.0
    """10^9 bytes a second of device memory, read and written together."""
    launch_us: float = 6.0
    """Of one kernel, on the device."""
    forward_step_us: float = 55.0
    """Of the host for one step: Python, messages, launches."""
    backward_step_us: float = 120.0
    lead_us: float = 1000.0
    """How far the host is ahead of the device when an attention begins."""
    buffer_gb: float = 4.0
    """10^9 bytes that K/V and dK/dV of other ranks may take."""

    def __post_init__(self) -> None:
        positive = ("tflops", "memory_gb_per_s", "buffer_gb")
        _require_numbers(self, positive, ("launch_us", "forward_step_us", "backward_step_us", "lead_us"))

    @staticmethod
    def named(name: str) -> Device:
        """One of `DEVICES`.

        Raises:
            ValueError: there is none of this name; the message lists them.
        """
        return _named(name, DEVICES)

    def save(self, path: str | Path, notes: Mapping[str, Any] | None = None) -> None:
        """Write a file of JSON that `load` reads, with notes for people, such as how it was measured."""
        _save(self, path, notes)

    @staticmethod
    def load(path: str | Path) -> Device:
        """What `save` wrote, or a file like it; fields that are left out have their defaults.

        Raises:
            ValueError: the file holds something else, another format, or fields that are not known.
        """
        return _load(Device, path)


@dataclass(frozen=True)
class Heads:
    """The shape of an attention, as far as its cost depends on it."""

    query: int = 32
    kv: int = 8
    dim: int = 128
    value_dim: int | None = None
    """``dim`` if None."""
    element_bytes: int = 2
    """Of K and V; their gradients travel in fp32."""

    def __post_init__(self) -> None:
        for field in fields(self):
            size = getattr(self, field.name)
            if not (field.name == "value_dim" and size is None) and (not isinstance(size, int) or size < 1):
                raise ValueError(f"{field.name} must be an integer of at least 1; got {size!r}")
        if self.query % self.kv:
            raise ValueError(f"query heads must be a multiple of kv heads; got {self.query} and {self.kv}")

    @property
    def row_bytes(self) -> int:
        """K and V of one token."""
        return self.kv * (self.dim + (self.value_dim or self.dim)) * self.element_bytes

    @property
    def grad_row_bytes(self) -> int:
        """dK and dV of one token."""
        return self.kv * (self.dim + (self.value_dim or self.dim)) * 4

    @property
    def flops_per_pair(self) -> int:
        """Of one (query, key) pair, in forward."""
        return 2 * self.query * (self.dim + (self.value_dim or self.dim))


class Machine(NamedTuple):
    """What predictions are made from."""

    topology: Topology
    device: Device
    heads: Heads

    @staticmethod
    def of(topology: Topology | None, device: Device | None = None, heads: Heads | None = None) -> Machine | None:
        """With what is known beside a topology, or defaults; None without one.

        Raises:
            TypeError: one of them is something else.
            ValueError: a device or heads without a topology.
        """
        given = (("topology", topology, Topology), ("device", device, Device), ("heads", heads, Heads))
        for name, value, kind in given:
            if value is not None and not isinstance(value, kind):
                raise TypeError(f"{name} must be a cpflex.{kind.__name__}; got {type(value).__name__}")
        if topology is None:
            if device is not None or heads is not None:
                raise ValueError("device and heads are used with a topology; pass topology=cpflex.Topology(...) too")
            return None
        return Machine(topology, device or Device(), heads or Heads())


TOPOLOGIES = {
    "h100-ib": Topology(8, 370.0, 47.0),
    "h100-ethernet": Topology(8, 370.0, 11.2, inter_latency_us=40.0),
    "gb200-nvl72": Topology(64, 740.0, 47.0),
    "a100-ib": Topology(8, 235.0, 23.5),
}
"""Of one group that holds all GPUs of its nodes. 370 of NVLink's 450 GB/s and 47 of a 400 Gb/s NIC's 50 are what NCCL
achieves (nccl-tests, issues 212 and 290); the rest are in proportion: 100 Gb/s Ethernet, NVLink 5 at 900 GB/s with 64
of 72 GPUs in use, and NVLink 3 at 300 with 200 Gb/s NICs. ``launch/bench.py links`` measures a machine's own.
"""

DEVICES = {
    "h100": Device(),
    "a100": Device(tflops=190.0, memory_gb_per_s=1700.0),
    "b200": Device(tflops=1200.0, memory_gb_per_s=6500.0),
}
"""Rates of FlashAttention's kind of kernels, bf16, head dim 128, as published for FlashAttention-2 (A100),
FlashAttention-3 (H100, the portable kernels' share of it) and cuDNN (B200).
"""
