"""attend and attend_backward by FlashAttention-4, the package flash-attn-4: kernels for sm_90 and sm_100 in CuTe DSL
that take any mask_mod and score_mod, and lists of blocks.

A step is one of its calls. Queries and keys are numbered from 0 in it, so the positions of a step are its first two
tables, and a mod looks up there which pair it is asked about. Its out, rounded to the dtype of q, and lse are merged
into the state; its gradients of a step are rounded to that dtype, too. The order in which its kernels add up gradients
is not fixed.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from functools import lru_cache
from importlib import metadata
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from cpflex.kernels.block_tables import block_tables
from cpflex.kernels.call import OR_PORTABLE, Call
from cpflex.kernels.parts import attend_and_finish_by, attend_by, begin_backward, no_gradients, on_device_of
from cpflex.kernels.state import State
from cpflex.kernels.tuning import capability_of
from cpflex.mods import cute
from cpflex.mods.graph import Graph
from cpflex.tile_mask import TileMask

__all__ = [
    "architecture_of",
    "attend",
    "attend_and_finish",
    "attend_backward",
    "begin_backward",
    "library",
    "prepare",
    "require_support",
]

# B batch, Hq query heads, H heads of keys and values, S local queries, K visiting keys, D and Dv head dims

PACKAGE = "flash-attn-4"
READ = "4.0.0b36"
"""The release whose signatures these calls were written for."""
_OR = OR_PORTABLE.replace(";", ", or", 1)
LONGEST_BLOCK = 256
"""Of the tables below: positions are known as far as a last block may reach."""


class Blocks(NamedTuple):
    """Queries and keys of a block, in each pass."""

    forward: tuple[int, int]
    backward: tuple[int, int]


BLOCKS: dict[int, dict[int, Blocks]] = {  # architecture, then head dim: the next one up
    90: {
        64: Blocks((192, 128), (128, 128)),
        128: Blocks((128, 128), (128, 128)),
        192: Blocks((128, 128), (128, 96)),
        256: Blocks((128, 64), (128, 64)),
    },
    100: {
        64: Blocks((256, 128), (128, 128)),
        128: Blocks((256, 128), (128, 256)),
        192: Blocks((256, 128), (128, 256)),
    },
}
"""What the kernels of that release want: multiples of their tiles."""

FORWARD = "q k v softmax_scale pack_gqa score_mod mask_mod block_sparse_tensors out lse aux_tensors"
BACKWARD = "q k v out dout lse softmax_scale dq dk dv score_mod score_mod_bwd mask_mod aux_tensors dlse"
BACKWARD += " block_sparse_tensors"


def attend(q: Tensor, k: Tensor, v: Tensor, tile_mask: TileMask, call: Call, state: State) -> None:
    """Continue ``state`` with the visiting keys, in place."""
    attend_by(_attend, q, k, v, tile_mask, call, state)


def attend_and_finish(
    q: Tensor, k: Tensor, v: Tensor, tile_mask: TileMask, call: Call, state: State | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The last step; without a state it is also the first."""
    return attend_and_finish_by(_attend, q, k, v, tile_mask, call, state)


def attend_backward(
    q: Tensor,  # [B, Hq, S, D]
    k: Tensor,  # [B, H, K, D]
    v: Tensor,  # [B, H, K, Dv]
    grad_out: Tensor,  # [B, Hq, S, Dv]
    lse: Tensor,  # [B, Hq, S] fp32, over the keys of all ranks
    delta: Tensor,  # [B, Hq, S] fp32
    tile_mask: TileMask,
    call: Call,
    dq: Tensor,  # [B, Hq, S, D]: fp32, added to in place; in the dtype of q, overwritten
    d_captured: list[Tensor],  # none: refused
) -> tuple[Tensor, Tensor]:
    """dk [B, H, K, D] and dv [B, H, K, Dv] of the visiting keys, in the dtype of dq."""
    if not tile_mask.num_tiles:
        return no_gradients(k, v, dq)
    dq_step = dq if dq.dtype == q.dtype else torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    with on_device_of(q):
        library().backward(**_backward_arguments(q, k, v, grad_out, lse, delta, tile_mask, call, dq_step, dk, dv))
    if dq_step is not dq:
        dq += dq_step
    return dk.to(dq.dtype), dv.to(dq.dtype)


