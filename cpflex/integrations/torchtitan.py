"""torchtitan: its FlexAttention layers, full and sliding, through its own seam for context parallelism.

>>> from cpflex.integrations.torchtitan import inner_attention_map, load_balancer
>>> transform = ContextParallelTransform(inner_attention_map=inner_attention_map())
>>> balancer = load_balancer().Config()                        # in the place of head-tail or PTRR

torchtitan permutes the tokens of a batch, gives each rank an equal contiguous piece, and makes a BlockMask for each
kind of layer. Here, a plan is made from the BlockMask's ``mask_mod`` and the permutation: score_mods and masks see
positions of the unpermuted sequence, K/V is exchanged instead of gathered, and packed documents, sliding windows,
sinks (``out_transform``) and score_mods work. Head dims, GQA and tensor parallelism stay as they are.

torchtitan is looked up when a function here is called, not when it is imported, as the seam has been renamed several
times: the newest sources call it ``CPAttention``, the main branch of September 2026 ``CPInnerAttention``. No release
up to 0.3.0 has it.

torchtitan checks balancers against lists of its own attentions. Where it refuses cpflex's, leave its
``context_parallel_load_balancer`` None: contiguous pieces, which are computed right, in unequal shares.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from cpflex import Layout, Plan, balanced, flex_attention, make_plan
from cpflex.attention import ScoreFn, ScoreMod
from cpflex.masks import MaskFn

# S tokens of the whole sequence, T of this rank, H query heads, G heads of keys, K and V head dims, as in torchtitan

LEAST_RUN = 16
"""Tokens that a permutation must keep together: the granularity of tensor-core tiles."""

SEAMS = ("CPAttention", "CPInnerAttention")
"""What torchtitan calls an attention over the ranks of a sequence: the newer name, and the older one."""

HOMES = {
    "CPAttention": ("models.common.attention.cp_attention",),
    "CPInnerAttention": ("models.common.attention.cp_attention", "models.common.cp_attention"),
    "FlexInnerAttention": ("models.common.attention",),
    "SlidingWindowFlexInnerAttention": ("models.common.attention",),
    "ContextParallelLoadBalancer": ("distributed.context_parallel", "distributed.context_parallel.api"),
    "spmd_mesh_group": ("distributed.spmd_types",),
}
"""Modules of torchtitan that have, or had, each name."""


def inner_attention_map() -> dict[type, type]:
    """torchtitan's inner attentions and their context-parallel ones, for its ``ContextParallelTransform``.

    Raises:
        ImportError: the installed torchtitan has no such seam; the error says which versions do.
    """
    names = ("FlexInnerAttention", "SlidingWindowFlexInnerAttention")
    return {local: _over_ranks(local, _titan(*SEAMS)) for local in map(_titan, names)}


def load_balancer() -> type:
    """A load balancer for torchtitan's configuration: `balanced` for all mask kinds that torchtitan shows it.

    With it, ranks have equal work and need few foreign keys. Without it, cpflex computes on whatever permutation
    torchtitan is configured with. The newest sources show it the mask of the first layer alone.

    Raises:
        ImportError: as `inner_attention_map`.
    """
    return _balancer(_titan("ContextParallelLoadBalancer"))


@dataclass(frozen=True, eq=False)
class LocalPlan:
    """A rank's plan, and how torchtitan's order of its tokens differs from the plan's: that of the sequence."""

    plan: Plan
    order: Tensor | None  # int64 [T]: where each of the plan's tokens is; None if the orders are the same
    back: Tensor | None  # int64 [T]: its inverse


def local_plan(block_mask: BlockMask, permutation: Tensor | None, group: dist.ProcessGroup) -> LocalPlan:
    """Plan a batch whose tokens torchtitan has permuted and cut into equal pieces.

    Args:
        block_mask: of the whole unpermuted sequence; only its ``mask_mod``, length and number of heads are read.
        permutation: int64 [1, S], the token at each place; None if tokens stay where they are.

    Raises:
        ValueError, NotImplementedError: masks and permutations that cannot be honoured.
    """
    if not isinstance(block_mask, BlockMask):
        raise TypeError(f"the attention metadata must be a BlockMask; got {type(block_mask).__name__}")
    (batch_size, num_heads), (seq_len, kv_len) = block_mask.kv_num_blocks.shape[:2], block_mask.seq_lengths
    if seq_len != kv_len or batch_size != 1:
        raise NotImplementedError(
            f"the BlockMask must be of one sequence and itself; got batch size {batch_size}, {seq_len} queries, "
            f"{kv_len} keys"
        )
    tokens = _tokens(permutation, seq_len, group.size())
    layout = _layout(tokens)
    plan = make_plan(block_mask.mask_mod, seq_len, group, batch_size=1, num_heads=num_heads, layout=lambda *_: layout)
    order = np.argsort(tokens[group.rank()])
    if (np.diff(order) == 1).all():
        return LocalPlan(plan, None, None)
    device = block_mask.kv_num_blocks.device
    order, back = (torch.from_numpy(indices).to(device) for indices in (order, np.argsort(order)))
    return LocalPlan(plan, order, back)


