"""Prove that N ranks compute what one would, on this machine, backend and dtype.

    python launch/verify.py                                       starts its ranks: one per GPU, or 2 on the CPU
    torchrun --nproc-per-node 4 launch/verify.py --device cpu     the same, started by torchrun
    python launch/verify.py --dtype bf16 --heads 32 --kv-heads 8 --head-dim 128
    python launch/verify.py --mask my_masks:strided --score-mod my_masks:cosine_bias

Every mask x score_mod x layout x schedule runs forward and backward through cpflex, and is compared on rank 0 with
dense attention of the whole sequence in fp64. The budget is derived, not tuned: N ranks may be twice as far from fp64
as one device is with dense attention of the same precision, plus one rounding. Exits with 1 on every rank if a result
is beyond it.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import cpflex
import ranks
from cpflex.attention import ScoreFn, ScoreMod
from cpflex.masks import MaskFn
from cpflex.ring.schedule import ScheduleFn
from cpflex.sharding.layout import LayoutFn
from dense import Inputs, Oracle, Results, ask, learnt_by

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = (cpflex.contiguous, cpflex.zigzag, cpflex.striped, cpflex.balanced)
SCHEDULES = (cpflex.ring, cpflex.ring_both, cpflex.direct, cpflex.gather, cpflex.auto)
SEED = 0


def main() -> None:
    options = parse_options(sys.argv[1:])
    sys.path.insert(0, os.getcwd())  # the user's modules
    if not ranks.started():
        chosen_mods(options, torch.device("cpu"))  # a mistake in them is reported once, before any rank runs
        ranks.start(__file__, sys.argv[1:], num_ranks=options.ranks, device_type=options.device)
        return
    sys.exit(0 if passes(options) else 1)


def passes(options: argparse.Namespace) -> bool:
    """Whether N ranks compute what one would, alike on every rank."""
    with ranks.joined(options.device) as (group, device):
        return verify(options, group, device)


def verify(options: argparse.Namespace, group: dist.ProcessGroup, device: torch.device) -> bool:
    """Print the table on rank 0. Whether all of it passed, alike on every rank."""
    began = time.perf_counter()
    is_first = group.rank() == 0
    torch.manual_seed(SEED)  # what the user's module draws is equal on every rank, like the inputs
    mask_fns, mods = chosen_mods(options, device)
    inputs = random_inputs(options, device)
    if is_first:
        print(header(options, group, device))
    verdicts: list[Verdict] = []
    for (mask_name, mask), (mod_name, score_mod) in product(mask_fns.items(), mods.items()):
        oracle = ask(inputs, mask, score_mod) if is_first else None
        if oracle is not None:
            print(heading(f"{mask_name}, {mod_name}", oracle))
        for layout, schedule in product(LAYOUTS, SCHEDULES):
            found = on_all_ranks(inputs, mask, score_mod, layout, schedule, group)
            if oracle is not None:
                names = (mask_name, mod_name, layout.__name__, schedule.__name__)
                verdicts.append(Verdict(*names, oracle.errors(found), oracle.limits))
                print(row(verdicts[-1]), flush=True)
    if is_first:
        print(summary(verdicts, time.perf_counter() - began))
    answer: list[Any] = [all(verdict.passed for verdict in verdicts)]
    dist.broadcast_object_list(answer, group_src=0, group=group, device=device)
    return answer[0]


def on_all_ranks(
    inputs: Inputs,
    mask: MaskFn,
    score_mod: ScoreMod | None,
    layout: LayoutFn,
    schedule: ScheduleFn,
    group: dist.ProcessGroup,
) -> Results:
    """What cpflex computes, put together on every rank. Pads hold NaN: nothing may read them."""
    batch_size, num_heads, seq_len, _ = inputs.q.shape
    plan = cpflex.make_plan(
        mask, seq_len, group, batch_size=batch_size, num_heads=num_heads, layout=layout, schedule=schedule
    )
    q, k, v, grad_out, grad_lse = (plan.shard(x, dim=2, pad_value=math.nan) for x in inputs)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    learnt = learnt_by(score_mod)
    out, lse = cpflex.flex_attention(q, k, v, score_mod, plan, enable_gqa=True, return_lse=True)
    assert isinstance(lse, Tensor), "return_lse=True returns out and lse"
    dq, dk, dv, *d_learnt = torch.autograd.grad((out, lse), (*leaves, *learnt.values()), (grad_out, grad_lse))
    for grad in d_learnt:
        dist.all_reduce(grad, group=group)  # each rank has its own part, as of any parameter
    local = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    whole = {name: plan.unshard(x.detach(), dim=2) for name, x in local.items()}
    return {**whole, **dict(zip(learnt, d_learnt, strict=True))}


# -- what is verified


def masks(seq_len: int, batch_size: int, num_heads: int) -> dict[str, MaskFn]:
    """Dense, banded, packed, per batch row, per head, and with a query that sees no key."""
    causal, window = cpflex.causal(), cpflex.sliding_window(max(1, seq_len // 8))
    documents = cpflex.document(cu_seqlens=[0, *_cuts(seq_len, 7), seq_len])
    ids = [torch.bucketize(torch.arange(seq_len), torch.tensor(_cuts(seq_len, 3 + b))) for b in range(batch_size)]
    reach = torch.tensor([max(1, seq_len >> h) for h in range(num_heads)])
    return {
        "full": cpflex.full(),
        "causal": causal,
        "sliding window": causal & window,
        "two-sided window": cpflex.sliding_window(seq_len // 16, seq_len // 5),
        "documents": documents,
        "causal documents": causal & documents,
        "causal documents, sliding window": causal & documents & window,
        "documents of each batch row": causal & cpflex.document(torch.stack(ids)),
        "prefix": cpflex.prefix_lm(seq_len // 3),
        "window of each head": lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (kv_idx > q_idx - reach[h]),
        "every third of the earlier": lambda b, h, q_idx, kv_idx: (kv_idx < q_idx) & ((q_idx - kv_idx) % 3 == 1),
    }


def score_mods(seq_len: int, num_heads: int) -> dict[str, ScoreFn | None]:
    """None, one of the score, one of positions, and one with a learnt table."""
    slopes = torch.tensor([2.0 ** (-8 * (h + 1) / num_heads) for h in range(num_heads)])
    bias = torch.randn(num_heads, 2 * seq_len, requires_grad=True)
    return {
        "no score_mod": None,
        "softcap": lambda score, b, h, q_idx, kv_idx: 2 * torch.tanh(score / 2),
        "alibi": lambda score, b, h, q_idx, kv_idx: score - slopes[h] * (q_idx - kv_idx).abs(),
        "relative bias": lambda score, b, h, q_idx, kv_idx: score + bias[h, q_idx - kv_idx + seq_len],
    }


def random_inputs(options: argparse.Namespace, device: torch.device) -> Inputs:
    """Drawn on the CPU, and so equal on every rank."""
    rows = (options.batch_size, options.heads, options.seq_len)
    num_heads = (options.heads, options.kv_heads, options.kv_heads, options.heads)
    q, k, v, grad_out = (
        torch.randn(options.batch_size, heads, options.seq_len, options.head_dim).to(device, DTYPES[options.dtype])
        for heads in num_heads
    )
    return Inputs(q, k, v, grad_out, grad_lse=torch.randn(rows).to(device))


def _cuts(seq_len: int, count: int) -> list[int]:
    """Where documents begin, but for the first: of uneven lengths, one of them a single token."""
    cuts = {round(seq_len * (i / (count + 1)) ** 1.5) for i in range(1, count + 1)}
    cuts |= {seq_len // 2, seq_len // 2 + 1}
    return sorted(cut for cut in cuts if 0 < cut < seq_len)


# -- the user's own


def chosen_mods(
    options: argparse.Namespace, device: torch.device
) -> tuple[dict[str, MaskFn], dict[str, ScoreMod | None]]:
    """The masks and score_mods to verify, by name: the user's, or those of the table; their tensors on ``device``.

    Raises:
        SystemExit: what the user named is not there, or is no mod that cpflex can trace; the message says why.
    """
    sizes = {"batch_size": options.batch_size, "num_heads": options.heads}
    try:
        with device:
            if options.mask is None:
                mask_fns = masks(options.seq_len, **sizes)
            else:
                mask_fns = {options.mask: load(options.mask, "b, h, q_idx, kv_idx", options.seq_len)}
        for mask in mask_fns.values():
            cpflex.make_plan(mask, options.seq_len, **sizes)
    except (ValueError, TypeError, NotImplementedError) as problem:
        sys.exit(f"verify: --mask {options.mask}: {problem}")
    try:
        with device:
            if options.score_mod is None:
                fns = score_mods(options.seq_len, options.heads)
            else:
                fns = {options.score_mod: load(options.score_mod, "score, b, h, q_idx, kv_idx", options.seq_len)}
        return mask_fns, {name: None if fn is None else cpflex.score_mod(fn) for name, fn in fns.items()}
    except (ValueError, TypeError, NotImplementedError) as problem:
        sys.exit(f"verify: --score-mod {options.score_mod}: {problem}")


def load(place: str, arguments: str, seq_len: int) -> Callable[..., Any]:
    """The mod at ``module:name``: a function of ``arguments``, or what a function of (seq_len) or () returns.

    Raises:
        ValueError: there is no such thing.
    """
    module_name, _, name = place.partition(":")
    if not module_name or not name:
        raise ValueError("say MODULE:NAME, for instance my_masks:strided")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as problem:
        if not f"{module_name}.".startswith(f"{problem.name}."):
            raise  # the module is there; one that it imports is not
        raise ValueError(f"no module {module_name!r} in {os.getcwd()} nor elsewhere on Python's path") from None
    if not hasattr(module, name):
        raise ValueError(f"module {module_name!r} ({getattr(module, '__file__', '')}) has no {name!r}")
    mod = getattr(module, name)
    if _arity(mod) in (0, 1):
        mod = mod(*[seq_len][: _arity(mod)])
    if _arity(mod) != len(arguments.split(",")):
        raise ValueError(f"needs a function ({arguments}), or one of (seq_len) or () that returns it; got {mod!r}")
    return mod


def _arity(fn: object) -> int | None:
    """How many arguments a function must be given; None if it is not a function."""
    if not callable(fn):
        return None
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(fn).parameters.values()
    return sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters)


# -- the table


@dataclass(frozen=True)
class Verdict:
    """One row of the table."""

    mask: str
    score_mod: str
    layout: str
    schedule: str
    errors: Mapping[str, float]
    limits: Mapping[str, float]

    @property
    def passed(self) -> bool:
        return all(self.errors[name] <= limit for name, limit in self.limits.items())  # false for NaN, too

    @property
    def used(self) -> float:
        """Part of its budget that the result nearest to it has used."""
        return max(self.errors[name] / limit for name, limit in self.limits.items())

    def __str__(self) -> str:
        return f"{self.mask}, {self.score_mod}: {self.layout}, {self.schedule}"


def header(options: argparse.Namespace, group: dist.ProcessGroup, device: torch.device) -> str:
    backend = f"NCCL on {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "gloo on the CPU"
    lines = [
        f"{group.size()} rank{'s' if group.size() > 1 else ''}, {backend}, cpflex {cpflex.__version__}, "
        f"torch {torch.__version__}",
        f"{options.dtype}, batch {options.batch_size}, {options.heads} query heads, {options.kv_heads} kv heads, "
        f"{options.seq_len} tokens, head dim {options.head_dim}",
        "errors: of the worst head, rms difference from fp64 / rms; budget: 2 x that of one device + one rounding",
    ]
    if group.size() == 1:
        lines.append("one rank exchanges nothing; to verify the exchanges, too: --device cpu --ranks 2")
    return "\n".join(lines)


def heading(title: str, oracle: Oracle) -> str:
    names = "".join(f"{name:>13}" for name in oracle.limits)
    limits = "".join(f"{limit:13.1e}" for limit in oracle.limits.values())
    return f"\n{title}\n{'':29}{names}\n{'  budget':29}{limits}"


def row(verdict: Verdict) -> str:
    errors = "".join(f"{value:13.1e}" for value in verdict.errors.values())
    return f"  {verdict.layout:11} {verdict.schedule:9} {'PASS' if verdict.passed else 'FAIL':5}{errors}"


def summary(verdicts: Sequence[Verdict], seconds: float) -> str:
    failed = [verdict for verdict in verdicts if not verdict.passed]
    lines = [f"\n{len(verdicts) - len(failed)} of {len(verdicts)} passed in {seconds:.0f} s"]
    if not failed:
        nearest = max(verdicts, key=lambda verdict: verdict.used)
        lines.append(f"nearest to its budget, {nearest.used:.0%} of it used: {nearest}")
    return "\n".join(lines + [f"FAIL {verdict}" for verdict in failed])


# -- options


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dtype", choices=DTYPES, default="fp32", help="of q, k and v (default: %(default)s)")
    add("--seq-len", type=_count, default=509, help="tokens; dense attention in fp64 must be affordable (%(default)s)")
    add("--batch-size", type=_count, default=2, help="(default: %(default)s)")
    add("--heads", type=_count, default=4, help="query heads (default: %(default)s)")
    add("--kv-heads", type=_count, default=2, help="heads of keys and values (default: %(default)s)")
    add("--head-dim", type=_count, default=32, help="(default: %(default)s)")
    add(
        "--mask",
        metavar="MODULE:NAME",
        help="verify this mask and not the table's: a mask_mod (b, h, q_idx, kv_idx) -> bool, or a function of "
        "(seq_len) or () that returns one; MODULE is looked for in the current directory first",
    )
    add(
        "--score-mod",
        metavar="MODULE:NAME",
        help="verify this score_mod and not the table's: (score, b, h, q_idx, kv_idx) -> score, or a function of "
        "(seq_len) or () that returns one; tensors are made on the rank's device unless it says otherwise",
    )
    add("--ranks", type=_count, help="how many to start, without torchrun (default: one per GPU, 2 on the CPU)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="cpu: gloo, cuda: NCCL (%(default)s)")
    options = parser.parse_args(argv)
    if options.heads % options.kv_heads:
        parser.error(f"--heads must be a multiple of --kv-heads; got {options.heads} and {options.kv_heads}")
    return options


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer; got {text!r}")
    return int(text)


if __name__ == "__main__":
    main()
