"""MaskKind: one mask of a plan and what was decided for it, for one rank, on the layout that all queries share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cpflex.mods.graph import Mod
from cpflex.planning.choose import Choice, choose
from cpflex.planning.earlier import Earlier, refuse_missing
from cpflex.planning.idle import find_idle
from cpflex.planning.needs import Needs, chunk_needs, classifier, tiles_of, traffic_by_block, whole_mask
from cpflex.planning.squares import Squares
from cpflex.planning.tables import make_tile_masks
from cpflex.planning.traffic import Traffic
from cpflex.ring.schedule import Exchange, ScheduleFn, Step
from cpflex.sharding.joined import Joined, Keys
from cpflex.sharding.layout import ChunkNeeds, Layout, work_per_rank
from cpflex.tile_mask import TILE, Axis, Idle, Tiles
from cpflex.topology import Machine
from cpflex.version import __version__

FORMAT = 5
"""Version of the plan's contents; ranks that disagree on it do not exchange."""


@dataclass(frozen=True)
class MaskKind:
    """What was planned for one mask kind, for one rank."""

    mask: Mod
    steps: tuple[Step, ...]
    idle: Idle
    facts: dict[str, Any]
    """Equal on two ranks iff their plans belong together."""
    schedule: str
    reason: str
    recv_tokens: tuple[int, ...]  # K/V rows that each rank receives in one forward
    work: np.ndarray  # (query, key) pairs in tiles that are not EMPTY, int64 [world_size]
    tokens: np.ndarray  # K/V rows of rank o's shard that rank r needs, by block, int64 [world_size (r), world_size (o)]
    machine: Machine | None = None
    keys: Keys | None = None
    """Their shards, if they are others than the queries' tokens; one shard if every rank holds all of them."""

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """batch_size and num_heads, where the mask depends on them."""
        return self.facts["batch_size of the plan"], self.facts["num_heads of the plan"]

    @property
    def ulysses_size(self) -> int:
        """Ranks that exchange heads, for this mask."""
        return self.facts["ranks that exchange heads"]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self.facts).encode()).hexdigest()[:16]


