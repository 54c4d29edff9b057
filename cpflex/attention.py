"""flex_attention over a sharded sequence, and score_mod."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask

from cpflex.kernels import require_library
from cpflex.kernels.call import BACKENDS, OR_PORTABLE, SEATS
from cpflex.mods.graph import Mod, table_sizes
from cpflex.mods.trace import trace_score_mod
from cpflex.paging.calls import call_of
from cpflex.paging.checks import check_attention, check_tables
from cpflex.paging.decode import decode
from cpflex.paging.decode_plan import DecodePlan
from cpflex.planning.block_masks import plan_of
from cpflex.planning.plan import Plan
from cpflex.ring.heads import why_not_divided
from cpflex.ring.operator import attention, intern_score_mod
from cpflex.sharding.joined import Joined

ScoreFn = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ScoreMod:
    """A traced score_mod. Captured tensors are held by reference and read at each call; Python numbers are frozen."""

    def __init__(self, fn: ScoreFn) -> None:
        self.fn = fn
        self.mod: Mod = trace_score_mod(fn)
        self.key = self.mod.key
        self._interned = intern_score_mod(self.mod)
        self.captured = list(self.mod.captured)
        self._copied = [tensor.is_inference() for tensor in self.captured]  # autograd cannot save those
        self.table_lens = {name: min(table_sizes(self.mod, [name]), default=None) for name in ("q_idx", "kv_idx")}

    def __call__(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self.fn(score, b, h, q_idx, kv_idx)

    def read(self) -> list[Tensor]:
        """The captured tensors, as they are in this call."""
        return [x.clone() if copied else x for x, copied in zip(self.captured, self._copied, strict=True)]


def score_mod(fn: ScoreFn) -> ScoreMod:
    """Trace ``fn(score, b, h, q_idx, kv_idx) -> Tensor`` once and for all; positions are global. Required under
    `torch.compile`.

    Gradients flow to captured tensors that require grad: each rank gets its own part, to be reduced like a parameter's.

    >>> softcap = cpflex.score_mod(lambda score, b, h, q_idx, kv_idx: 50 * torch.tanh(score / 50))

    Raises:
        UnsupportedMod: ``fn`` is not pointwise, or uses an operation that is not supported; the error names it.
    """
    return fn if isinstance(fn, ScoreMod) else ScoreMod(fn)


def flex_attention(
    query: Tensor,  # [B, Hq, S_local, D] or [T_local, Hq, D]
    key: Tensor,  # [B, Hkv, S_local, D] or [T_local, Hkv, D]
    value: Tensor,  # [B, Hkv, S_local, Dv] or [T_local, Hkv, Dv]
    score_mod: ScoreMod | ScoreFn | None = None,
    block_mask: Plan | DecodePlan | BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: dict[str, Any] | None = None,
    *,
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, AuxOutput]:
    """Exact attention of the local queries to all ranks' keys: torch's ``flex_attention`` with a plan as its block
    mask.

    Args:
        query, key, value: this rank's tokens, as `Plan.shard` gives them; float32, bfloat16 or float16, any strides.
            All three may be packed, [T_local, H, D]: one sequence, of batch 0 in mods, neither side copied.
        score_mod: ``(score, b, h, q_idx, kv_idx) -> score`` at global positions; scores are fp32.
        block_mask: a plan of one mask kind (``plan["sliding"]`` of a plan of several), bound to its group. In a job of
            one process also a torch BlockMask, of the queries' length: it is planned once and the plan kept with it.
            With a plan of `make_decode_plan`, query is [1, Hq, N, D], the new tokens, and key and value are a pool's:
            ``flex_attention(q, pool.k, pool.v, block_mask=plan)``, forward only.
        scale: of the scores; 1 / sqrt(D) if None.
        enable_gqa: allow Hq to be a multiple of Hkv.
        return_lse: also return lse; ``return_aux=AuxRequest(lse=True)`` is torch's newer spelling.
        kernel_options: {"backend": "triton"}, fused kernels, or {"backend": "reference"}, plain torch on any device;
            torch's spelling, {"BACKEND": "TRITON"}, is the same. None, or {"BACKEND": "AUTO"}: triton for CUDA tensors
            (sm_80 or later, head dims up to 256), reference for others. {"BACKEND": "GLUON"}: on sm_90, the kernels
            written for it, for the head dims that they have. {"BACKEND": "FLASH"}: FlashAttention-4, where flash-attn-4
            is installed; {"BACKEND": "CUDNN"}: cuDNN's flex_attention, where nvidia-cudnn-frontend is, for masks of one
            interval a query; no GPU has run any of the three here yet. {"deterministic": False}: sums of backward may
            come in another order each time where that is faster: with "GLUON", and not while torch uses deterministic
            algorithms.
        return_aux: ``AuxRequest(lse=True, max_scores=True)``: also return either, or both.

    Returns:
        out [B, Hq, S_local, Dv] in the dtype of query; with ``return_lse`` (out, lse), with ``return_aux`` (out,
        AuxOutput); lse [B, Hq, S_local] is fp32, natural log, differentiable; max_scores [B, Hq, S_local], fp32, is the
        largest score of a query over all ranks' keys, after the score_mod, without gradient. A query that sees no key
        gives 0, -inf and -inf. Of packed tensors out is [T_local, Hq, Dv], lse and max_scores are [T_local, Hq].

    Raises:
        ValueError, NotImplementedError, TypeError: arguments that cannot be honoured, before anything is exchanged, on
            every rank.
        RankMismatch: the ranks were given different plans, shapes, dtypes or mods.
    """
    if isinstance(block_mask, DecodePlan):
        options = scale, enable_gqa, return_lse, kernel_options, return_aux
        return _attention_to_pages(query, key, value, score_mod, block_mask, *options)
    is_packed = _all_packed(query, key, value)
    if is_packed:
        query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    plan = _plan_of(block_mask, query) if isinstance(block_mask, BlockMask) else _require_plan(block_mask)
    try:
        _check_tensors(query, key, value, plan, enable_gqa)
        backend, deterministic = _backend(kernel_options), _is_deterministic(kernel_options)
        if backend in SEATS and not torch.compiler.is_compiling():
            require_library(backend, query.device)
            if backend == "cudnn" and plan.row_bounds is None:
                raise NotImplementedError(
                    "backend 'cudnn' needs a mask under which each query sees one interval of keys" + OR_PORTABLE
                )
        _check_aux(return_lse, return_aux)
        mod = _traced(score_mod)
        if mod is not None:
            _check_captured(mod, query, plan)
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
        if not math.isfinite(scale):
            raise ValueError(f"scale must be a finite number; got {scale}")
    except Exception as error:  # a score_mod may raise anything
        if not torch.compiler.is_compiling():  # nothing can be sent while a graph is made
            plan.refuse(error)
        raise
    captured = [] if mod is None else mod.read()
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, *captured))
    score_key = "" if mod is None else mod.key
    wants_max = return_aux is not None and return_aux.max_scores
    out, lse, max_scores, _ = attention(
        *(query, key, value, captured, plan.handle, score_key, scale, backend, deterministic, needs_grad, wants_max),
        plan.ulysses_size,
    )
    if is_packed:
        out, lse = out[0].transpose(0, 1), lse[0].transpose(0, 1)
        max_scores = max_scores[0].transpose(0, 1) if wants_max else max_scores
    if return_aux is not None:
        return out, AuxOutput(lse if return_aux.lse else None, max_scores if wants_max else None)
    return (out, lse) if return_lse else out


@torch._disable_dynamo  # type: ignore[attr-defined]
def _attention_to_pages(
    query: Tensor,  # [1, Hq, N, D]
    key: Tensor,  # [1, H, R, D], of a pool
    value: Tensor,  # [1, H, R, Dv]
    score_mod: ScoreMod | ScoreFn | None,
    plan: DecodePlan,
    scale: float | None,
    enable_gqa: bool,
    return_lse: bool,
    kernel_options: dict[str, Any] | None,
    return_aux: AuxRequest | None,
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, AuxOutput]:
    try:
        mod = _traced(score_mod)
        pool = check_attention(query, key, value, plan, enable_gqa, [] if mod is None else mod.captured)
        backend, _ = _backend(kernel_options), _is_deterministic(kernel_options)
        if backend in SEATS:
            raise NotImplementedError(f"backend {backend!r} has no kernel for pages; pass 'triton', or none")
        _check_aux(return_lse, return_aux)
        if return_aux is not None and return_aux.max_scores:
            raise NotImplementedError("the largest score is not known of an attention to pages; ask for lse alone")
        if mod is not None:
            ranks = plan.pages.world_size if plan.steps.rows.by_head else 1
            check_tables(mod.mod, plan, query.shape[1] * ranks)
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
        if not math.isfinite(scale):
            raise ValueError(f"scale must be a finite number; got {scale}")
    except Exception as error:  # a score_mod may raise anything
        plan.refuse(error)
        raise
    key_of_mod, graph, captured = ("", None, []) if mod is None else (mod.key, mod.mod.graph, mod.captured)
    call = call_of(plan, key_of_mod, graph, captured, scale, backend, query.device)
    facts = {
        "mask kind": plan.one_kind,
        "query": f"{query.dtype} {tuple(query.shape[:2])} {query.shape[3]}",
        "key and value": f"{tuple(key.shape)} {tuple(value.shape)}, {'new ones travel' if pool.pending else 'at hand'}",
        "score_mod": (key_of_mod, tuple(str((x.dtype, tuple(x.shape))) for x in captured)),
        "scale": scale,
        "backend": backend,
        "device": query.device.type,
    }
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        out, lse = decode(query, pool, plan, call, facts)
    if return_aux is not None:
        return out, AuxOutput(lse if return_aux.lse else None, None)
    return (out, lse) if return_lse else out


def _all_packed(*tensors: object) -> bool:
    """Whether they are dense [T, H, D], none of them 0; what else may be wrong is found of tensors with a batch."""
    return all(
        isinstance(x, Tensor)
        and not isinstance(x, DTensor)
        and x.layout == torch.strided
        and x.ndim == 3
        and 0 not in x.shape
        for x in tensors
    )


def _require_plan(block_mask: object) -> Plan:
    if isinstance(block_mask, Plan):
        if error := block_mask.why_not_callable:
            if not torch.compiler.is_compiling():
                block_mask.refuse(ValueError(error))
            raise ValueError(error)
        return block_mask
    raise TypeError(f"block_mask must be a plan made by cpflex.make_plan; got {type(block_mask).__name__}")


def _plan_of(block_mask: BlockMask, query: Tensor) -> Plan:
    """Of the one rank that a BlockMask can be about."""
    if torch.compiler.is_compiling():
        raise TypeError("under torch.compile, plan a BlockMask outside: plan = cpflex.make_plan(block_mask, seq_len)")
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise TypeError(
            f"block_mask is a torch BlockMask, which knows no ranks, and this job has {dist.get_world_size()}; pass "
            "cpflex.make_plan(block_mask, seq_len, group), with group=None if this rank holds the whole sequence"
        )
    if not isinstance(query, Tensor) or query.ndim != 4 or query.shape[2] != block_mask.seq_lengths[0]:
        got = tuple(query.shape) if isinstance(query, Tensor) else type(query).__name__
        raise ValueError(
            f"with a BlockMask of seq_lengths={tuple(block_mask.seq_lengths)}, query must be [B, Hq, "
            f"{block_mask.seq_lengths[0]}, D]; got {got}"
        )
    return plan_of(block_mask, query.shape[0], query.shape[1])


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, plan: Plan, enable_gqa: bool) -> None:
    named = {"query": query, "key": key, "value": value}
    for name, x in named.items():
        if isinstance(x, DTensor):
            raise TypeError(f"{name} is a DTensor; pass the local tensor, `{name}.to_local()`")
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a Tensor; got {type(x).__name__}")
        if x.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor; got {x.layout}")
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(
                f"{name} must be [B, H, S_local, D], or [T_local, H, D] as the other two; none of them 0; got shape "
                f"{tuple(x.shape)}"
            )
    _check_numbers(query, key, value)
    _check_lengths(query, key, value, plan)
    if not (query.shape[0] == key.shape[0] == value.shape[0]):
        raise ValueError(f"batch sizes differ: {[x.shape[0] for x in named.values()]}")
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"query and key must have one head dim; got {query.shape[3]} and {key.shape[3]}")
    _check_heads(query.shape[1], key.shape[1], value.shape[1], enable_gqa)
    if plan.ulysses_size > 1 and (error := why_not_divided(query.shape[1], key.shape[1], plan.ulysses_size)):
        raise ValueError(error)
    if plan.batch_size is not None and plan.batch_size != query.shape[0]:
        raise ValueError(f"the plan was made for batch_size={plan.batch_size}; query has batch size {query.shape[0]}")
    if plan.num_heads is not None and plan.num_heads != query.shape[1]:
        raise ValueError(f"the plan was made for num_heads={plan.num_heads}; query has {query.shape[1]} heads")


def _check_lengths(query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> None:
    lengths = [x.shape[2] for x in (query, key, value)]
    if lengths[1] != lengths[2]:
        raise ValueError(f"key and value must have one length; got {lengths[1]} and {lengths[2]}")
    if plan.keys is plan.layout and lengths[0] != lengths[1]:
        raise NotImplementedError(
            f"query, key and value must have one length under this plan (no KV cache); got {lengths} - keys of another "
            "sequence, or of earlier chunks, are a mask kind of their own: cpflex.cross(mask, keys), cpflex.cached"
        )
    if lengths[0] != plan.local_len:
        raise ValueError(
            f"query has {lengths[0]} tokens and the plan has local_len={plan.local_len} for seq_len={plan.seq_len} on "
            f"{plan.world_size} ranks; shard the inputs with plan.shard(x, dim)"
        )
    if lengths[1] != plan.kv_local_len:
        how = "shard keys and values with the plan that was given to cpflex.cross"
        if isinstance(plan.keys, Joined):
            how = (
                f"they are {[part.local_len for part in plan.keys.parts]} of the chunks whose plans were given to "
                "cpflex.cached and of this one, pads included"
            )
        raise ValueError(
            f"key has {lengths[1]} tokens and the plan has kv_local_len={plan.kv_local_len} for {plan.kv_seq_len} keys "
            f"{'on every rank' if plan.keys.world_size == 1 else f'on {plan.world_size} ranks'}; {how}"
        )


def _check_numbers(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.dtype != key.dtype or key.dtype != value.dtype:
        raise ValueError(f"query, key and value must have one dtype; got {query.dtype}, {key.dtype}, {value.dtype}")
    if query.dtype not in DTYPES:
        raise NotImplementedError(f"query must be float32, bfloat16 or float16; got {query.dtype}")
    if query.device != key.device or key.device != value.device:
        raise ValueError(
            f"query, key and value must be on one device; got {query.device}, {key.device}, {value.device}"
        )


def _check_heads(query_heads: int, key_heads: int, value_heads: int, enable_gqa: bool) -> None:
    if key_heads != value_heads:
        raise ValueError(f"key and value must have equally many heads; got {key_heads} and {value_heads}")
    if query_heads != key_heads and not enable_gqa:
        raise ValueError(
            f"query has {query_heads} heads and key has {key_heads}; pass enable_gqa=True for grouped queries"
        )
    if key_heads == 0 or query_heads % key_heads:
        raise ValueError(f"the heads of query must be a multiple of those of key; got {query_heads} and {key_heads}")


def _check_aux(return_lse: bool, return_aux: object) -> None:
    if return_aux is not None and not isinstance(return_aux, AuxRequest):
        raise TypeError(f"return_aux must be an AuxRequest or None; got {type(return_aux).__name__}")
    if return_lse and return_aux is not None:
        raise ValueError("pass return_lse or return_aux, not both; return_aux=AuxRequest(lse=True) is the newer")


def _backend(kernel_options: dict[str, Any] | None) -> str:
    """The backend asked for, or "" to choose by device."""
    if kernel_options is not None and not isinstance(kernel_options, dict):
        raise TypeError(f"kernel_options must be a dict or None; got {type(kernel_options).__name__}")
    options = dict(kernel_options or {})
    asked = [options.pop(name) for name in ("backend", "BACKEND") if name in options]
    options.pop("deterministic", None)
    if options:
        names = sorted(options, key=repr)
        raise NotImplementedError(f"kernel options {names} are not supported; supported: 'backend', 'deterministic'")
    if len(asked) > 1:
        raise ValueError(f"kernel_options must name one backend; got 'backend' and 'BACKEND', {asked}")
    if not asked:
        return ""
    backend = asked[0].lower() if isinstance(asked[0], str) else asked[0]
    if backend not in ("auto", *BACKENDS):
        raise ValueError(
            f"backend must be 'triton', 'gluon', 'flash', 'cudnn', 'reference' or 'auto'; got {asked[0]!r}"
        )
    return "" if backend == "auto" else backend


def _is_deterministic(kernel_options: dict[str, Any] | None) -> bool:
    """Of options that `_backend` has seen."""
    asked = (kernel_options or {}).get("deterministic", True)
    if not isinstance(asked, bool):
        raise TypeError(f"kernel option 'deterministic' must be True or False; got {asked!r}")
    return asked


def _traced(score_mod: ScoreMod | ScoreFn | None) -> ScoreMod | None:
    if score_mod is None or isinstance(score_mod, ScoreMod):
        return score_mod
    if torch.compiler.is_compiling():
        _refuse_untraced()
    if not callable(score_mod):
        raise TypeError(f"score_mod must be callable; got {type(score_mod).__name__}")
    return ScoreMod(score_mod)


def _check_captured(mod: ScoreMod, query: Tensor, plan: Plan) -> None:
    for name, held in (("q_idx", plan.layout), ("kv_idx", plan.keys)):
        table_len, end = mod.table_lens[name], held.end
        if table_len is not None and table_len < end:
            whose = "seq_len" if end == plan.layout.end else "kv_seq_len"
            whose = f"{whose}={end}" if plan.start == held.start == 0 else f"positions up to {end - 1}"
            raise ValueError(
                f"the score_mod indexes a captured tensor of {table_len} elements with a position; the plan has {whose}"
            )
    elsewhere = [x.device for x in mod.captured if x.requires_grad and x.device != query.device]
    if elsewhere:
        raise ValueError(
            f"the score_mod captures a tensor that requires grad on {elsewhere[0]}; query is on {query.device} - move "
            "it there first"
        )


def _refuse_untraced() -> NoReturn:
    raise TypeError("under torch.compile, trace the score_mod outside: softcap = cpflex.score_mod(fn)")
