"""Deliberate bugs, planted one at a time in a copy of the repository: the tests that should catch each must fail.

python tests/mutants.py                  all of them; the table of docs/mutants.md with --table docs/mutants.md
python tests/mutants.py --only window    those whose name contains a word
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from patience import patience

ROOT = Path(__file__).parents[1]
COPIED = ("cpflex", "tests", "launch", "benchmarks", "docs", "examples", "README.md", "pyproject.toml", "Makefile")
SECONDS = 300


@dataclass(frozen=True)
class Mutant:
    """One bug: ``old`` stands exactly once in ``file`` under cpflex/, and becomes ``new``."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    """Under tests/, separated by spaces; `file::test` and `file -k word` for part of a file."""


@dataclass(frozen=True)
class Outcome:
    mutant: Mutant
    caught_by: str
    """The test that failed; empty if all passed."""
    seconds: float
    said: str


THREADS = "test_attention_threads.py"
RANKS = f"{THREADS} -k w4"
KERNELS = "kernels/test_triton_kernels.py"

MASKS = [
    Mutant("window one token too wide", "masks.py", "at(b, k) > at(b, q) - size", "at(b, k) >= at(b, q) - size", "test_masks.py"),
    Mutant("two-sided window one token too narrow", "masks.py", "(at(b, k) <= at(b, q) + after", "(at(b, k) < at(b, q) + after", "test_masks.py"),
    Mutant("prefix one token too long", "masks.py", "(at(b, k) < length", "(at(b, k) <= length", "test_masks.py"),
    Mutant("a window counts by where queries are stored", "masks.py", "at(b, k) > at(b, q) - size", "at(b, k) > q - size", "test_masks.py"),
    Mutant("a branch seen by the first token of the next", "trees/tree.py", "(k <= q) & (q < leave[k])", "(k <= q) & (q <= leave[k])", "trees/test_tree.py"),
    Mutant("a branch seen by those stored after it", "trees/tree.py", "(enter[q] < leave[k])", "(enter[q] < leave[q])", "trees/test_tree.py"),
    Mutant("depths begin anew at each branch", "trees/tree.py", "first[parent] + self.lengths[parent] if", "first[parent] if", "trees/test_tree.py"),
    Mutant("~ forgotten", "masks.py", "~fn(b, h, q, k)", "fn(b, h, q, k)", "test_masks.py"),
]  # fmt: skip
MODS = [
    Mutant("negative index not wrapped", "mods/evaluate.py", "torch.where(i < 0, i + n, i).clamp", "i.clamp", "mods/test_trace.py"),
    Mutant("index beyond a table not clamped", "mods/evaluate.py", "i).clamp(0, n - 1)", "i)", THREADS),
    Mutant("floor division truncates", "mods/evaluate.py", '"floor_div": lambda a, b: torch.div(a, b, rounding_mode="floor")', '"floor_div": lambda a, b: torch.div(a, b, rounding_mode="trunc")', "mods/test_trace.py"),
    Mutant("n - x traced as x - n", "mods/trace.py", "a, b = b, a if alpha == 1", "a, b = a, b if alpha == 1", "mods/test_trace.py"),
    Mutant("0.0 and -0.0 are one constant", "mods/graph.py", "key = repr(node)", "key = node", "mods/test_graph.py"),
    Mutant("product rule crossed", "mods/vjp.py", '(op("mul", g, y), op("mul", g, x))', '(op("mul", g, x), op("mul", g, y))', "mods/test_vjp.py"),
    Mutant("second use of a value overwrites its gradient", "mods/vjp.py", "part if known is None else builder.add(\"add\", known, part, dtype=dtype)", "part", "mods/test_vjp.py"),
    Mutant("every captured gradient goes to the first tensor", "mods/vjp.py", "reads.append((int(node.args[0])", "reads.append((wanted[0]", "mods/test_vjp.py"),
    Mutant("interval rule of < unsound", "mods/intervals.py", "Interval(a.hi < b.lo, ~(a.lo >= b.hi))", "Interval(a.hi <= b.lo, ~(a.lo >= b.hi))", "mods/test_intervals.py"),
    Mutant("interval of a difference too narrow", "mods/intervals.py", "Interval(a.lo - b.hi, a.hi - b.lo)", "Interval(a.lo - b.lo, a.hi - b.hi)", "mods/test_intervals.py"),
    Mutant("an index of both signs taken for one sign", "mods/intervals.py", "both_signs = (index.lo < 0) & (index.hi >= 0)", "both_signs = (index.lo < 0) & (index.hi < 0)", "mods/test_intervals.py"),
    Mutant("int8 that wraps around not noticed", "mods/intervals.py", "_unless((result.lo < info.min) | (result.hi > info.max), dtype, result)", "result", "mods/test_intervals.py"),
    Mutant("floats bounded without rounding", "mods/intervals.py", "lo, hi = lo - below, hi + above", "pass", "mods/test_intervals.py"),
]  # fmt: skip
PLANNER = [
    Mutant("pad keys not masked", "planning/make.py", 'for name in ("q_idx", "kv_idx"):', 'for name in ("q_idx",):', "test_probes.py"),
    Mutant("captured mask tensors not copied", "planning/make.py", 'tensor.detach().to("cpu", copy=True)', "tensor.detach()", "planning/test_plan.py"),
    Mutant("a mask judged for the first head only", "planning/needs.py", "(0, num_heads - 1)", "(0, 0)", "planning/test_tile_mask.py"),
    Mutant("FULL instead of PARTIAL", "planning/tables.py", "np.where(seen.any(1).numpy(), PARTIAL, EMPTY)", "np.where(seen.any(1).numpy(), FULL, EMPTY)", "planning/test_tile_mask.py"),
    Mutant("EMPTY instead of PARTIAL", "planning/tables.py", "np.where(seen.any(1).numpy(), PARTIAL, EMPTY)", "EMPTY", "planning/test_tile_mask.py"),
    Mutant("a quarter of a square forgotten", "planning/squares.py", "np.array([0, 1, 0, 1])", "np.array([0, 1, 0, 0])", "planning/test_tile_mask.py"),
    Mutant("last row of a FULL square dropped", "planning/tables.py", "np.searchsorted(q_tiles, rows + sides)", "np.searchsorted(q_tiles, rows + np.maximum(sides - 1, 1))", "planning/test_tile_mask.py"),
    Mutant("runs joined over the end of a row", "planning/tables.py", "| (row[1:] != row[:-1]) |", "|", "planning/test_tile_mask.py"),
    Mutant("positions of all tiles from the first", "tile_mask.py", "torch.repeat_interleave(first - starts[:-1]", "torch.repeat_interleave(first[:1] - starts[:-1]", "planning/test_tile_mask.py"),
    Mutant("sends what it needs, not what the peer needs", "planning/needs.py", "rows_of(self.sent[peer]", "rows_of(self.received[self.rank]", "ring/test_schedule.py"),
    Mutant("one hop too few", "ring/schedule.py", "range(1, num_hops + 1)", "range(1, num_hops)", "ring/test_schedule.py"),
    Mutant("wrong owner of a visiting shard", "ring/schedule.py", "owner = (rank - hop) % world_size", "owner = (rank + hop) % world_size", "ring/test_schedule.py"),
    Mutant("gradients sent home to the wrong peer", "ring/schedule.py", "Transfer(owner, hop, shard)", "Transfer(previous, hop, shard)", "ring/test_schedule.py"),
    Mutant("gradient rows of every source taken from the first", "ring/schedule.py", "offset += num_rows\n", "offset += 0\n", "ring/test_schedule.py"),
    Mutant("every rank thinks it holds the first rank's tokens", "sharding/layout.py", "np.asarray(self.chunks[rank], dtype=np.int64)", "np.asarray(self.chunks[0], dtype=np.int64)", "sharding/test_shard.py"),
    Mutant("unshard puts every part where the own belongs", "sharding/shard.py", "layout.positions(owner)", "layout.positions(rank)", "sharding/test_shard.py"),
    Mutant("gradients of unshard not summed", "sharding/shard.py", "torch.stack(_swap(parts, rank, links)).sum(dim=0)", "_swap(parts, rank, links)[rank]", "sharding/test_shard.py"),
    Mutant("only the first mask kind is balanced", "sharding/search.py", "work = np.stack([needs[kind].work for kind in kinds])", "work = np.stack([needs[kinds[0]].work for kind in kinds])", "sharding/test_balance.py"),
]  # fmt: skip
NODES = [
    Mutant("a part begins one tile late", "ring/schedule.py", "before >= end[..., None]", "before > end[..., None]", "ring/test_schedule.py -k even"),
    Mutant("all needs rounded into one stage", "ring/schedule.py", "(counts * share + phase % total)", "(counts * share)", "ring/test_schedule.py -k one_tile"),
    Mutant("both ways of a ring in one place", "ring/schedule.py", "begin = shard_len if way == 1 and 1 <= hop <= hops[0] else 0", "begin = 0", "ring/test_schedule.py -k ring"),
    Mutant("a row crosses for each rank of a node", "ring/two_level.py", "self.ids(self.passed_on.any(axis=0) & is_now)", "np.concatenate([self.ids(x & is_now) for x in self.passed_on])", "test_two_levels.py -k crosses"),
    Mutant("a smaller last node has rails that are not there", "ring/two_level.py", "% self.gpus_per_node % self.size[node]", "% self.gpus_per_node", "ring/test_schedule.py"),
    Mutant("a node's stages cut by one rank's needs", "ring/two_level.py", "self._stages(np.where(self.is_outside, -1, 0), [self.node]", "self._stages(np.where(np.arange(self.shape[0]) != self.rank, -1, 0), [self.node]", "ring/test_schedule.py"),
    Mutant("gradients of what is passed on begin with old ones", "ring/transport.py", "x.new_zeros(*x.shape[:2], num_rows, x.shape[3])", "x[:, :, :1].repeat(1, 1, num_rows, 1)", "ring/test_transport.py -k two_levels"),
    Mutant("a relay forgets its own part", "ring/two_level.py", "self.mates = [rank, *(r for r in nodes.ranks(self.node) if r != rank)]", "self.mates = [r for r in nodes.ranks(self.node) if r != rank]", "test_two_levels.py"),
    Mutant("what follows the last step is left out", "ring/transport.py", "enumerate(self.steps[-1].exchange.after, len(self.steps))", "()", "ring/test_transport.py -k two_levels"),
    Mutant("a striped shard stays with its owner", "ring/two_level.py", "np.arange(num_tiles) % self.size[self.of][:, None]", "np.arange(len(self.of))[:, None] % self.gpus_per_node", "test_two_levels.py -k striping"),
]  # fmt: skip
RING = [
    Mutant("K and V swapped on the way", "ring/transport.py", "for x, packed in zip(pair, ", "for x, packed in zip(pair[::-1], ", RANKS),
    Mutant("one receive buffer for all messages of a size", "ring/transport.py", "else like.k.new_empty(t.num_rows * width) for", "else vars(self).setdefault(t.num_rows, like.k.new_empty(t.num_rows * width)) for", RANKS),
    Mutant("stale packed buffer", "ring/transport.py", "packed[block] = messages[0][1]", "packed[block + 1] = packed.setdefault(block, messages[0][1])", RANKS),
    Mutant("a block let go before it was sent on", "ring/schedule.py", "max(last.get(transfer.block, 0), index - 1)", "max(last.get(transfer.block, 0), index - 2)", RANKS),
    Mutant("parts for the own shard added twice", "ring/transport.py", "self._grads.pop(block, [])", "self._grads.get(block, [])", RANKS),
    Mutant("arrived dV dropped", "ring/transport.py", "zip(total, part, strict=True):", "zip(total[:1], part[:1], strict=True):", RANKS),
    Mutant("arrived dK overwrites", "ring/transport.py", "stop).add_(_rows(arrived", "stop).copy_(_rows(arrived", RANKS),
    Mutant("dK and dV rounded to 16 bits on their way", "ring/backward.py", "Pair(dk, dv)", "Pair(dk.to(q.dtype).float(), dv.to(q.dtype).float())", "ring/test_transport.py"),
    Mutant("delta without the gradient of lse", "kernels/reference.py", "products.sum(dim=-1) - grad_lse[:, head]", "products.sum(dim=-1)", RANKS),
    Mutant("delta from the gradient alone", "kernels/reference.py", "out[:, head].float() * grad_out", "grad_out", RANKS),
    Mutant("state begun anew at each step", "ring/forward.py", "empty(q, v_dim) if state is None else state", "empty(q, v_dim)", RANKS),
    Mutant("what idle tokens hold is used", "ring/operator.py", "return x.masked_fill(idle.unsqueeze(-1), 0.0)", "return x", "test_probes.py"),
    Mutant("a key cleared that some head of its group sees", "ring/operator.py", ".all(dim=2)", ".any(dim=2)", "planning/test_idle.py"),
    Mutant("one half of the sequence not searched for a query that sees a key", "planning/idle.py", "np.append(lo, middle + 1), np.append(middle, hi)", "np.append(lo, lo), np.append(middle, middle)", "planning/test_idle.py"),
    Mutant("cross: keys of pads are seen", "planning/make.py", "slot = len(mod.captured) + (has_two_ends and name == \"kv_idx\")", "slot = len(mod.captured) + (has_two_ends and name == \"q_idx\")", "test_cross_attention.py -k one_dense"),
    Mutant("cross: rows of keys sent by where queries are", "planning/needs.py", "is_held = self.keys.owner[self.key_tiles.chunk] == self.rank", "is_held = np.arange(self.key_tiles.num_tiles) % 2 == self.rank % 2", "test_cross_attention.py -k one_dense"),
    Mutant("cross: squares overhang the queries alone", "planning/needs.py", "widest = max(1 << (len(line_of_row) - 1).bit_length(), int(squares.full[2].max(initial=1)))", "widest = 1 << (len(line_of_row) - 1).bit_length()", "test_cross_attention.py -k one_dense"),
    Mutant("cross: idle keys found by the queries' layout", "planning/idle.py", '(("q", keys, layout, rank % keys.world_size), ("kv", layout, keys, rank))', '(("q", keys, layout, 0), ("kv", layout, keys, rank))', "test_cross_attention.py -k one_dense"),
    Mutant("a later look at a token forgets an earlier find", "planning/idle.py", "found[points[_evaluated(mod, lo[is_point], at[is_point], b[points], h[points], axis)]] = True", "found[points] |= _evaluated(mod, lo[is_point], at[is_point], b[points], h[points], axis)", "planning/test_idle.py -k searched"),
    Mutant("cross: positions of keys where the queries are", "planning/tables.py", "(_axis(keys, block) for block in blocks)", "(_axis(tiles, block % tiles.num_tiles) for block in blocks)", "test_cross_attention.py -k one_dense"),
    Mutant("cross: tiles of keys of the mirrored rank", "planning/needs.py", "np.stack([self.key_tiles.of_chunks(held) for held in self.keys.chunks])", "np.stack([self.key_tiles.of_chunks(held) for held in self.keys.chunks[::-1]])", "test_cross_attention.py -k one_dense"),
    Mutant("chunks: pads of an earlier chunk keep their positions", "sharding/joined.py", "first[is_pad] += pads - part.end", "pass", "test_chunked_sequences.py -k one_dense"),
    Mutant("chunks: keys that are not held are taken for unseen", "planning/earlier.py", "if len(squares.full[0]) or len(squares.partial[0]):", "if False:", "test_chunked_sequences.py -k refused"),
    Mutant("chunks: queries counted from 0", "planning/make.py", "asked.layouts[size] = replace(outer, start=asked.start)", "asked.layouts[size] = outer", "test_chunked_sequences.py -k one_dense"),
    Mutant("chunks: row bounds counted from the first key that is held", "mods/row_bounds.py", "(bound + first_key)", "bound", "planning/test_rows_of_plans.py"),
    Mutant("cross: ranks may have keys laid out differently", "planning/mask_kind.py", 'facts |= {"number of keys": keys.seq_len, "layout of the keys": _described(keys)}', "pass", "test_cross_attention.py -k told"),
    Mutant("gradients of lse at idle queries are used", "ring/operator.py", "(_without(x, idle.queries) for x in (q, grad_out, grad_lse.unsqueeze(-1)))", "(*(_without(x, idle.queries) for x in (q, grad_out)), grad_lse.unsqueeze(-1))", "test_probes.py"),
    Mutant("numbers that differ are not noticed", "links/comparing.py", "extremes[:2].tolist() != [number, -number]", "False", "test_comparing.py -k hosts"),
    Mutant("a refusal without its reason", "ring/agreement.py", "links.say(number, words)  # first: whoever sees the number finds it", "pass", "test_links_like_nccl.py -k refusal"),
    Mutant("the host does not wait for a new kind of call", "ring/agreement.py", "None if new else partial", "partial", "test_links_like_nccl.py -k waits_only"),
    Mutant("a device goes on though some rank's number is another", "links/ledger.py", "self._stop_unless(extremes.sum() == 0)", "self._stop_unless(extremes.sum() >= 0)", "test_links_like_nccl.py -k told_and_stop"),
    Mutant("a rank without messages does not join the communicator", "links/comparing.py", "if opened.extremes[2]:", "if False:", "test_links_like_nccl.py -k without_messages"),
    Mutant("messages of another call are taken", "links/threads.py", "self._tag = self.num_gathered, number", "self._tag = 0, 0", "ring/test_agreement.py -k other_sizes"),
    Mutant("a call without messages ends before the others are known to make it", "ring/forward.py", "            settle()", "            pass", "ring/test_agreement.py -k other_sizes"),
    Mutant("devices of a row stop before the column has compared", "links/comparing.py", "for place in range(len(self.groups)):\n                self._start(extremes, place).wait()", "for place in range(1):\n                self._start(extremes, place).wait()", "test_comparing.py -k devices"),
    Mutant("the scale is not compared", "ring/operator.py", '"scale": scale,\n', '"scale": 0,\n', "test_refusals.py -k unlike"),
]  # fmt: skip
FORMATS = "masks_from/test_readers.py"
READERS = [
    Mutant("format: varlen aligned at the first key", "masks_from/varlen.py", "k_bounds[:-1] + used - q_bounds[1:]", "k_bounds[:-1] - q_bounds[:-1]", FORMATS),
    Mutant("format: keys that are not used count for alignment", "masks_from/varlen.py", "k_bounds[:-1] + used - q_bounds[1:]", "k_bounds[1:] - q_bounds[1:]", f"{FORMATS} -k used"),
    Mutant("format: packed masks read from the highest bit", "masks_from/bsr.py", 'bitorder="little"', 'bitorder="big"', f"{FORMATS} -k inside"),
    Mutant("format: window one token too wide", "masks_from/varlen.py", "shift[q] - before.to(q.device)", "shift[q] - before.to(q.device) - 1", FORMATS),
    Mutant("format: FlashMask aligned at the first key", "masks_from/columns.py", "k <= q + keys_before.to(q.device)", "k <= q", FORMATS),
    Mutant("format: FlashMask's upper triangle forgotten", "masks_from/columns.py", "[(column[0], last), (first, column[1])]", "[(column[0], last)]", FORMATS),
    Mutant("format: inverse causal aligned at the last key", "masks_from/ranges.py", "row + (k[:, 0] - q[:, 0])[piece]", "row + (k[:, 1] - q[:, 1])[piece]", FORMATS),
    Mutant("format: overlapping slices not noticed", "masks_from/ranges.py", "again & (start[1:] < end[:-1])", "again & (start[1:] < start[:-1])", FORMATS),
    Mutant("format: intervals counted from the first key of all", "masks_from/intervals.py", "ends = mask_func[:, 0::2] + first", "ends = mask_func[:, 0::2]", FORMATS),
    Mutant("format: intervals that touch lose the first", "masks_from/rows.py", "torch.where(touches, starts[:, :, before], starts[:, :, i])", "starts[:, :, i]", FORMATS),
    Mutant("format: heads of keys dealt to the wrong queries", "masks_from/checked.py", "table.repeat_interleave(num_heads // heads, dim=1)", "table.repeat(1, num_heads // heads, *[1] * (table.ndim - 2))", FORMATS),
    Mutant("format: blocks of one head for all", "masks_from/rows.py", "of_h[(h, *at)]", "of_h[(0, *at)]", FORMATS),
    Mutant("format: a bias taken for a mask", "masks_from/dense.py", "(seen | (mask <= HIDDEN)).all()", "True", FORMATS),
    Mutant("format: a table that hides more left out", "masks_from/block_mask.py", "proofs.all_are(EMPTY, _others(both, shape, kv_axis.count))", "True", "masks_from/test_block_mask.py"),
    Mutant("format: full blocks ask the mask_mod", "masks_from/block_mask.py", "full_is_full = proofs.all_are(FULL, full)", "full_is_full = True", "masks_from/test_block_mask.py"),
    Mutant("format: a changed BlockMask not noticed", "planning/block_masks.py", "x is y and old == new", "x is y", "masks_from/test_block_mask.py -k kept"),
    Mutant("format: counts of a box one corner short", "mods/counts.py", "count + sign * ", "count + abs(sign) * ", "mods/test_intervals.py"),
    Mutant("row bounds of a union with a gap", "mods/row_bounds.py", "torch.maximum(a.first, b.first) <= torch.minimum(a.end, b.end)", "torch.maximum(a.first, b.first) <= torch.minimum(a.end, b.end) + 9", "mods/test_row_bounds.py"),
    Mutant("row bounds of a table that does not rise", "mods/row_bounds.py", "if (key[1:] > key[:-1]).any():", "if False:", "mods/test_row_bounds.py"),
]  # fmt: skip
GRIDS = "test_two_dimensions.py -k single_heads"
HEADS = [
    Mutant("heads: all ranks of a row have those of the first", "ring/heads.py", "torch.tensor(self.rank * num_heads, ", "torch.tensor(0 * num_heads, ", GRIDS),
    Mutant("heads: only one copy of a head of keys has gradients", "ring/heads.py", "total = total + part", "pass", GRIDS),
    Mutant("heads: tokens of a row in another order", "ring/heads.py", "torch.cat(parts, dim=2)", "torch.cat(parts[::-1], dim=2)", GRIDS),
    Mutant("heads: copies of gradients are rounded before they are added", "ring/operator.py", "            if not is_part:  # else", "            if True:  # else", "test_two_dimensions.py -k bytes"),
]  # fmt: skip
REFERENCE = [
    Mutant("lse without the sum", "kernels/state.py", "state.m + state.l.log()", "state.m", "test_attention.py"),
    Mutant("sums of steps not merged", "kernels/reference.py", "l[..., rows] = l[..., rows] * decay + p.sum(dim=-1)", "l[..., rows] = p.sum(dim=-1)", "kernels/test_reference.py"),
    Mutant("old accumulator not rescaled", "kernels/reference.py", "acc[..., rows, :] * decay.unsqueeze(-1)", "acc[..., rows, :]", "kernels/test_reference.py"),
    Mutant("dQ overwritten instead of added", "kernels/reference.py", "dq[:, :, rows] += ", "dq[:, :, rows] = ", "kernels/test_reference.py"),
    Mutant("dK without the scale", "kernels/reference.py", "(ds.mT @ q_rows) * call.scale", "ds.mT @ q_rows", "kernels/test_reference.py"),
    Mutant("mods at local query positions", "kernels/reference.py", "tile_mask.q_positions[rows].long()", "torch.arange(rows.start, rows.stop, device=device)", "kernels/test_reference.py"),
    Mutant("mask not applied under a score_mod", "kernels/reference.py", "modified.masked_fill(~seen, -torch.inf) if seen is not None else modified.clone()", "modified.clone()", "kernels/test_reference.py"),
    Mutant("infinite derivatives at hidden pairs kept", "kernels/reference.py", "x.masked_fill(~seen, 0.0)", "x", "kernels/test_reference.py"),
    Mutant("gradients of groups of heads mixed", "kernels/reference.py", "b h (g r) d -> b (h g) r d", "b h (g r) d -> b (g h) r d", "kernels/test_reference.py"),
    Mutant("-inf - (-inf)", "kernels/reference.py", "m_new == -torch.inf, 0.0, m_new", "m_new == torch.inf, 0.0, m_new", "kernels/test_reference.py"),
    Mutant("captured gradients added by threads as they come", "mods/evaluate.py", "if target.is_cuda:", "if True:", "test_determinism.py"),
    Mutant("a sum divided among threads", "kernels/reference.py", "_summed_to(visible(outputs[read.output]), place)", "visible(outputs[read.output]).sum_to_size(place)", "test_determinism.py"),
]  # fmt: skip
FUSED = [
    Mutant("fused: carried state not rescaled", "kernels/forward.py", "V_COLS) * decay_old[:, None]", "V_COLS)", f"{KERNELS} -k w2"),
    Mutant("fused: largest scores in base 2", "kernels/forward.py", 'tl.store(max_ptr + at, tl.where(m > LOWEST, m * LN2,', 'tl.store(max_ptr + at, tl.where(m > LOWEST, m,', f"{KERNELS} -k w2"),
    Mutant("fused: mask not applied", "kernels/forward.py", 's = tl.where(seen, s, float("-inf"))', "pass", f"{KERNELS} -k w2"),
    Mutant("fused: maximum before the carried one", "kernels/forward.py", "m_new = tl.maximum(m, m_old)", "m_new = m", f"{KERNELS} -k w2"),
    Mutant("fused: state of unseen queries read", "kernels/forward.py", "inside & (m_old > float(\"-inf\"))", "inside", f"{KERNELS} -k saw_nothing"),
    Mutant("fused: both pieces of a row are its beginning", "kernels/scores.py", "load_block(ptr + COLS[0], ", "load_block(ptr, ", f"{KERNELS} -k pieces"),
    Mutant("fused: the last diagonals of a block forgotten", "kernels/captured.py", "(ROWS + COLS - 2) // COLS + 1", "(ROWS + COLS - 2) // COLS", f"{KERNELS} -k diagonal"),
    Mutant("fused: all numbers of a mod are its first", "mods/triton_text.py", "place = len(numbers)", "place = 0", "mods/test_triton_source.py"),
    Mutant("fused: dQ overwritten instead of added", "kernels/backward.py", "total += load_piece(dq_ptr", "total = dq[i] * scale + 0 * load_piece(dq_ptr", f"{KERNELS} -k w2"),
    Mutant("fused: dK without delta", "kernels/backward.py", "ds = p_vjp * (dp - delta)", "ds = p_vjp * dp", f"{KERNELS} -k w1"),
    Mutant("fused: next head of a group never begins", "kernels/backward.py", "h += anew.to(tl.int32)", "h += 0", f"{KERNELS} -k gqa"),
    Mutant("fused: score_mod of unscaled products", "kernels/scores.py", "score_mod(s * scale, b,", "score_mod(s, b,", f"{KERNELS} -k softcap"),
    Mutant("fused: rests of FULL runs dropped", "kernels/work.py", "full_end > whole_end", "full_end < whole_end", f"{KERNELS} -k full-"),
    Mutant("fused: rows beyond a run not masked", "kernels/forward.py", "seen = inside & mask_mod", "seen = mask_mod", f"{KERNELS} -k doc_causal"),
    Mutant("fused: negative index not wrapped", "mods/triton_math.py", "tl.where(index < 0, index + size, index)", "index", "mods/test_triton_source.py -k wrapping"),
    Mutant("fused: hidden pairs add to captured gradients", "kernels/captured.py", "part = tl.where(seen, outputs[OUTPUT], 0.0)", "part = outputs[OUTPUT]", f"{KERNELS} -k alibi"),
]  # fmt: skip
STATES = "recurrent/test_recurrences.py -k ranks_compute"
RECURRENT = [
    Mutant("recurrent: a state outlives its document", "recurrent/chain.py", "from_entry=(document == 0)", "from_entry=(document >= 0)", STATES),
    Mutant("recurrent: fragments composed rank by rank", "recurrent/recurrence.py", "everyones[:, chain.blocks(everyones.device).order]", "everyones", STATES),
    Mutant("recurrent: a convolution reaches into the document before", "recurrent/chain.py", "chain.age >= torch.arange(width + 1)[", "chain.age >= 0 * torch.arange(width + 1)[", STATES),
    Mutant("recurrent: what others ask of a summary is forgotten", "recurrent/exchange.py", "torch.stack(parts).sum(dim=0)", "parts[plan.rank]", STATES),
]  # fmt: skip
MODELS = [
    Mutant("models: the gradient of a sum over ranks is doubled", "loss.py", "        return grad, None", "        return 2 * grad, None", "test_loss.py -k as_it_is"),
    Mutant("models: the loss of a head that sees all is no share", "integrations/transformers/heads.py", 'output["loss"] / ranks', 'output["loss"]', "integrations/test_heads.py -k one_process"),
    Mutant("models: features of images change places", "integrations/transformers/multimodal.py", "rows = rows[rows >= 0]", "rows = rows[rows >= 0].flip(0)", "integrations/test_multimodal.py -k images_are"),
    Mutant("models: all heads have the slope of the first", "integrations/transformers/alibi.py", "slopes[h] * (q_idx", "slopes[h - h] * (q_idx", "integrations/test_families.py -k alibi"),
    Mutant("models: what fills up the last batch is evaluated", "integrations/accelerate.py", " if left > 0 else whole", " if left > 9**9 else whole", "integrations/test_trainer.py -k evaluation"),
]  # fmt: skip
PACKED_TREES = [
    Mutant("models: on a tree a window counts in storage", "integrations/transformers/on_trees.py", "config.sliding_window, positions=depths", "config.sliding_window", "integrations/test_tree_families.py -k along_a_path"),
    Mutant("models: on a tree positions begin at 0 whatever is given", "integrations/transformers/planning.py", "on_trees.positions_on(tree, position_ids)", "on_trees.positions_on(tree, None)", "integrations/test_tree_families.py -k begin_elsewhere"),
    Mutant("TRL: a token with several continuations predicts for one", "integrations/trl_trees.py", "index_select(1, self.shard.predictions)", "index_select(1, torch.zeros_like(self.shard.predictions))", "integrations/test_trl_trees.py -k gives_what_the_rows_give"),
    Mutant("packed trees: a token that completions share counts for one of them", "trees/packed.py", "term_idx = np.flatnonzero(by[term_tokens] >= 0)", "term_idx = np.flatnonzero(by[term_tokens] >= 0)[: len(np.unique(term_tokens))]", "trees/test_separate_forwards.py -k completions_one_by_one"),
    Mutant("packed trees: a branch is predicted by the end of the one before it", "trees/tree.py", "(starts + lengths - 1)[parents])", "starts - 1)", "trees/test_separate_forwards.py -k completions_one_by_one"),
]  # fmt: skip
PAGES = [
    Mutant("pages: parts are not weighed by their lse", "kernels/pages.py", "weight = (partials.lse[part] - base).exp()", "weight = (base - base).exp()", "kernels/test_pages.py"),
    Mutant("pages: the length of a sequence is ignored", "kernels/pages.py", "min(end - first, kv_len - position)", "end - first", "kernels/test_pages.py"),
    Mutant("pages: a fused combine does not rescale", "kernels/combining.py", "total = total * decay + tl.sum(", "total = total + tl.sum(", "kernels/test_decode_kernels.py -k edges"),
    Mutant("pages: a fused walk ignores the length", "kernels/decode.py", "tl.minimum(tl.load(runs_ptr + 3 * run + 1), kv_len - shift)", "tl.load(runs_ptr + 3 * run + 1)", "kernels/test_decode_kernels.py -k edges"),
]  # fmt: skip
PAGING = [
    Mutant("paging: keys kept by the next rank", "paging/steps.py", "np.flatnonzero(self.owner == self.pages.rank)", "np.flatnonzero(self.owner == (self.pages.rank + 1) % self.pages.world_size)", "paging/test_decode_laws.py -k tree"),
    Mutant("paging: a horizon one step short", "paging/tables.py", "(limit - start) // count - 1)", "(limit - start) // count - 2)", "paging/test_decode_laws.py -k walked"),
    Mutant("paging: pages are read that no step sees", "paging/tables.py", "page[mixed] * page_size, page_size) != EMPTY", "page[mixed] * page_size, page_size) != EMPTY - 1", "paging/test_decode_laws.py -k horizon_sees"),
    Mutant("paging: places in the pool taken for positions", "paging/tables.py", "page[begins] * page_size], axis=1)", "slot[begins] * page_size], axis=1)", "paging/test_decode_laws.py -k permutation"),
    Mutant("paging: all splits write one partial", "paging/tables.py", "first_partial = np.cumsum(tokens) - tokens", "first_partial = 0 * tokens", "paging/test_decode_laws.py -k many_sequences"),
    Mutant("paging: a child writes to its parent's page", "paging/pages.py", "            self._copy_last(made, child)\n", "            self._uses[made.owner[-1], made.slot[-1]] += 1\n", "paging/test_sequences_of_pages.py -k fork"),
    Mutant("paging: a page evicted that only the next query does not see", "paging/evidence.py", "last_query = np.int64(2**31 - 2)", "last_query = np.int64(start)", "paging/test_sequences_of_pages.py -k later"),
    Mutant("paging: evicted pages read as if they were hidden", "paging/tables.py", "        _require_hidden(mask, blocks, helds, block[gone], page[gone], page_size, names)\n", "", "paging/test_sequences_of_pages.py -k may_see"),
    Mutant("paging: a plan outlives a crop", "paging/steps.py", "if seq not in self.pages or self.pages.held(seq) is not held:", "if seq not in self.pages:", "paging/test_decode_refusals.py -k by_name"),
    Mutant("paging: sampled tokens not compared", "paging/together.py", "steps.num_done, steps.tokens_hash])", "steps.num_done, 0])", "paging/test_decode_refusals.py -k unlike"),
    Mutant("paging: a rank that refused opens the next step at its own length", "paging/together.py", "    _begun(header, links)[0].wait()\n    links.opening_bytes = 0\n", "    _begun(header, links)[0].wait()\n", "paging/test_decode_refusals.py -k in_flight"),
    Mutant("paging: of the keys that travel one page is left out", "paging/traffic.py", "& (at // at_once == wave) & (at >= 0)", "& (at // at_once == wave) & (at > 0)", "paging/test_travel.py -k token_by_token"),
    Mutant("paging: what travels is the dearer", "paging/travel.py", "tuple(k < q for q, k in", "tuple(k > q for q, k in", "paging/test_travel.py -k cheaper_of_the_two"),
    Mutant("paging: where keys travel, rows of an earlier step are read as new", "paging/divided.py", "        _put(fetched, [x.index_select(1, parcels.met) for x in (k, v)], parcels.met_rows)\n", "", "paging/test_travel.py -k token_by_token"),
    Mutant("paging: later waves of keys that travel lack new ones", "paging/parcels.py", "if new_ones_travel and wave == 0 else", "if new_ones_travel else", "paging/test_travel.py -k bounded"),
    Mutant("paging: what travels is not compared", "paging/decode_plan.py", "{kind: one.in_words for kind, one in traffic.items()}", "{}", "paging/test_travel.py -k told"),
    Mutant("paging: queries that travel to a rank without their keys count", "paging/divided.py", "            partials_of(memory, num_heads).lse.fill_(-torch.inf)\n", "            partials_of(memory, num_heads).lse.fill_(0.0)\n", "paging/test_travel.py -k equal_dense"),
]  # fmt: skip
MUTANTS = [
    *MASKS,
    *MODS,
    *PLANNER,
    *NODES,
    *RING,
    *HEADS,
    *READERS,
    *REFERENCE,
    *FUSED,
    *PAGES,
    *RECURRENT,
    *MODELS,
    *PACKED_TREES,
    *PAGING,
]


def occurrences(mutant: Mutant, root: Path = ROOT) -> int:
    return (root / "cpflex" / mutant.file).read_text().count(mutant.old)


@contextmanager
def copy_of_the_repository() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        for name in COPIED:
            source, target = ROOT / name, Path(folder) / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".*"))
            elif source.exists():
                shutil.copy(source, target)
        yield Path(folder)


def selections(tests: str) -> Iterator[list[str]]:
    """Arguments of pytest, one run per file."""
    for part in re.split(r" (?!-k )(?<!-k )", tests):
        yield [f"tests/{part.split()[0]}", *part.split()[1:]]


def run_tests(root: Path, tests: str) -> tuple[str, str]:
    """(the first test that failed or "", what pytest said)"""
    said = ""
    for selection in selections(tests):
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", "-m", "(not slow or by_day) and not gpu and not multi_gpu"]  # fmt: skip
        environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(
                [*command, *selection],
                cwd=root,
                env=environment,
                capture_output=True,
                text=True,
                timeout=patience(SECONDS),
            )
        except subprocess.TimeoutExpired:
            return f"{selection[0].removeprefix('tests/')}, which waits", "timeout"
        said = done.stdout + done.stderr
        if done.returncode == 1:
            failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+?)(\[|\s|$)", said, re.MULTILINE)
            return (failed.group(1) if failed else selection[0].removeprefix("tests/")), said
        if done.returncode != 0:
            raise RuntimeError(f"pytest could not run {selection}:\n{said}")
    return "", said


def try_out(mutant: Mutant, root: Path) -> Outcome:
    path = root / "cpflex" / mutant.file
    text, began = path.read_text(), time.perf_counter()
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        caught_by, said = run_tests(root, mutant.tests)
    finally:
        path.write_text(text)
    return Outcome(mutant, caught_by, time.perf_counter() - began, said)


def table(outcomes: Sequence[Outcome]) -> str:
    rows = [f"| {o.mutant.name} | `{o.mutant.file}` | {f'`{o.caught_by}`' if o.caught_by else '**nothing**'} | {o.seconds:.0f} |" for o in outcomes]  # fmt: skip
    return "\n".join(["| planted bug | in | caught by | seconds |", "| --- | --- | --- | --- |", *rows])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a word in the name")
    parser.add_argument("--table", type=Path, help="replace the table in this file")
    parser.add_argument("--verbose", action="store_true", help="what pytest said of survivors")
    options = parser.parse_args(arguments)
    mutants = [m for m in MUTANTS if options.only in m.name]
    misplaced = [m for m in mutants if occurrences(m) != 1]
    for mutant in misplaced:
        print(f"MISPLACED {mutant.name}: its text is found {occurrences(mutant)} times in {mutant.file}")
    outcomes = []
    with copy_of_the_repository() as root:
        for mutant in mutants:
            if mutant in misplaced:
                continue
            outcome = try_out(mutant, root)
            outcomes.append(outcome)
            print(f"{'caught  ' if outcome.caught_by else 'SURVIVED'} {outcome.seconds:4.0f} s  {mutant.name}  {outcome.caught_by}", flush=True)  # fmt: skip
            if options.verbose and not outcome.caught_by:
                print(outcome.said)
    survived = [o for o in outcomes if not o.caught_by]
    print(f"\n{table(outcomes)}\n\n{len(outcomes) - len(survived)} of {len(mutants)} caught, {len(survived)} survived")
    if options.table:
        before = options.table.read_text().split("| planted bug |")[0]
        options.table.write_text(f"{before}{table(outcomes)}\n")
    return 1 if survived or misplaced else 0


if __name__ == "__main__":
    sys.exit(main())