def require_support(q: Tensor, v_dim: int, call: Call) -> None:
    """
    Raises:
        NotImplementedError: the package is not installed, or is another release with other arguments; another GPU,
            dtype, head dim, scale or result than it has kernels for; an operation in a mod that has no CuTe form.
    """
    library()
    architecture = architecture_of(q.device)
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise NotImplementedError(f"backend 'flash' takes bfloat16 and float16; got {q.dtype}{OR_PORTABLE}")
    blocks_of(architecture, q.shape[3], v_dim)
    if call.scale <= 0 and call.score_graph is None:
        raise NotImplementedError(f"backend 'flash' needs a scale above 0; got {call.scale}{OR_PORTABLE}")
    if call.wants_max:
        raise NotImplementedError(f"backend 'flash' does not know the largest scores; ask for lse alone{_OR}")
    cute.require_form(call.mask.graph)
    if call.score_graph is not None:
        cute.require_form(call.score_graph)


def require_backward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> None:
    """
    Raises:
        NotImplementedError: a gradient that it has no kernel for, or its order is to be fixed.
    """
    if call.wanted:
        raise NotImplementedError(
            f"backend 'flash' gives no gradient to tensors that a score_mod captures; detach them{_OR}"
        )
    if torch.are_deterministic_algorithms_enabled():
        raise NotImplementedError(
            "backend 'flash' adds up gradients in no fixed order, and torch.use_deterministic_algorithms is on"
            + OR_PORTABLE
        )
    if architecture_of(q.device) == 90 and q.shape[1] != k.shape[1] and q.shape[3] != v.shape[3]:
        raise NotImplementedError(
            "backend 'flash' has no gradient on sm_90 where query heads share keys and the head dims differ; got "
            f"{q.shape[1]} heads on {k.shape[1]}, and {q.shape[3]} and {v.shape[3]}{OR_PORTABLE}"
        )
    if call.score_vjp is not None:
        cute.require_form(call.score_vjp.graph)


def prepare(
    q: Tensor, k: Tensor, v: Tensor, tile_mask: TileMask, call: Call, passes: Any, gradients: torch.dtype | None
) -> None:
    """Compile what the call will launch, on tensors without memory."""
    kind = ("prepared", q.shape, k.shape, v.shape[3], bool(passes), gradients)
    if kind in call.decided:
        return
    if gradients is not None:
        require_backward(q, k, v, call)
    fake, (out, lse) = FakeTensorMode(), _results(q, v)
    made: list[tuple[Callable[..., Any], dict[str, Any]]] = []
    if passes:
        made += [(library().forward, _forward_arguments(q, k, v, tile_mask, call, out, lse))]
    if gradients is not None:
        likes = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        made += [(library().backward, _backward_arguments(q, k, v, out, lse, lse, tile_mask, call, *likes))]
    with on_device_of(q), fake:
        for fn, arguments in made:
            fn(**pytree.tree_map_only(Tensor, fake.from_tensor, arguments))
    call.decided[kind] = True


# -- the library


@lru_cache
def library() -> SimpleNamespace:
    """What is called of it: forward, backward, BlockSparseTensors, and the language of its mods, with the kinds of its
    registers.

    Raises:
        NotImplementedError: it is not installed, or its calls take other arguments.
    """
    try:
        release = metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        raise NotImplementedError(
            f"backend 'flash' needs the package {PACKAGE}, which is not installed: pip install 'cpflex[flash]'{_OR}"
        ) from None
    import cutlass  # type: ignore[import-not-found]
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch  # type: ignore[import-not-found]
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd  # type: ignore[import-not-found]

    found = SimpleNamespace(
        forward=_flash_attn_fwd, backward=_flash_attn_bwd, BlockSparseTensors=BlockSparseTensorsTorch, language=cutlass
    )
    require_arguments(found, release)
    return found


