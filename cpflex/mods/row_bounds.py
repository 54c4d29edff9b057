"""Row bounds: where every query sees one interval of keys, which one it is.

Causal, windows, documents, prefixes and what ``&`` makes of them are such masks: a kernel that is told the interval of
a row needs no mask at all. The graph is read once per query and once per key, never per pair.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cpflex.mods.evaluate import evaluate
from cpflex.mods.graph import Arg, GraphBuilder, Mod, Node, Ref

# Q queries, K keys

_SAFE = 2**62  # integers are moved across a comparison up to here, where nothing wraps around


class _Span(NamedTuple):
    """A truth value: of each query, the keys from ``first`` to before ``end``; int64 [Q] or []."""

    first: Tensor
    end: Tensor


class _Sum(NamedTuple):
    """A number, ``of_key[k] + of_query[q]``; [K] or [], [Q] or []."""

    of_key: Tensor
    of_query: Tensor


def row_bounds(
    mod: Mod,
    q_len: int,
    kv_len: int,
    batch_size: int = 1,
    num_heads: int = 1,
    *,
    queries: Tensor | None = None,  # int64 [q_len]
    first_key: int = 0,
) -> tuple[Tensor, Tensor] | None:
    """(first, end), int64 [B, H, q_len]: query i sees the keys ``first[i] <= kv_idx < end[i]`` and no others; both are
    0 where it sees none. B and H are 1 where the mask is the same for all.

    Args:
        queries: their positions; 0, 1, 2 ... if None.
        first_key: keys are at this position and up, before ``kv_len``.

    None if some query sees keys that are not one interval, or if the graph does not show that they are.

    >>> row_bounds(trace_mask_mod(cpflex.causal() & cpflex.sliding_window(3)), 5, 5)
    (tensor([[[0, 0, 0, 1, 2]]]), tensor([[[1, 2, 3, 4, 5]]]))
    """
    sizes = (batch_size if mod.uses("b") else 1), (num_heads if mod.uses("h") else 1)
    queries, keys = torch.arange(q_len) if queries is None else queries, torch.arange(first_key, kv_len)
    rows = []
    for b in range(sizes[0]):
        for h in range(sizes[1]):
            span = _Reader(mod, b, h, queries, keys).span
            if span is None:
                return None
            sees_none = span.first >= span.end
            bounds = ((bound + first_key).masked_fill(sees_none, 0).broadcast_to(q_len) for bound in span)
            rows.append(torch.stack(list(bounds)))
    bounds = torch.stack(rows, dim=1).view(2, *sizes, q_len)
    return bounds[0], bounds[1]


class _Reader:
    """The nodes of a mask for one batch and head index: those of one position as tensors, those of both as spans and
    sums, where they are of that form.
    """

    def __init__(self, mod: Mod, b: int, h: int, queries: Tensor, keys: Tensor) -> None:
        nodes = mod.graph.nodes
        self._nodes, self._kv_len = nodes, len(keys)
        self._needs = _positions_of(nodes)
        given = {"q_idx": queries, "kv_idx": keys}
        given |= {"b": torch.tensor(b), "h": torch.tensor(h)}
        self._alone: dict[int, Tensor] = {}
        for axis in ("q_idx", "kv_idx"):
            of_axis = [
                Ref(i) for i, names in enumerate(self._needs) if names == {axis} or (axis == "q_idx" and not names)
            ]
            found = evaluate(GraphBuilder(nodes).graph(*of_axis), mod.captured, given)
            self._alone.update(zip((ref.index for ref in of_axis), found, strict=True))
        self._values: dict[int, _Span | _Sum | None] = {}
        for i, node in enumerate(nodes):
            if i not in self._alone:
                self._values[i] = self._truth(node) if node.dtype == torch.bool else self._number(node)
        self.span = self._span(mod.graph.outputs[0])
        """None if the mask is of no form that is known here."""

    def _is_of_key(self, arg: Arg) -> bool:
        return isinstance(arg, Ref) and self._needs[arg.index] == {"kv_idx"}

    def _sum(self, arg: Arg) -> _Sum | None:
        zero = torch.tensor(0)
        if not isinstance(arg, Ref):
            return _Sum(zero, torch.tensor(arg))
        if arg.index not in self._alone:
            value = self._values[arg.index]
            return value if isinstance(value, _Sum) else None
        alone = self._alone[arg.index]
        return _Sum(alone, zero) if self._is_of_key(arg) else _Sum(zero, alone)

    def _span(self, arg: Arg) -> _Span | None:
        none, all_keys = torch.tensor(0), torch.tensor(self._kv_len)
        if not isinstance(arg, Ref):
            return _Span(none, all_keys if arg else none)
        if arg.index not in self._alone:
            value = self._values[arg.index]
            return value if isinstance(value, _Span) else None
        alone = self._alone[arg.index]
        if not self._is_of_key(arg):
            return _Span(torch.zeros_like(alone, dtype=torch.int64), torch.where(alone, all_keys, none))
        seen = alone.nonzero()[:, 0]
        if not len(seen):
            return _Span(none, none)
        return _Span(seen[0], seen[-1] + 1) if len(seen) == seen[-1] + 1 - seen[0] else None

    def _number(self, node: Node) -> _Sum | None:
        """Sums of integers, which are what a window or a diagonal compares."""
        if node.op == "cast" and node.dtype == torch.int64:
            return self._sum(node.args[0])
        if node.op not in ("add", "sub", "neg") or node.dtype != torch.int64:
            return None
        terms = [self._sum(arg) for arg in node.args]
        known = [_Sum(*(part.long() for part in term)) for term in terms if term is not None]
        if len(known) < len(terms):
            return None
        first, *rest = known
        if node.op == "neg":
            return _Sum(-first.of_key, -first.of_query)
        sign = 1 if node.op == "add" else -1
        return _Sum(first.of_key + sign * rest[0].of_key, first.of_query + sign * rest[0].of_query)

    def _truth(self, node: Node) -> _Span | None:
        op, args = node.op, node.args
        if op in _COMPARE:
            return self._compared(op, args[0], args[1])
        if op == "where":
            return self._chosen(args)
        spans = [self._span(arg) for arg in args] if op in ("and", "or", "not") else [None]
        if any(span is None for span in spans):
            return None
        first, *rest = (span for span in spans if span is not None)
        if op == "not":
            return _complement(first, self._kv_len)
        return _intersection(first, rest[0]) if op == "and" else _union(first, rest[0])

    def _chosen(self, args: tuple[Arg, ...]) -> _Span | None:
        condition, *spans = args[0], self._span(args[1]), self._span(args[2])
        if not isinstance(condition, Ref) or condition.index not in self._alone or self._is_of_key(condition):
            return None
        if spans[0] is None or spans[1] is None:
            return None
        chosen = self._alone[condition.index]
        return _Span(*(torch.where(chosen, a, b) for a, b in zip(*spans, strict=True)))

    def _compared(self, op: str, a: Arg, b: Arg) -> _Span | None:
        left, right = self._sum(a), self._sum(b)
        if left is None or right is None:
            return None
        if self._is_of_key(b) and left.of_key.ndim == 0:
            op, left, right = _MIRRORED[op], right, left
        if left.of_query.ndim == 0 and right.of_key.ndim == 0 and not (left.of_query or right.of_key):
            key, query = left.of_key, right.of_query
        else:
            parts = (*left, *right)
            if any(part.is_floating_point() or part.dtype == torch.bool for part in parts):
                return None
            if any((part >= _SAFE // 2).any() or (part <= -_SAFE // 2).any() for part in parts):
                return None
            key, query = left.of_key - right.of_key, right.of_query - left.of_query
        return _keys_where(op, key.broadcast_to(self._kv_len), query)


def _positions_of(nodes: tuple[Node, ...]) -> list[set[str]]:
    """Which of the two positions each node depends on."""
    needs: list[set[str]] = []
    for node in nodes:
        own = {str(node.args[0])} & {"q_idx", "kv_idx"} if node.op == "input" else set()
        needs.append(own.union(*(needs[arg.index] for arg in node.args if isinstance(arg, Ref))))
    return needs


_COMPARE = ("lt", "le", "gt", "ge", "eq", "ne")
_MIRRORED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq", "ne": "ne"}


def _keys_where(op: str, key: Tensor, query: Tensor) -> _Span | None:
    """Keys for which ``key[k] op query[q]``, if ``key`` only rises or only falls."""
    kind = torch.float64 if key.is_floating_point() or query.is_floating_point() else torch.int64
    key, query = key.to(kind), query.to(kind)
    if kind == torch.float64 and (key.isnan().any() or query.isnan().any()):
        return None
    if (key[1:] < key[:-1]).any():
        if (key[1:] > key[:-1]).any():
            return None
        key, query, op = -key, -query, _MIRRORED[op]
    none, all_keys = torch.tensor(0), torch.tensor(len(key))
    key = key.contiguous()
    below, up_to = (torch.searchsorted(key, query, right=right) for right in (False, True))
    match op:
        case "lt":
            return _Span(none, below)
        case "le":
            return _Span(none, up_to)
        case "gt":
            return _Span(up_to, all_keys)
        case "ge":
            return _Span(below, all_keys)
        case "eq":
            return _Span(below, up_to)
    return _complement(_Span(below, up_to), len(key))


def _intersection(a: _Span, b: _Span) -> _Span:
    return _Span(torch.maximum(a.first, b.first), torch.minimum(a.end, b.end))


def _union(a: _Span, b: _Span) -> _Span | None:
    a_empty, b_empty = a.first >= a.end, b.first >= b.end
    if not (a_empty | b_empty | (torch.maximum(a.first, b.first) <= torch.minimum(a.end, b.end))).all():
        return None
    bounds = torch.minimum(a.first, b.first), torch.maximum(a.end, b.end)
    return _Span(*(torch.where(a_empty, y, torch.where(b_empty, x, z)) for x, y, z in zip(a, b, bounds, strict=True)))


def _complement(span: _Span, kv_len: int) -> _Span | None:
    empty = span.first >= span.end
    at_start = empty | (span.first <= 0)
    if not (at_start | (span.end >= kv_len)).all():
        return None
    first = torch.where(empty, 0, torch.where(at_start, span.end, 0))
    return _Span(first, torch.where(at_start, kv_len, span.first))
