"""What travels where ranks have different new tokens: queries to keys, or keys to queries. A strategy is a function,
passed as a value.

The field's words are pass-Q and pass-KV (Yang et al., arXiv:2411.01783). Queries go to every rank that keeps keys which
they see, and a partial softmax of each returns in fp32; or the keys that a rank's queries see come to it, and nothing
returns. It is decided for each sequence of a plan, and for each of its mask kinds, by what the two would move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cpflex.topology import Heads, Topology


@dataclass(frozen=True)
class Costs:
    """What the first step of a plan would move in one layer, bytes of all ranks together, by sequence. The new tokens'
    own keys, which go to the owners of their pages in both ways, are counted in both.
    """

    queries_bytes: tuple[int, ...]
    """If its queries travel: they and their partials."""
    keys_bytes: tuple[int, ...]
    """If keys travel; a page that several sequences share counts for each."""
    num_waves: int = 1
    """Messages in which all keys would come, as `traffic` limits them."""
    message_bytes: float = 0.0
    """Bytes in whose time the ranks exchange one more message; 0 if nothing is known of their links."""

    def num_messages(self, keys: Sequence[bool]) -> int:
        """To each other rank: the first, more if not all keys come at once, and the partials that return."""
        return 1 + (self.num_waves - 1 if any(keys) else 0) + (not all(keys))

    def total(self, keys: Sequence[bool]) -> float:
        """Of a choice, messages included."""
        moved = sum(
            k if by_keys else q for by_keys, q, k in zip(keys, self.queries_bytes, self.keys_bytes, strict=True)
        )
        return moved + self.message_bytes * self.num_messages(keys)


TravelFn = Callable[[Costs], Sequence[bool]]
"""Of each sequence: whether keys travel."""


def queries(costs: Costs) -> tuple[bool, ...]:
    """Queries travel to the keys of every sequence, and partials return: pass-Q."""
    return (False,) * len(costs.queries_bytes)


def keys(costs: Costs) -> tuple[bool, ...]:
    """Keys and values travel to the queries of every sequence, and nothing returns: pass-KV."""
    return (True,) * len(costs.keys_bytes)


def cheaper(costs: Costs) -> tuple[bool, ...]:
    """Of each sequence what moves fewer bytes; or the same for all of them where that saves a message that takes
    longer. Queries, if both are equal.
    """
    each = tuple(k < q for q, k in zip(costs.queries_bytes, costs.keys_bytes, strict=True))
    return min((each, queries(costs), keys(costs)), key=costs.total)


def bytes_of_rows(shapes: Iterable[Heads]) -> tuple[int, int]:
    """(a query with its partial, K and V of a token), one layer of each shape."""
    query_bytes = key_bytes = 0
    for one in shapes:
        query_bytes += one.query * (one.dim * one.element_bytes + 4 * (one.value_dim or one.dim) + 4)
        key_bytes += one.row_bytes
    return query_bytes, key_bytes


def bytes_of_a_message(topology: Topology | None, world_size: int) -> float:
    """What all ranks could receive while one more message begins."""
    if topology is None:
        return 0.0
    if topology.num_nodes(world_size) == 1:
        rate, latency = topology.intra_gb_per_s, topology.intra_latency_us
    else:
        rate, latency = topology.nic_gb_per_s, topology.inter_latency_us
    return world_size * 1e3 * rate * (latency + topology.message_us * max(0, world_size - 2))