def require_arguments(found: SimpleNamespace, release: str) -> None:
    """
    Raises:
        NotImplementedError: the calls of a release do not take what is passed here.
    """
    for call, names in ((found.forward, FORWARD), (found.backward, BACKWARD)):
        missing = set(names.split()) - set(inspect.signature(call).parameters)
        if missing:
            raise NotImplementedError(
                f"backend 'flash' was written for {PACKAGE} {READ}; in {release}, {call.__name__} takes no "
                f"{sorted(missing)}: install that release{_OR}"
            )


def architecture_of(device: torch.device) -> int:
    """90 or 100.

    Raises:
        NotImplementedError: another device.
    """
    capability = capability_of(device)
    if capability == 90 or 100 <= capability < 110:
        return 90 if capability == 90 else 100
    name = f"sm_{capability}" if capability >= 80 else "none of these"
    raise NotImplementedError(
        f"backend 'flash' needs sm_90 or sm_100 (H100, H200, B200); {device} is {name}{OR_PORTABLE}"
    )


def blocks_of(architecture: int, head_dim: int, v_dim: int) -> Blocks:
    """The row of BLOCKS.

    Raises:
        NotImplementedError: there is none for these head dims.
    """
    rows = BLOCKS[architecture]
    is_multiple = head_dim % 8 == 0 and v_dim % 8 == 0
    if is_multiple and (max(head_dim, v_dim) <= 128 or (head_dim, v_dim) in ((192, 128), (256, 256))):
        width = next((width for width in rows if max(head_dim, v_dim) <= width), None)
        if width is not None:
            return rows[width]
    larger = "192/128 and 256" if 256 in rows else "192/128"
    raise NotImplementedError(
        f"backend 'flash' has head dims that are multiples of 8 up to 128, and {larger} on sm_{architecture}; got "
        f"{head_dim} and {v_dim}{OR_PORTABLE}"
    )


# -- a step as one call


def _attend(q: Tensor, k: Tensor, v: Tensor, tile_mask: TileMask, call: Call) -> tuple[Tensor, Tensor]:
    """out [B, Hq, S, Dv] in q's dtype and lse [B, Hq, S] fp32, over the keys of the step."""
    out, lse = _results(q, v)
    with on_device_of(q):
        library().forward(**_forward_arguments(q, k, v, tile_mask, call, out, lse))
    return out, lse


def _results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    rows = q.shape[:-1]
    return q.new_empty(*rows, v.shape[-1]), q.new_empty(rows, dtype=torch.float32)


def _forward_arguments(
    q: Tensor, k: Tensor, v: Tensor, tile_mask: TileMask, call: Call, out: Tensor, lse: Tensor
) -> dict[str, Any]:
    block = blocks_of(architecture_of(q.device), q.shape[3], v.shape[3]).forward
    tables = block_tables(tile_mask, *block)
    mods = _mods(call, q.device)
    return {
        **{name: x.transpose(1, 2) for name, x in (("q", q), ("k", k), ("v", v), ("out", out))},
        "lse": lse,
        "softmax_scale": float(call.scale),
        "pack_gqa": False,  # a block of queries is one of tokens
        "score_mod": mods.score_mod,
        "mask_mod": mods.mask_mod,
        "aux_tensors": [*_positions(tile_mask), *mods.tables],
        "block_sparse_tensors": library().BlockSparseTensors(*tables, block_size=block),
    }


