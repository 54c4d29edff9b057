"""The cases of the suite as tables: masks, score mods, sizes; and which combinations of them are run.

A `Problem` names its parts, so that it travels to other processes as it is; every rank makes the same inputs from it.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cpflex
from cpflex import trees
from oracle import Attention, MaskFn, ScoreFn, dense_attention

LAYOUTS = {layout.__name__: layout for layout in (cpflex.contiguous, cpflex.zigzag, cpflex.striped, cpflex.balanced)}
SCHEDULES = {"ring": cpflex.ring, "ring:both": cpflex.ring_both, "direct": cpflex.direct, "auto": cpflex.auto}
SCHEDULES |= {"even:3": cpflex.even(3), "even:1/4": cpflex.even((1, 4)), "gather": cpflex.gather}
SCHEDULES |= {"relay:2": cpflex.relay(2), "striped:1/2": cpflex.relay((1, 2), stripe=True)}
NODES_OF_TWO = cpflex.Topology(gpus_per_node=2, intra_gb_per_s=370.0, inter_gb_per_s=47.0)
LENGTHS = (1, 5, 127, 300, 321, 1000)
HEADS = {"mha": (2, 2), "gqa": (4, 2), "mqa": (3, 1)}
HEADS_OF_GRIDS = {"mha4": (4, 4), "gqa": (4, 2), "mqa4": (4, 1)}
"""Those that 2 and 4 ranks can divide."""
DIMS = {"d16": (16, 16), "d24": (24, 24), "d16dv24": (16, 24)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def options_of(schedule: str) -> dict[str, Any]:
    """Of `make_plan`: the schedule, and a topology for those that need one."""
    knows_nodes = schedule.startswith(("relay", "striped"))
    return {"schedule": SCHEDULES[schedule]} | ({"topology": NODES_OF_TWO} if knows_nodes else {})


@dataclass(frozen=True)
class Problem:
    """One attention over a whole sequence; `str` of it is a test id."""

    mask: str = "causal"
    score: str = "none"
    seq_len: int = 300
    heads: str = "mha"
    dims: str = "d16"
    dtype: str = "fp32"
    layout: str = "zigzag"
    schedule: str = "auto"
    world_size: int = 1
    batch_size: int = 2
    ulysses_size: int = 1

    def __str__(self) -> str:
        parts = (
            self.mask,
            self.score,
            f"S{self.seq_len}",
            self.heads,
            self.dims,
            self.dtype,
            self.layout,
            self.schedule,
        )
        heads = f"a{self.ulysses_size}" if self.ulysses_size > 1 else ""
        return "-".join(map(str, (*parts, f"w{self.world_size}{heads}")))

    @property
    def num_heads(self) -> int:
        return self.all_heads[0]

    @property
    def all_heads(self) -> tuple[int, int]:
        return (HEADS | HEADS_OF_GRIDS)[self.heads]

    def random(self, what: str) -> torch.Generator:
        """The same stream on every rank, whatever else was drawn."""
        return torch.Generator().manual_seed(zlib.crc32(f"{what} {self.seq_len} {self.heads} {self.dims}".encode()))

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """q, k, v, grad_out [B, H, S, D] and grad_lse [B, Hq, S]."""
        (num_heads, kv_heads), (dim, v_dim) = self.all_heads, DIMS[self.dims]
        sizes = {"q": (num_heads, dim), "k": (kv_heads, dim), "v": (kv_heads, v_dim), "grad_out": (num_heads, v_dim)}
        random = self.random("inputs")
        made = {
            name: torch.randn(self.batch_size, h, self.seq_len, d, generator=random).to(DTYPES[self.dtype])
            for name, (h, d) in sizes.items()
        }
        return made | {"grad_lse": torch.randn(self.batch_size, num_heads, self.seq_len, generator=random)}

    @property
    def mask_mod(self) -> MaskFn:
        return MASKS[self.mask](self)

    def captured(self) -> list[Tensor]:
        """Fresh leaves, captured by the score_mod."""
        return SCORES[self.score].captured(self)

    def score_mod(self, captured: Sequence[Tensor]) -> ScoreFn | None:
        make = SCORES[self.score].make
        return None if make is None else make(*captured)

    def plan(self, group: Any, **options: Any) -> cpflex.Plan:
        return cpflex.make_plan(
            self.mask_mod,
            self.seq_len,
            group,
            batch_size=self.batch_size,
            num_heads=self.num_heads,
            layout=LAYOUTS[self.layout],
            **options_of(self.schedule) | {"ulysses_size": self.ulysses_size} | options,
        )

    def dense(self, precision: torch.dtype = torch.float64) -> Attention:
        return dense_attention(
            **self.tensors,
            mask_mod=self.mask_mod,
            score_mod=SCORES[self.score].make,
            captured=self.captured(),
            precision=precision,
        )


# -- masks: functions of a Problem, for its lengths and its random numbers


def _doc_ids(problem: Problem, name: str = "documents") -> Tensor:
    """[S], about one document per 40 tokens and always some of one token."""
    random, seq_len = problem.random(name), problem.seq_len
    cuts = torch.randint(seq_len, (seq_len // 40 + 2,), generator=random)
    starts = torch.zeros(seq_len, dtype=torch.int64)
    starts[cuts] = 1
    starts[(cuts + 1).clamp(max=seq_len - 1)] = 1
    return starts.cumsum(0)


def _doc_ids_per_batch(problem: Problem) -> Tensor:
    return torch.stack([_doc_ids(problem, f"documents {b}") for b in range(problem.batch_size)])


def _prefix_lm_per_document(problem: Problem) -> MaskFn:
    ids = _doc_ids(problem)
    ids = ids - ids[0]
    starts = torch.searchsorted(ids, torch.arange(int(ids[-1]) + 1))
    prefix_ends = starts + 7

    return lambda b, h, q, k: (ids[q] == ids[k]) & ((k <= q) | (k < prefix_ends[ids[q]]))


def _shared_question(problem: Problem) -> MaskFn:
    """A question, then answers that see it and themselves, not each other."""
    question = problem.seq_len // 4
    answer = torch.where(torch.arange(problem.seq_len) < question, 0, 1 + _doc_ids(problem))
    return cpflex.causal() & (lambda b, h, q, k: (answer[k] == 0) | (answer[q] == answer[k]))


def _tree(problem: Problem, depth_first: bool = True) -> trees.Tree:
    """A forest of segments as long as documents are; in another order than depth first, each continues any earlier."""
    lengths = _doc_ids(problem).bincount()
    lengths, random = lengths[lengths > 0], problem.random("tree")
    parents: list[int] = []
    for row in range(len(lengths)):
        open_rows = [row - 1] if row else []
        while depth_first and open_rows and parents[open_rows[-1]] >= 0:
            open_rows.append(parents[open_rows[-1]])
        choices = [*(open_rows if depth_first else range(row)), -1]
        parents.append(choices[int(torch.randint(len(choices), (), generator=random))])
    return trees.Tree(parents, lengths)


def _tree_windowed(problem: Problem) -> MaskFn:
    """Windows along the paths, and the first tokens of each path."""
    tree = _tree(problem)
    depths = tree.depths
    return cpflex.tree(tree) & (cpflex.sliding_window(30, positions=depths) | (lambda b, h, q, k: depths[k] < 4))


def _prefix_per_document(problem: Problem) -> MaskFn:
    ids = _doc_ids_per_batch(problem)
    starts = torch.stack([torch.searchsorted(row, row) for row in ids])
    positions = torch.arange(problem.seq_len) - starts
    return cpflex.document(ids) & cpflex.prefix_lm(7, positions=positions)


def _neighbourhood_2d(problem: Problem) -> MaskFn:
    width = 18

    def mask(b, h, q, k):
        return ((q // width - k // width).abs() <= 2) & ((q % width - k % width).abs() <= 3)

    return mask


def _sliding_tile_3d(problem: Problem) -> MaskFn:
    """A 4 x 8 x 8 video in tiles of 2 x 4 x 4 tokens, numbered tile by tile; a tile sees the tiles next to it."""

    def mask(b, h, q, k):
        seen = None
        for place, size in ((1, 2), (2, 2), (4, 4)):
            near = (q // 32 // place % size - k // 32 // place % size).abs() <= 1
            seen = near if seen is None else seen & near
        return seen

    return mask


def _block_diffusion(problem: Problem) -> MaskFn:
    """Noisy tokens, then the clean ones (BD3-LM, arXiv:2503.09573, section 3.1), in blocks of 16."""
    half, size = max(1, problem.seq_len // 2), 16

    def mask(b, h, q, k):
        q_clean, k_clean = q >= half, k >= half
        q_block = torch.where(q_clean, q - half, q) // size
        k_block = torch.where(k_clean, k - half, k) // size
        block_diagonal = (q_block == k_block) & (q_clean == k_clean)
        offset_block_causal = (q_block > k_block) & k_clean & ~q_clean
        block_causal = (q_block >= k_block) & k_clean & q_clean
        return block_diagonal | offset_block_causal | block_causal

    return mask


def _eviction(problem: Problem) -> MaskFn:
    """Every key is forgotten at a position of its own, drawn at random; some at once."""
    lifetimes = torch.randint(0, 200, (problem.seq_len,), generator=problem.random("eviction"))
    evicted_at = torch.arange(problem.seq_len) + lifetimes
    return lambda b, h, q, k: (k <= q) & (q < evicted_at[k])


def _padding(problem: Problem) -> MaskFn:
    """One row of the batch has no token at all."""
    lengths = torch.linspace(0, problem.seq_len, problem.batch_size).long()
    return cpflex.causal() & (lambda b, h, q, k: (k < lengths[b]) & (q < lengths[b]))


def _window_per_head(problem: Problem) -> MaskFn:
    windows = torch.tensor([1, 20, 300, 7])
    return cpflex.causal() & (lambda b, h, q, k: q - k < windows[h])


def _head_and_batch(problem: Problem) -> MaskFn:
    shift = torch.arange(problem.batch_size * problem.num_heads).view(problem.batch_size, problem.num_heads)
    return lambda b, h, q, k: (q + k + shift[b][h]) % 3 != 0


MASKS: dict[str, Callable[[Problem], MaskFn]] = {
    "full": lambda p: cpflex.full(),
    "causal": lambda p: cpflex.causal(),
    "doc_full": lambda p: cpflex.document(_doc_ids(p)),
    "doc_causal": lambda p: cpflex.document(_doc_ids(p)) & cpflex.causal(),
    "sliding1": lambda p: cpflex.causal() & cpflex.sliding_window(1),
    "sliding17": lambda p: cpflex.causal() & cpflex.sliding_window(17),
    "sliding128": lambda p: cpflex.causal() & cpflex.sliding_window(128),
    "sliding1024": lambda p: cpflex.causal() & cpflex.sliding_window(1024),
    "one_sided17": lambda p: cpflex.sliding_window(17),
    "doc_sliding_causal": lambda p: cpflex.document(_doc_ids(p)) & cpflex.sliding_window(30) & cpflex.causal(),
    "two_sided": lambda p: cpflex.sliding_window(9, 21),
    "prefix_lm": lambda p: cpflex.prefix_lm(p.seq_len // 3),
    "prefix_lm_per_document": _prefix_lm_per_document,
    "shared_question": _shared_question,
    "prefix_lm_per_batch": _prefix_per_document,
    "tree": lambda p: cpflex.tree(_tree(p)),
    "tree_not_depth_first": lambda p: cpflex.tree(_tree(p, depth_first=False)),
    "tree_windowed": _tree_windowed,
    "block_causal": lambda p: lambda b, h, q, k: q // 48 >= k // 48,
    "global_sliding": lambda p: (cpflex.sliding_window(20) & cpflex.causal()) | (lambda b, h, q, k: (k < 4) | (q < 2)),
    "dilated": lambda p: cpflex.causal() & (lambda b, h, q, k: (q - k) % 5 == 0),
    "neighbourhood_2d": _neighbourhood_2d,
    "sliding_tile_3d": _sliding_tile_3d,
    "block_diffusion": _block_diffusion,
    "eviction": _eviction,
    "padding": _padding,
    "window_per_head": _window_per_head,
    "head_and_batch": _head_and_batch,
    "doc_per_batch": lambda p: cpflex.document(_doc_ids_per_batch(p)) & cpflex.causal(),
    "future_only": lambda p: ~cpflex.causal(),
    "other_documents_or_window": lambda p: ~cpflex.document(_doc_ids(p)) | (cpflex.causal() & cpflex.sliding_window(5)),
    "plain_lambda": lambda p: lambda b, h, q, k: (k <= q) & ((k % 7 != 3) | (q % 2 == 0)),
    "nothing": lambda p: lambda b, h, q, k: q < 0,
}


# -- score mods: functions of their captured tensors


@dataclass(frozen=True)
class Score:
    make: Callable[..., ScoreFn] | None
    captured: Callable[[Problem], list[Tensor]] = lambda problem: []


def _slopes(problem: Problem) -> list[Tensor]:
    return [(2.0 ** -torch.arange(3.0, 3.0 + problem.num_heads)).requires_grad_()]


def _bias_table(problem: Problem) -> list[Tensor]:
    return [torch.randn(problem.num_heads, 33, generator=problem.random("bias")).requires_grad_()]


def _key_bias(problem: Problem) -> list[Tensor]:
    return [torch.randn(problem.batch_size, problem.seq_len, generator=problem.random("bias")).requires_grad_()]


def _temperature(problem: Problem) -> list[Tensor]:
    return [torch.tensor(1.25, requires_grad=True)]


SCORES: dict[str, Score] = {
    "none": Score(None),
    "softcap": Score(lambda: lambda score, b, h, q, k: 3.0 * torch.tanh(score / 3.0)),
    "alibi": Score(lambda slopes: lambda score, b, h, q, k: score - slopes[h] * (q - k).abs(), _slopes),
    "relative_bias": Score(
        lambda table: lambda score, b, h, q, k: score + table[h, (q - k).clamp(-16, 16) + 16], _bias_table
    ),
    "key_bias": Score(lambda bias: lambda score, b, h, q, k: score + bias[b][k] * torch.sigmoid(bias[b, q]), _key_bias),
    "log_position": Score(lambda: lambda score, b, h, q, k: score * torch.log(q + 2.0) / 4.0),
    "temperature": Score(lambda t: lambda score, b, h, q, k: score * t + 0.1 * t * t, _temperature),
    "detach": Score(lambda: lambda score, b, h, q, k: score + 0.5 * score.detach()),
    "gelu": Score(lambda: lambda score, b, h, q, k: F.gelu(score)),
}


# -- combinations


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Rows in which every value of a factor meets every value of every other factor; the same rows on every run.

    Greedy: a row begins with the first pair not yet met; each further factor takes the value that meets most new ones.
    """
    names = list(factors)
    unmet = {
        (a, x, b, y): None
        for a, b in itertools.combinations(range(len(names)), 2)
        for x, y in itertools.product(range(len(factors[names[a]])), range(len(factors[names[b]])))
    }
    rows = []
    while unmet:
        a, x, b, y = next(iter(unmet))
        row = {a: x, b: y}
        for factor in range(len(names)):
            if factor not in row:
                # a later row prefers other values among equals
                values = [(len(rows) + i) % len(factors[names[factor]]) for i in range(len(factors[names[factor]]))]
                row[factor] = max(values, key=lambda value: sum(_pair(row, factor, value, f) in unmet for f in row))
        for pair in itertools.combinations(sorted(row), 2):
            unmet.pop((pair[0], row[pair[0]], pair[1], row[pair[1]]), None)
        rows.append({name: factors[name][row[i]] for i, name in enumerate(names)})
    return rows


def _pair(row: Mapping[int, int], factor: int, value: int, other: int) -> tuple[int, int, int, int]:
    return (factor, value, other, row[other]) if factor < other else (other, row[other], factor, value)


def whole_product(factors: Mapping[str, Sequence[Any]], rotating: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """All combinations of ``factors``; the values of ``rotating`` take turns, out of step with each other."""
    rows = [dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())]
    for i, row in enumerate(rows):
        for place, (name, values) in enumerate(rotating.items()):
            row[name] = values[(i // (place + 1) + i) % len(values)]
    return rows


FACTORS: dict[str, Sequence[Any]] = {
    "mask": list(MASKS),
    "score": list(SCORES),
    "world_size": range(1, 9),
    "seq_len": LENGTHS,
    "layout": list(LAYOUTS),
    "schedule": list(SCHEDULES),
    "heads": list(HEADS),
    "dims": list(DIMS),
    "dtype": ["fp32", "bf16"],
}