def attend(
    query: Tensor,  # [T, H, K]
    key: Tensor,  # [T, G, K]
    value: Tensor,  # [T, G, V]
    local: LocalPlan,
    *,
    score_mod: ScoreMod | ScoreFn | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    kernel_options: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """out [T, H, V] and lse [T, H] of the local tokens, in torchtitan's order of them."""
    query, key, value = (
        (x if local.order is None else x.index_select(0, local.order)).transpose(0, 1).unsqueeze(0)
        for x in (query, key, value)
    )
    both = flex_attention(
        query, key, value, score_mod, local.plan, scale, enable_gqa, return_lse=True, kernel_options=kernel_options
    )
    out, lse = (x.squeeze(0).transpose(0, 1) for x in cast("tuple[Tensor, Tensor]", both))
    return (out, lse) if local.back is None else (out.index_select(0, local.back), lse.index_select(0, local.back))


def balanced_permutation(masks: Mapping[Any, MaskFn], seq_len: int, world_size: int, num_heads: int = 1) -> Tensor:
    """int64 [1, S]: the token at each place, such that equal pieces of it are the ranks' tokens of `balanced`.

    Raises:
        ValueError: the sequence would need padding, which torchtitan has no place for.
    """
    kinds = {f"kind {index}": mask for index, mask in enumerate(masks.values())}
    plan = make_plan(kinds, seq_len, rank=0, world_size=world_size, batch_size=1, num_heads=num_heads, layout=balanced)
    positions = np.concatenate([plan.layout.positions(rank) for rank in range(world_size)])
    if len(positions) != seq_len:
        raise ValueError(
            f"seq_len must divide into equal chunks of a multiple of {LEAST_RUN} tokens on {world_size} ranks; got "
            f"{seq_len} - use a multiple of {4 * LEAST_RUN * world_size}"
        )
    return torch.from_numpy(positions).unsqueeze(0)


def _tokens(permutation: Tensor | None, seq_len: int, world_size: int) -> np.ndarray:
    """The tokens of each rank in torchtitan's order, int64 [world_size, T]."""
    if seq_len % world_size:
        raise ValueError(f"torchtitan gives {world_size} ranks equal pieces; got a sequence of {seq_len} tokens")
    if permutation is None:
        return np.arange(seq_len).reshape(world_size, -1)
    if tuple(permutation.shape) != (1, seq_len):
        raise NotImplementedError(
            f"the permutation must be of all rows alike, [1, {seq_len}]; got shape {tuple(permutation.shape)}"
        )
    return permutation[0].cpu().numpy().reshape(world_size, -1)


def _layout(tokens: np.ndarray) -> Layout:
    """The longest chunks that these ranks hold, in any order."""
    seq_len, local_len = tokens.size, tokens.shape[1]
    for chunk_len in sorted((n for n in range(1, local_len + 1) if local_len % n == 0), reverse=True):
        runs = tokens.reshape(-1, chunk_len)
        if (runs[:, 0] % chunk_len == 0).all() and (np.diff(runs, axis=1) == 1).all():
            if chunk_len < min(LEAST_RUN, local_len):
                break
            chunks = np.sort(runs[:, 0].reshape(len(tokens), -1) // chunk_len, axis=1)
            return Layout(seq_len, chunk_len, tuple(map(tuple, chunks.tolist())), "torchtitan")
    raise NotImplementedError(
        f"the permutation moves runs of fewer than {LEAST_RUN} tokens; use cpflex's load_balancer(), or head-tail with "
        f"a sequence length that is a multiple of {2 * LEAST_RUN * len(tokens)}"
    )


@cache
def _over_ranks(local_attention: type, cp_attention: type) -> type:
    """The context-parallel twin of one of torchtitan's inner attentions: the same configuration."""
    known, wanted = ({field.name for field in fields(of.Config)} for of in (local_attention, cp_attention))
    if wanted - known:
        raise ImportError(f"this torchtitan's context parallelism is configured by {wanted - known}, unknown to cpflex")
    if wanted and sys.version_info < (3, 11):
        raise ImportError(f"a configuration that is also a {cp_attention.__name__}'s joins slots: use Python 3.11")

    class OverRanks(cp_attention, local_attention):
        @dataclass(kw_only=True, slots=True)
        class Config(cp_attention.Config, local_attention.Config):  # torchtitan finds its attentions by these
            pass

        @staticmethod
        def prepare_cp_metadata(attention_metadata: BlockMask, *, permutation: Tensor | None) -> LocalPlan:
            return local_plan(attention_metadata, permutation, _cp_group())

        def forward(
            self,
            q_THK: Tensor,
            k_THK: Tensor,
            v_THV: Tensor,
            *,
            attention_metadata: LocalPlan,
            score_mod: ScoreMod | ScoreFn | None = None,
            scale: float | None = None,
            enable_gqa: bool = False,
            out_transform: Callable[[Tensor, Tensor], Tensor] | None = None,
            **unknown: Any,
        ) -> Tensor:
            if unknown:
                raise NotImplementedError(f"arguments {sorted(unknown)} are not supported by {type(self).__name__}")
            if not isinstance(attention_metadata, LocalPlan):
                raise TypeError(
                    f"attention_metadata must come from prepare_cp_metadata; got {type(attention_metadata).__name__}"
                )
            spmd = importlib.import_module("spmd_types")
            with spmd.no_typecheck():
                out, lse = attend(
                    q_THK,
                    k_THK,
                    v_THV,
                    attention_metadata,
                    score_mod=score_mod,
                    scale=scale,
                    enable_gqa=enable_gqa,
                    kernel_options=self.kernel_options,
                )
            if spmd.is_type_checking():  # sharded like the queries; lse without their last dim
                spec = spmd.get_partition_spec(q_THK)
                spmd.assert_type(out, spmd.get_local_type(q_THK), spec)
                lse_spec = None if spec is None else spmd.PartitionSpec(*spec[:-1])
                spmd.assert_type(lse, spmd.get_local_type(q_THK), lse_spec)
            return out if out_transform is None else out_transform(out, lse)

    if unknown := sorted(OverRanks.__abstractmethods__):
        raise ImportError(f"this torchtitan's {cp_attention.__name__} is to have {unknown}, unknown to cpflex")
    OverRanks.__name__ = OverRanks.__qualname__ = f"Cpflex{local_attention.__name__}"
    return OverRanks


@cache
def _balancer(base: type) -> type:
    class CpflexLoadBalancer(base):
        @dataclass(kw_only=True, slots=True)
        class Config(base.Config):
            pass

        def __init__(self, config: Config, *, seq_len: int, attention_metadata: object) -> None:
            found = attention_metadata if isinstance(attention_metadata, Mapping) else {"mask": attention_metadata}
            self.masks = {kind: mask for kind, mask in found.items() if isinstance(mask, BlockMask)}
            if not self.masks:
                raise ValueError(f"balancing needs the BlockMask of at least one kind of layer; got {list(found)}")
            self.seq_len, self.world_size = seq_len, _cp_group().size()

        def generate_permutation(self) -> Tensor:
            tables = [mask.kv_num_blocks for mask in self.masks.values()]
            num_heads = max(table.shape[1] for table in tables)
            mods = {kind: mask.mask_mod for kind, mask in self.masks.items()}
            return balanced_permutation(mods, self.seq_len, self.world_size, num_heads).to(tables[0].device)

    return CpflexLoadBalancer


def _cp_group() -> dist.ProcessGroup:
    group = _titan("spmd_mesh_group")("cp")
    if group is None:
        raise RuntimeError("torchtitan's current mesh has no context-parallel axis of more than one rank")
    return group


def _titan(*names: str) -> Any:
    """What torchtitan has under these names; of two classes the one that is also the other."""
    if found := [x for name in names if (x := _found(name)) is not None]:
        return max(found, key=lambda x: len(x.__mro__)) if len(found) > 1 else found[0]
    try:
        installed = f"torchtitan {version('torchtitan')}"
    except PackageNotFoundError:
        installed = "no torchtitan"
    raise ImportError(
        f"{installed} is installed, which has no {' and no '.join(names)}; cpflex needs torchtitan's context-parallel "
        "attentions as its main branch has had them since September 2026, under either name, which no release up to "
        "0.3.0 has - pip install git+https://github.com/pytorch/torchtitan"
    )


def _found(name: str) -> Any:
    """A name of torchtitan, from the first of its homes that has it; None if none has."""
    for home in HOMES[name]:
        try:
            module = importlib.import_module(f"torchtitan.{home}")
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("torchtitan"):
                raise
            continue
        if hasattr(module, name):
            return getattr(module, name)
    return None
