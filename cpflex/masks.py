"""Mask_mods on global token positions, and their algebra.

A mask_mod is ``(b, h, q_idx, kv_idx) -> bool Tensor``: True where the query sees the key. Those made here compose with
``&``, ``|`` and ``~``, with each other and with any plain callable of that signature, and work in torch's own
``flex_attention`` as well. Numbers are captured as 0-d tensors, so that a new window or prefix is new data and not a
new program. They are ordinary tensors also of masks made in `torch.inference_mode`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

MaskFn = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class MaskMod:
    """A mask_mod that composes: ``causal() & sliding_window(4096) | ~document(ids)``."""

    def __init__(self, fn: MaskFn, name: str, lengths: Collection[int | tuple[int, int]] = ()) -> None:
        self.fn = fn
        self.__name__ = name
        self.lengths = frozenset((one, one) if isinstance(one, int) else one for one in lengths)
        """(queries, keys) that the mask was made for; `make_plan` refuses any other."""

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self.fn(b, h, q_idx, kv_idx)

    def __and__(self, other: MaskFn) -> MaskMod:
        return _combine(self, other, lambda x, y: x & y, "&")

    def __rand__(self, other: MaskFn) -> MaskMod:
        return _combine(other, self, lambda x, y: x & y, "&")

    def __or__(self, other: MaskFn) -> MaskMod:
        return _combine(self, other, lambda x, y: x | y, "|")

    def __ror__(self, other: MaskFn) -> MaskMod:
        return _combine(other, self, lambda x, y: x | y, "|")

    def __invert__(self) -> MaskMod:
        fn = self.fn
        return MaskMod(lambda b, h, q, k: ~fn(b, h, q, k), f"~{self.__name__}", self.lengths)

    def __bool__(self) -> bool:
        raise TypeError(
            "a mask has no truth value; combine masks with `&`, `|` and `~`, not with `and`, `or` and `not`"
        )

    def __repr__(self) -> str:
        return self.__name__


def _combine(left: MaskFn, right: MaskFn, op: Callable[[Tensor, Tensor], Tensor], symbol: str) -> MaskMod:
    for side in (left, right):
        if not callable(side):
            raise TypeError(f"`{symbol}` combines masks; got {type(side).__name__}, which is not a mask_mod")
    names = [getattr(side, "__name__", type(side).__name__) for side in (left, right)]
    lengths = [length for side in (left, right) if isinstance(side, MaskMod) for length in side.lengths]
    # plain functions inside: torch.compile of torch 2.11 asks what it calls for a truth value
    f, g = (side.fn if isinstance(side, MaskMod) else side for side in (left, right))
    return MaskMod(lambda b, h, q, k: op(f(b, h, q, k), g(b, h, q, k)), f"({names[0]} {symbol} {names[1]})", lengths)


def causal() -> MaskMod:
    """Each query sees itself and what came before: ``kv_idx <= q_idx``."""
    return MaskMod(lambda b, h, q, k: k <= q, "causal")


def full() -> MaskMod:
    """Every query sees every key."""
    return MaskMod(lambda b, h, q, k: (q >= 0) & (k >= 0), "full")


@torch.inference_mode(False)
def sliding_window(window: int, right: int | None = None, *, positions: Tensor | None = None) -> MaskMod:
    """A band around the diagonal.

    ``sliding_window(w)`` is ``kv_idx > q_idx - w``: the w latest tokens, the query's own included, as Hugging Face
    counts them; it is one-sided and hides no future key, so combine it with `causal`. ``sliding_window(left, right)``
    is ``q_idx - left <= kv_idx <= q_idx + right``: tokens before and after the query's own, as FlashAttention's
    ``window_size`` counts them. Hence ``causal() & sliding_window(w)`` equals ``sliding_window(w - 1, 0)``.

    Args:
        window: tokens; at least 1 (one-sided) or 0 (two-sided).
        right: tokens after the query; None for the one-sided form.
        positions: integers [S] or [B, S] by which the window counts, if not by where tokens are stored: along the paths
            of a `tree`, its ``depths``.
    """
    window = _count(window, "window" if right is None else "left", least=1 if right is None else 0)
    at, lengths = _positions(positions)
    if right is None:
        size = torch.tensor(window)
        return MaskMod(lambda b, h, q, k: at(b, k) > at(b, q) - size.to(q.device), f"sliding_window({window})", lengths)
    before, after = torch.tensor(window), torch.tensor(_count(right, "right", least=0))
    return MaskMod(
        lambda b, h, q, k: (at(b, k) >= at(b, q) - before.to(q.device)) & (at(b, k) <= at(b, q) + after.to(q.device)),
        f"sliding_window({window}, {right})",
        lengths,
    )


@torch.inference_mode(False)
def document(
    doc_ids: Tensor | None = None,
    *,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    kv_ids: Tensor | None = None,
) -> MaskMod:
    """Packed documents: a query sees the keys of its own document.

    ``cu_seqlens=[0, 3, 8]`` packs documents of 3 and 5 tokens and draws

        111.....
        111.....
        111.....
        ...11111  (five such rows)

    Args:
        doc_ids: integers [S] or [B, S], equal within a document; any numbering. A number that comes back later is the
            same document.
        cu_seqlens: instead of ``doc_ids``: where documents start, and the end, [num_docs + 1], rising from 0 to S.
        kv_ids: documents of the keys, [S_kv] or [B, S_kv], if they are another sequence; ``doc_ids`` are then those of
            the queries, in the same numbering.

    Raises:
        ValueError: not exactly one of the two, wrong shapes, ``cu_seqlens`` that does not start at 0 or falls.
    """
    if (doc_ids is None) == (cu_seqlens is None):
        raise ValueError("document() takes exactly one of doc_ids and cu_seqlens")
    if kv_ids is not None:
        return _documents_of_two(doc_ids, kv_ids)
    ids = _renumber(doc_ids) if doc_ids is not None else _ids_of(torch.as_tensor(cu_seqlens))
    if ids.ndim == 1:
        return MaskMod(lambda b, h, q, k: ids[q] == ids[k], "document", [ids.shape[0]])
    return MaskMod(lambda b, h, q, k: ids[b, q] == ids[b, k], "document", [ids.shape[1]])


def _documents_of_two(doc_ids: Tensor | None, kv_ids: Tensor) -> MaskMod:
    if doc_ids is None or doc_ids.ndim != kv_ids.ndim or doc_ids.shape[:-1] != kv_ids.shape[:-1]:
        got = "cu_seqlens" if doc_ids is None else f"{tuple(doc_ids.shape)} and {tuple(kv_ids.shape)}"
        raise ValueError(f"kv_ids go with doc_ids of the queries, both [S] or [B, S] of one B; got {got}")
    lengths = doc_ids.shape[-1], kv_ids.shape[-1]
    q_ids, k_ids = (x.contiguous() for x in _renumber(torch.cat([doc_ids, kv_ids], dim=-1)).split(lengths, dim=-1))
    if doc_ids.ndim == 1:
        return MaskMod(lambda b, h, q, k: q_ids[q] == k_ids[k], "document", [lengths])
    return MaskMod(lambda b, h, q, k: q_ids[b, q] == k_ids[b, k], "document", [lengths])


def _ids_of(cu_seqlens: Tensor) -> Tensor:
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens must be integers [num_docs + 1]; got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    lengths = cu_seqlens.diff()
    if cu_seqlens[0] != 0 or (lengths < 0).any():
        raise ValueError(
            "cu_seqlens must start at 0 and never fall: the start of each document, then the sequence length"
        )
    # repeat_interleave leaves out empty documents: nobody sees them
    return torch.repeat_interleave(torch.arange(lengths.numel(), dtype=torch.int32, device=cu_seqlens.device), lengths)


def _renumber(doc_ids: Tensor) -> Tensor:
    """Documents counted by first occurrence: ids rise along the sequence, which makes ranges of them tell tiles
    apart.
    """
    if doc_ids.ndim not in (1, 2) or doc_ids.is_floating_point() or doc_ids.numel() == 0:
        raise ValueError(f"doc_ids must be integers [S] or [B, S]; got {doc_ids.dtype} {tuple(doc_ids.shape)}")
    if doc_ids.ndim == 2:
        return torch.stack([_renumber(row) for row in doc_ids])
    _, inverse = torch.unique(doc_ids, return_inverse=True)
    first = torch.full((int(inverse.max()) + 1,), doc_ids.numel(), device=doc_ids.device)
    first.scatter_reduce_(0, inverse, torch.arange(doc_ids.numel(), device=doc_ids.device), "amin")
    return first.argsort().argsort()[inverse].int()


@torch.inference_mode(False)
def prefix_lm(prefix_len: int, *, positions: Tensor | None = None) -> MaskMod:
    """Causal, and every query sees the first ``prefix_len`` tokens (UniLM, arXiv:1905.03197, section 3.1).

    Args:
        positions: integers [S] or [B, S] by which these are the first, if not by where tokens are stored: with
            positions inside of documents, ``prefix_lm(p, positions=...) & document(...)`` gives each a prefix.
    """
    length = torch.tensor(_count(prefix_len, "prefix_len", least=0))
    at, lengths = _positions(positions)
    return MaskMod(lambda b, h, q, k: (k <= q) | (at(b, k) < length.to(q.device)), f"prefix_lm({prefix_len})", lengths)


def _positions(given: Tensor | None) -> tuple[Callable[[Tensor, Tensor], Tensor], list[int]]:
    """(b, idx) -> the position by which a mask counts, and the sequence length that it is for."""
    if given is None:
        return lambda b, idx: idx, []
    if not isinstance(given, Tensor) or given.ndim not in (1, 2) or 0 in given.shape or not is_integral(given):
        got = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"positions must be a tensor of integers [S] or [B, S]; got {got}")
    table = given.long()
    if table.ndim == 1:
        return lambda b, idx: table[idx], [len(table)]
    return lambda b, idx: table[b, idx], [table.shape[1]]


def is_integral(tensor: Tensor) -> bool:
    """Of an integer dtype, signed or not; True and False are no integers."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def is_count(value: object, least: int) -> bool:
    """An integer of at least ``least``; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _count(value: int, name: str, least: int) -> int:
    if not is_count(value, least):
        raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}")
    if value >= 2**62:
        raise ValueError(f"{name} must be below 2**62; got {value}")
    return value