class KindWork:
    """What a layout function may ask about the masks."""

    def __init__(
        self,
        mods: Mapping[str, Mod],
        weights: Mapping[str, float],
        batch_size: int,
        num_heads: int,
        machine: Machine | None = None,
        keys: Mapping[str, tuple[Keys, int]] | None = None,
        earlier: Mapping[str, tuple[tuple[Layout, ...], int]] | None = None,
        start: int = 0,
    ) -> None:
        """
        Args:
            keys: of kinds whose keys are another sequence, their shards, and how many of these are one of the shards
                that are dealt out.
            earlier: of kinds whose keys are those of earlier chunks and then the queries' own tokens: the layouts of
                the chunks, and how many of their shards are one that is dealt out.
            start: position of the first query.
        """
        self.weights = weights
        self.machine = machine
        self.start = start
        self.keys = keys or {}
        self.earlier = {
            kind: (Earlier.of(layouts, shards), layouts) for kind, (layouts, shards) in (earlier or {}).items()
        }
        self.classifiers = {kind: classifier(mod, batch_size, num_heads) for kind, mod in mods.items()}
        self._known: dict[tuple[int, int], dict[str, ChunkNeeds]] = {}
        self._squares: dict[int, dict[str, Squares]] = {}
        self.known: dict[tuple[str, str], tuple[Traffic, Choice]] = {}
        """Predictions, by mask kind and key of the layout."""

    def predicted(self, kind: str, table: Layout) -> tuple[Traffic, Choice]:
        """What ranks need under a layout, and the schedule that suits it; found once."""
        if (kind, table.key) not in self.known:
            assert self.machine is not None, "predictions are made of a machine"
            traffic = traffic_by_block(self.classifiers[kind], table)
            self.known[kind, table.key] = traffic, choose(traffic, self.machine)
        return self.known[kind, table.key]

    def __call__(self, chunk_len: int, num_chunks: int) -> dict[str, ChunkNeeds]:
        if (chunk_len, num_chunks) not in self._known:
            tiles = Tiles(chunk_len, num_chunks, start=self.start)
            squares = self._whole_masks(tiles)
            self._known[chunk_len, num_chunks] = {kind: self._needs(kind, squares[kind], tiles) for kind in squares}
        return self._known[chunk_len, num_chunks]

    def _needs(self, kind: str, squares: Squares, tiles: Tiles) -> ChunkNeeds:
        if kind in self.earlier:
            return self.earlier[kind][0].needs(squares, tiles)
        if kind not in self.keys:
            return chunk_needs(squares, tiles)
        keys, shards = self.keys[kind]
        needs = chunk_needs(squares, tiles, tiles_of(keys))
        if keys.world_size == 1:  # all that is seen is at hand
            return ChunkNeeds(needs.work, needs.sees[:, :0], *(np.zeros(0, dtype=np.int64) for _ in range(3)))
        return replace(needs, block_owner=keys.owner[needs.block_chunk] // shards)

    def _whole_masks(self, tiles: Tiles) -> dict[str, Squares]:
        """Of each kind. Chunks of whole tiles are cut at the same positions, and tiles of pads are EMPTY."""
        grid = tiles.chunk_len if tiles.chunk_len % TILE else TILE
        if grid not in self._squares:
            self._squares[grid] = {
                kind: whole_mask(classify, tiles, self._key_tiles(kind, tiles))
                for kind, classify in self.classifiers.items()
            }
        return self._squares[grid]

    def _key_tiles(self, kind: str, tiles: Tiles) -> Axis | None:
        if kind in self.earlier:
            return self.earlier[kind][0].before(tiles)
        return tiles_of(self.keys[kind][0]) if kind in self.keys else None


def plan_kind(
    kind: str,
    mod: Mod,
    table: Layout,
    rank: int,
    work: KindWork,
    schedule: ScheduleFn,
    batch_size: int | None,
    num_heads: int | None,
    ulysses_size: int = 1,
    own: Layout | None = None,
) -> MaskKind:
    """
    Args:
        table, rank: of the outer shards, each of ``ulysses_size`` ranks that exchange heads.
        own: the ranks' own shards, that of ``table`` if none exchange heads.
    """
    if kind in work.earlier:
        joined = Joined((*work.earlier[kind][1], table if own is None else own), ulysses_size)
        refuse_missing(kind, work.classifiers[kind], table, joined)
        # of keys whose layout is known by now
        work = KindWork(
            *({kind: mod}, {kind: 1.0}, batch_size or 1, num_heads or 1, work.machine),
            keys={kind: (joined, 1)},
            start=table.start,
        )
    chunks = work(table.chunk_len, table.num_chunks)[kind]
    keys = work.keys[kind][0] if kind in work.keys else None
    _require_positions(table, keys)
    needs = Needs(work.classifiers[kind], table, rank, chunks, work.machine, keys)
    if (kind, table.key) in work.known:
        needs.choice = work.known[kind, table.key][1]
    chosen = schedule(table if keys is None else _shared(keys, table.world_size), rank, needs)
    facts = {
        "cpflex version": __version__,
        "plan format": FORMAT,
        "seq_len": table.seq_len,
        "machine": "not given" if work.machine is None else repr(work.machine),
        "layout": _described(table),
        "schedule": chosen.name,
        "ranks that exchange heads": ulysses_size,
        "mask kind": kind,
        "batch_size of the plan": batch_size if mod.uses("b") else None,
        "num_heads of the plan": num_heads if mod.uses("h") else None,
        "mask": f"{mod.name}, graph {mod.key}",
        "tensors captured by the mask": mod.content_key,
    }
    if table.start:
        facts["start"] = table.start
    if keys is not None:
        facts |= {"number of keys": keys.seq_len, "layout of the keys": _described(keys)}
    steps = _steps(mod, needs, chosen.exchanges, batch_size or 1, num_heads or 1)
    idle = find_idle(mod, table, rank, batch_size or 1, num_heads or 1, keys)
    loads = work_per_rank(table, chunks)
    reason, received = chosen.reason, chosen.recv_tokens
    moved = loads, needs.tokens
    return MaskKind(mod, steps, idle, facts, chosen.name, reason, received, *moved, work.machine, keys)


def _require_positions(*layouts: Keys | None) -> None:
    """Of tokens and pads, in int32.

    Raises:
        ValueError: there are others.
    """
    for layout in layouts:
        if layout is not None and layout.padded_end >= 2**31:
            raise ValueError(
                f"tokens end at {layout.end} and their pads at {layout.padded_end}, which must be below 2**31; let the "
                "sequence end earlier, or use a layout with fewer pads"
            )


def _described(layout: Keys) -> str:
    if isinstance(layout, Joined):
        return f"{layout.name}, {'; '.join(map(_described, layout.parts))}, {layout.key}"
    chunks = f"{len(layout.chunks[0])} chunks of {layout.chunk_len} tokens per rank"
    return f"{layout.name}, {chunks}, {layout.key}"


def _shared(keys: Keys, world_size: int) -> Layout:
    """The shards of the keys as a schedule sees them: where every rank holds all keys, so many, each a shard."""
    if isinstance(keys, Layout) and keys.world_size == world_size:
        return keys
    ranks = tuple((rank,) for rank in range(world_size))
    shard_len = keys.local_len if keys.world_size == world_size else keys.seq_len
    return Layout(shard_len * world_size, shard_len, ranks, keys.name)


def _steps(mod: Mod, needs: Needs, exchanges: Sequence[Exchange], batch_size: int, num_heads: int) -> tuple[Step, ...]:
    q_tiles = needs.tiles.of_chunks(needs.layout.chunks[needs.rank])
    empty = q_tiles[:0]
    blocks = [np.concatenate([needs.tiles_of(*source) for source in e.sources] or [empty]) for e in exchanges]
    masks = make_tile_masks(mod, needs.squares, needs.tiles, needs.key_tiles, q_tiles, blocks, batch_size, num_heads)
    return tuple(Step(exchange, mask) for exchange, mask in zip(exchanges, masks, strict=True))