def _backward_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    tile_mask: TileMask,
    call: Call,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> dict[str, Any]:
    block = blocks_of(architecture_of(q.device), q.shape[3], v.shape[3]).backward
    tables = block_tables(tile_mask, *block, rows_are="key")
    mods = _mods(call, q.device)
    by_token = {"q": q, "k": k, "v": v, "dout": grad_out, "dq": dq, "dk": dk, "dv": dv}
    # it computes delta as rowsum(out * dout) - dlse: of an out of zeros that is the delta of all ranks' keys
    by_token["out"] = torch.zeros_like(grad_out, memory_format=torch.contiguous_format)
    return {
        **{name: x.transpose(1, 2) for name, x in by_token.items()},
        "lse": lse,
        "dlse": -delta,
        "softmax_scale": float(call.scale),
        "score_mod": mods.score_mod,
        "score_mod_bwd": mods.score_mod_bwd,
        "mask_mod": mods.mask_mod,
        "aux_tensors": [*_positions(tile_mask), *mods.tables],
        "block_sparse_tensors": library().BlockSparseTensors(*tables, block_size=block),
    }


def _positions(tile_mask: TileMask) -> list[Tensor]:
    """Of queries and keys, int32, the last repeated as far as a block may reach beyond it."""
    known = vars(tile_mask)
    if "padded_positions" not in known:
        positions = tile_mask.q_positions, tile_mask.kv_positions
        known["padded_positions"] = [torch.cat([x, x[-1:].expand(LONGEST_BLOCK)]) for x in positions]
    return known["padded_positions"]


# -- the mods as its callables


class Mods(NamedTuple):
    """What FlashAttention-4 calls while it compiles, and the tables after the positions that they read."""

    mask_mod: Callable[..., Any]
    score_mod: Callable[..., Any] | None
    score_mod_bwd: Callable[..., Any] | None
    tables: list[Tensor]


def _mods(call: Call, device: torch.device) -> Mods:
    if ("mods", device) not in call.decided:
        masks, scores = cute.tables_of(call.mask.captured, device), cute.tables_of(call.captured, device)
        slots = slice(2, 2 + len(masks)), slice(2 + len(masks), None)
        score_mod = score_mod_bwd = None
        if call.score_graph is not None:
            score_mod = mod_of(call.score_graph, ("score",), slots[1])
            assert call.score_vjp is not None, "a call with a score_mod knows its vjp"
            score_mod_bwd = mod_of(call.score_vjp.graph, ("grad", "score"), slots[1])
        call.decided["mods", device] = Mods(
            mod_of(call.mask.graph, (), slots[0]), score_mod, score_mod_bwd, masks + scores
        )
    return call.decided["mods", device]


def mod_of(graph: Graph, floats: tuple[str, ...], slots: slice) -> Callable[..., Any]:
    """A graph as ``mod(*floats, b, h, q_idx, kv_idx, seqlen_info, aux_tensors)``, vectors of one element of CuTe DSL.

    Args:
        slots: its captured tensors among aux_tensors, of which the first two are the positions.
    """
    language = library().language
    order = *floats, "b", "h", "q_idx", "kv_idx", "seqlen_info", "aux_tensors"

    def mod(*given: Any, **named: Any) -> Any:  # some of them by name
        named |= dict(zip(order, given, strict=False))
        aux = named["aux_tensors"]
        scalars = {name: named[name][0] for name in (*floats, "b", "h")}
        scalars |= {"q_idx": aux[0][named["q_idx"][0]], "kv_idx": aux[1][named["kv_idx"][0]]}
        value = cute.walk(graph, language, scalars, aux[slots])[0]
        if "grad" in scalars:  # a derivative that is not finite at a hidden pair would turn its 0 into NaN
            zero = language.Float32(0.0)
            value = language.Float32(language.select_(scalars["grad"] == zero, zero, value))
        vector = language.cute.make_rmem_tensor(1, language.Float32 if floats else language.Boolean)
        vector[0] = value
        return vector.load()

    said = f"{floats} {slots} {graph.text}"
    vars(mod).update(__cute_hash__=hashlib.sha256(said.encode()).hexdigest(), __vec_size__=1)
    return mod
