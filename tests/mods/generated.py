"""Generated device functions against the evaluator, interpreted or compiled, and the mods that they are tried on."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from cases import MASKS, SCORES, Problem
from cpflex.mods.evaluate import evaluate, wrapped_indices
from cpflex.mods.graph import Graph, Mod, Ref
from cpflex.mods.trace import trace_mask_mod, trace_score_mod
from cpflex.mods.triton_source import Generated, mask_function, pack_captured, score_function, source_of, vjp_function
from cpflex.mods.vjp import Vjp, vjp

BLOCK_Q, BLOCK_KV = 16, 32
BATCH, HEADS = 2, 4
PROBLEM = Problem(seq_len=321, heads="gqa", batch_size=BATCH)
LAST_POSITION = 2**31 - 2

np.seterr(all="ignore")


# -- kernels


@triton.jit
def mask_kernel(
    out_ptr,  # bool [B * H, BLOCK_Q, BLOCK_KV]
    q_ptr,
    kv_ptr,
    numbers,
    buffers,
    sizes,
    MASK: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    rows, cols = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_KV)
    if TRANSPOSED:
        rows, cols = rows[None, :], cols[:, None]
    else:
        rows, cols = rows[:, None], cols[None, :]
    pid = tl.program_id(0)
    seen = MASK(pid // HEADS, pid % HEADS, tl.load(q_ptr + rows), tl.load(kv_ptr + cols), numbers, buffers, sizes)
    tl.store(out_ptr + (pid * BLOCK_Q + rows) * BLOCK_KV + cols, seen)


@triton.jit
def score_kernel(
    out_ptr,  # [NUM_OUTPUTS, B * H, BLOCK_Q, BLOCK_KV] fp32, and integers [...] int32
    ints_ptr,
    score_ptr,  # [BLOCK_Q, BLOCK_KV], as grad
    grad_ptr,
    q_ptr,
    kv_ptr,
    numbers,
    buffers,
    sizes,
    SCORE: tl.constexpr,
    VJP: tl.constexpr,
    NUM_OUTPUTS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    rows, cols = tl.arange(0, BLOCK_Q)[:, None], tl.arange(0, BLOCK_KV)[None, :]
    at = rows * BLOCK_KV + cols
    pid = tl.program_id(0)
    b, h, q_idx, kv_idx = pid // HEADS, pid % HEADS, tl.load(q_ptr + rows), tl.load(kv_ptr + cols)
    score, grad = tl.load(score_ptr + at), tl.load(grad_ptr + at)
    at += pid * BLOCK_Q * BLOCK_KV
    tl.store(out_ptr + at, SCORE(score, b, h, q_idx, kv_idx, numbers, buffers, sizes))
    if VJP is not None:
        outputs = VJP(grad, score, b, h, q_idx, kv_idx, numbers, buffers, sizes)
        for i in tl.static_range(NUM_OUTPUTS):
            at += tl.num_programs(0) * BLOCK_Q * BLOCK_KV
            if outputs[i].dtype == tl.float32:
                tl.store(out_ptr + at, tl.broadcast_to(outputs[i], score.shape))
            else:
                tl.store(ints_ptr + at, tl.broadcast_to(outputs[i], score.shape))


# -- comparisons; each returns nothing, or raises


def _inputs(q_idx: Tensor, kv_idx: Tensor) -> dict[str, Tensor]:
    b, h = (torch.arange(n, device=q_idx.device) for n in (BATCH, HEADS))
    return {"b": b.view(-1, 1, 1, 1), "h": h.view(-1, 1, 1), "q_idx": q_idx.long()[:, None], "kv_idx": kv_idx.long()}


def _positions(device: str, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Some of a sequence in any order, and some far beyond it."""
    far = [0, 1, 2**30, 2**31 - 7, LAST_POSITION]
    q = [rng.randrange(PROBLEM.seq_len) for _ in range(BLOCK_Q - 3)] + rng.sample(far, 3)
    kv = [rng.choice(q) for _ in range(8)] + [rng.randrange(PROBLEM.seq_len) for _ in range(BLOCK_KV - 11)]
    kv += rng.sample(far, 3)
    q_idx, kv_idx = (torch.tensor(x, dtype=torch.int32, device=device) for x in (q, kv))
    return q_idx, kv_idx


def check_mask(name: str, device: str = "cpu") -> None:
    mod = trace_mask_mod(all_masks()[name])
    for transposed in (False, True):
        _check_mask_mod(mod, random.Random(name), transposed, device)


def _check_mask_mod(mod: Mod, rng: random.Random, transposed: bool, device: str = "cpu") -> None:
    q_idx, kv_idx = _positions(device, rng)
    shape = (BATCH, HEADS, BLOCK_Q, BLOCK_KV)
    captured = [t.to(device) for t in mod.captured]
    expected = evaluate(mod.graph, captured, _inputs(q_idx, kv_idx))[0].expand(shape)
    out = torch.zeros(shape, dtype=torch.bool, device=device)
    function, numbers = mask_function(mod.graph)
    mask_kernel[(BATCH * HEADS,)](
        out, q_idx, kv_idx, numbers, *pack_captured(captured, device),
        MASK=function, HEADS=HEADS, BLOCK_Q=BLOCK_Q, BLOCK_KV=BLOCK_KV, TRANSPOSED=transposed,
        enable_fp_fusion=False,
    )  # fmt: skip
    wrong = (out != expected).nonzero().tolist()
    where = [(b, h, q_idx[q].item(), kv_idx[k].item(), out[b, h, q, k].item()) for b, h, q, k in wrong[:5]]
    assert not wrong, f"{len(wrong)} wrong, the first at (b, h, q_idx, kv_idx, got) {where}\n{source_of(mod.graph)}"


SPECIAL = [
    0.0,
    -0.0,
    float("inf"),
    -float("inf"),
    float("nan"),
    1.0,
    -1.0,
    0.5,
    1.5,
    2.5,
    -0.5,
    -1.5,
    -2.5,
    1e-30,
    -1e-30,
]
SPECIAL += [3.0, -3.0, 7.0, 88.0, -88.0, 8388609.0, 16777216.0, -16777217.0, 2.0**31, 1e30, -1e30]


def _scores(special: bool) -> Tensor:
    rng = torch.Generator().manual_seed(7)
    scores = torch.randn(BLOCK_Q * BLOCK_KV, generator=rng)
    if special:
        scores *= torch.exp(2 * torch.randn(BLOCK_Q * BLOCK_KV, generator=rng))
        scores[: len(SPECIAL)] = torch.tensor(SPECIAL)
    return scores.view(BLOCK_Q, BLOCK_KV)


def check_score(name: str, device: str = "cpu") -> None:
    """A score_mod that people use, and its derivatives with respect to the score and all that it captured."""
    # a few roundings of the largest number in sight
    _check_score_mod(trace_score_mod(all_scores()[name]), special=False, ulps=8, absolute=True, device=device)


def check_operation(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
    """One operation in a dtype, on ordinary and special values, bit by bit almost."""
    operation, other = OPERATIONS[name], _scores(special=True).view(-1)[:64].to(dtype)

    def mod(score, b, h, q, k):
        return operation(score.to(dtype), other[k % 64])

    # what torch and Triton round differently may fall on either side of a boundary between 16-bit floats
    ulps = {torch.bfloat16: 2.0**16, torch.float16: 2.0**13}.get(dtype, 4)
    _check_score_mod(trace_score_mod(mod), special=True, ulps=ulps, absolute=False, device=device)


def _check_score_mod(mod: Mod, *, special: bool, ulps: float, absolute: bool, device: str) -> None:
    rng = random.Random(str(mod.graph))
    q_idx, kv_idx = (x % (PROBLEM.seq_len + 1) for x in _positions(device, rng))
    scores, grads = _scores(special).to(device), _scores(special=False).flip(0).contiguous().to(device)
    captured = [t.detach().to(device) for t in mod.captured]
    wanted = tuple(i for i, t in enumerate(captured) if t.is_floating_point())
    derivative = None if special else vjp(mod.graph, wanted)
    inputs = {"score": scores, "grad": grads, **_inputs(q_idx, kv_idx)}
    expected = evaluate(mod.graph, captured, inputs)
    expected += _places(derivative, captured, inputs) if derivative is not None else []
    shape = (len(expected), BATCH, HEADS, BLOCK_Q, BLOCK_KV)
    out, ints = torch.zeros(shape, device=device), torch.zeros(shape, dtype=torch.int32, device=device)
    score, numbers = score_function(mod.graph)
    score_vjp, numbers = Generated(None, numbers) if derivative is None else vjp_function(derivative)
    score_kernel[(BATCH * HEADS,)](
        out, ints, scores, grads, q_idx, kv_idx, numbers, *pack_captured(captured, device),
        SCORE=score, VJP=score_vjp,
        NUM_OUTPUTS=len(expected) - 1, HEADS=HEADS, BLOCK_Q=BLOCK_Q, BLOCK_KV=BLOCK_KV, enable_fp_fusion=True,
    )  # fmt: skip
    for i, reference in enumerate(expected):
        reference = reference.expand(shape[1:])
        source = source_of(mod.graph if i == 0 or derivative is None else derivative)
        if not reference.is_floating_point():
            assert torch.equal(ints[i], reference.int()), f"output {i}\n{source}"
            continue
        size = reference[reference.isfinite()].abs().max().item() if absolute else 0.0
        error = 2.0**-23 * ulps
        closeness = {"rtol": error, "atol": error * size + 2.0**-126, "equal_nan": True}
        torch.testing.assert_close(out[i], reference, **closeness, msg=_explained(i, source))


def _explained(output: int, source: str) -> Callable[[str], str]:
    return lambda message: f"output {output}: {message}\n{source}"


def _places(derivative: Vjp, captured: list[Tensor], inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """What a vjp function returns: as the graph does, with indices wrapped and clamped."""
    outputs = evaluate(derivative.graph, captured, inputs)
    for read in derivative.captured:
        table = captured[read.slot]
        indices = [
            outputs[i.index] if isinstance(i, Ref) else torch.tensor(i, device=table.device) for i in read.indices
        ]
        for index, wrapped in zip(read.indices, wrapped_indices(table, indices), strict=True):
            if isinstance(index, Ref):
                outputs[index.index] = wrapped
    return outputs


APPROXIMATED = ("exp", "exp2", "expm1", "log", "log2", "log1p", "rsqrt", "tanh", "sigmoid", "sin", "cos", "erf", "pow")
APPROXIMATED += ("atan2", "fmod", "remainder", "floor_div")
"""On floats these may differ in the last bit, which a comparison magnifies; torch's remainders are wrong if large."""


def check_random_masks(seeds: range) -> int:
    """Masks put together at random, bit by bit; how many were compared."""
    compared = 0
    for mod, rng in _random_masks(seeds):
        if not any(node.op in APPROXIMATED and node.dtype.is_floating_point for node in mod.graph.nodes):
            # a number that does not fit in an int8, a division by the int 0
            with contextlib.suppress(RuntimeError, OverflowError):
                _check_mask_mod(mod, rng, transposed=rng.random() < 0.5)
                compared += 1
    return compared


def _random_masks(seeds: range) -> Iterator[tuple[Mod, random.Random]]:
    from test_intervals import _bool, _trace

    for seed in seeds:
        rng = random.Random(seed)
        with contextlib.suppress(RuntimeError, OverflowError):
            mod = _trace(_bool(rng, 4))
            mask_function(mod.graph)
            yield mod, rng


# -- compiling


TYPES = {
    torch.bool: "i1",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
TYPES |= {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}


def compile_mask(name: str, capability: int) -> dict[str, int]:
    """Size of each form that the kernel took on its way to the machine."""
    return _compile_mask_mod(trace_mask_mod(all_masks()[name]), capability)


def compile_random_masks(seeds: range) -> None:
    for mod, _ in _random_masks(seeds):
        _compile_mask_mod(mod, 90)


def _compile_mask_mod(mod: Mod, capability: int) -> dict[str, int]:
    function, numbers = mask_function(mod.graph)
    constants = {
        "MASK": function,
        "HEADS": HEADS,
        "BLOCK_Q": BLOCK_Q,
        "BLOCK_KV": BLOCK_KV,
        "TRANSPOSED": False,
    }
    types = {"out_ptr": "*i1", "q_ptr": "*i32", "kv_ptr": "*i32", "numbers": _types(numbers)}
    return _compile(mask_kernel, types, constants, mod, capability)


def compile_score(names: list[str], capability: int) -> dict[str, int]:
    """Of several score_mods at once, and their derivatives."""
    mods = [all_scores()[name] for name in names]
    return _compile_score_mod(trace_score_mod(lambda *x: sum(mod(*x) for mod in mods)), capability)


def compile_operations(names: list[str], dtype: torch.dtype, capability: int) -> dict[str, int]:
    other = torch.ones(64, dtype=dtype)

    def sum_of_all(score, b, h, q, k):
        return sum(OPERATIONS[name](score.to(dtype), other[k]).to(torch.float32) for name in names)

    return _compile_score_mod(trace_score_mod(sum_of_all), capability)


def _compile_score_mod(mod: Mod, capability: int) -> dict[str, int]:
    derivative = vjp(mod.graph, tuple(i for i, t in enumerate(mod.captured) if t.is_floating_point()))
    score = score_function(mod.graph)
    score_vjp = vjp_function(derivative)
    constants = {
        "SCORE": score.function, "VJP": score_vjp.function,
        "NUM_OUTPUTS": len(derivative.graph.outputs), "HEADS": HEADS, "BLOCK_Q": BLOCK_Q, "BLOCK_KV": BLOCK_KV,
    }  # fmt: skip
    types = dict.fromkeys(("out_ptr", "score_ptr", "grad_ptr"), "*fp32") | dict.fromkeys(
        ("ints_ptr", "q_ptr", "kv_ptr"), "*i32"
    )
    types |= {"numbers": _types(score_vjp.numbers)}
    return _compile(score_kernel, types, constants, mod, capability)


def _types(numbers: Sequence[int | float]) -> tuple[str, ...]:
    return tuple("fp32" if isinstance(number, float) else "i32" for number in numbers)


def _compile(
    kernel: Any, types: dict[str, Any], constants: dict[str, Any], mod: Mod, capability: int
) -> dict[str, int]:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types |= {"buffers": tuple(f"*{TYPES[t.dtype]}" for t in mod.captured), "sizes": "*i64"}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    compiled = triton.compile(ASTSource(kernel, signature, constants, {}), target=GPUTarget("cuda", capability, 32))
    return {form: len(text) for form, text in compiled.asm.items()}


def variants(masks: list[Mod], positions: Tensor) -> int:
    """How many variants of the mask kernel these masks need, by the key that Triton looks its kernels up with."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import compute_cache_key, create_function_from_signature

    bind = create_function_from_signature(
        mask_kernel.signature, mask_kernel.params, make_backend(GPUTarget("cuda", 90, 32))
    )
    keys = set()
    for mod in masks:
        function, numbers = mask_function(mod.graph)
        _, specialization, options = bind(
            positions.bool(), positions, positions, numbers, *pack_captured(mod.captured, "cpu"),
            MASK=function, HEADS=HEADS, BLOCK_Q=BLOCK_Q, BLOCK_KV=BLOCK_KV, TRANSPOSED=False,
        )  # fmt: skip
        keys.add(compute_cache_key({}, specialization, options))
    return len(keys)


def count_variants(case: str) -> int:
    def documents(length: int, start: int = 0) -> Any:
        ids = (torch.arange(length + start) // 7)[start:]
        return lambda b, h, q, k: ids[q] == ids[k]

    def window(size: int) -> Any:
        value = torch.tensor(size)
        return lambda b, h, q, k: (k <= q) & (k > q - value)

    def numbers(size: int, slope: float) -> Any:
        return lambda b, h, q, k: (k > q - size) & (q + size > h * slope) & ((q - k) * slope < size) & (b != size)

    masks = {
        "table lengths": [documents(n) for n in (1, 15, 16, 17, 100, 4096)],
        "table values": [documents(100), documents(100, start=4)],
        "an odd address": [documents(100), documents(100, start=1), documents(100, start=3)],
        "windows": [window(n) for n in (0, 1, 16, 17, 2**20, 2**40)],
        "numbers": [numbers(*pair) for pair in ((2, 1.0), (3, 0.5), (16, -3.0), (2**30 - 1, 1e-30), (17, 16.0))],
        "two graphs": [documents(16), window(16)],
    }[case]
    return variants([trace_mask_mod(mask) for mask in masks], torch.arange(16, dtype=torch.int32))


def functions_of_equal_graphs_are_one() -> bool:
    def traced(size: int) -> Graph:
        window = torch.tensor(size)
        return trace_mask_mod(lambda b, h, q, k: k > q - window).graph

    return mask_function(traced(3)).function is mask_function(traced(4)).function


def source_of_mask(name: str) -> str:
    return source_of(trace_mask_mod(all_masks()[name]).graph)


def source_of_score(name: str, wanted: tuple[int, ...] | None = None) -> str:
    graph = trace_score_mod(all_scores()[name]).graph
    return source_of(graph if wanted is None else vjp(graph, wanted))


def launches_compile_once(device: str) -> tuple[int, int]:
    """Variants compiled after the first launch with a window and a table, and after launches with others."""

    def launch(size: int, length: int) -> int:
        value, ids = torch.tensor(size, device=device), torch.arange(length, device=device)
        mod = trace_mask_mod(lambda b, h, q, k: (k > q - value) & (ids[q] != ids[k] + 12345))
        _check_mask_mod(mod, random.Random(0), False, device)
        return len(mask_kernel.device_caches[0][0])

    first = launch(3, 100)
    return first, max(launch(size, length) for size, length in ((1, 1), (16, 16), (2**40, 1000)))


# -- masks and score_mods beyond those of tests/cases.py


def _masks() -> dict[str, Callable[..., Tensor]]:
    rng = torch.Generator().manual_seed(3)
    allowed = torch.rand(BATCH, 1, 40, 40, generator=rng) < 0.5
    attention_mask = torch.rand(BATCH, 321, generator=rng) < 0.8
    intervals = torch.tensor([[0, 40], [30, 90], [200, 321]])
    small = {t: torch.randint(-100, 100, (50,), generator=rng).to(t) for t in (torch.int8, torch.int16, torch.int32)}
    small[torch.uint8] = torch.randint(0, 255, (50,), generator=rng).to(torch.uint8)
    i8, i16, i32, u8 = (small[t] for t in (torch.int8, torch.int16, torch.int32, torch.uint8))
    huge = torch.randint(-(2**62), 2**62, (50,), generator=rng)
    half, brain, double = (torch.randn(50, generator=rng).to(t) for t in (torch.float16, torch.bfloat16, torch.float64))
    flag, offset, far = torch.tensor(True), torch.tensor(-3), torch.tensor(2**40)
    transposed, four_dims = intervals.T, allowed.view(2, 10, 4, 40)
    expanded = torch.arange(7).view(7, 1).expand(7, 321)
    where = torch.where
    return {
        "chained gathers of Hugging Face": lambda b, h, q, k: allowed[b][0][q][k] | (q < 3),
        "padding mask of Hugging Face": lambda b, h, q, k: attention_mask[b, k] & (k <= q),
        "intervals of Flamingo": lambda b, h, q, k: (k >= intervals[h % 3][0]) & (k < intervals[h % 3, 1]),
        "chunked attention": lambda b, h, q, k: (q // 64 == k // 64) & (k <= q),
        "negative floor division": lambda b, h, q, k: (q - k) // 7 == (k - q) % 5 - 3,
        "negative divisors": lambda b, h, q, k: ((q - k) // -3 + (q - k) % -7) % 2 == 0,
        "divisors of either sign": lambda b, h, q, k: (q - k) // (2 * k - 301) == (q - 100) % (2 * k - 301) - 1,
        "truncated division": lambda b, h, q, k: torch.div(q - k, 5, rounding_mode="trunc") == torch.fmod(q - k, 4),
        "powers of two": lambda b, h, q, k: ((q - k) // 16 + (q - k) % 8 + (q >> 3)) & 1 == 0,
        "product that leaves int32": lambda b, h, q, k: q * k > (q + k) * 100,
        "sum that leaves int32": lambda b, h, q, k: (q + k) // 2 >= (q + 5) - (k - 3),
        "product that leaves int64": lambda b, h, q, k: q * q * k * k * k > 0,
        "difference of squares": lambda b, h, q, k: (q - k) * (q + k) < 10_000,
        "constants beyond int32": lambda b, h, q, k: (q < 3_000_000_000) & (k * 3 != 2**33) & (q - k > -(2**40)),
        "bits": lambda b, h, q, k: ((q & k) | (q ^ 5)) & ~k > (q | 64) - 60,
        "shifts out of range": lambda b, h, q, k: (1 << (q % 70)) > (k << (q % 40)) + ((q - k) >> (k % 80)),
        "shifts by negative numbers": lambda b, h, q, k: (k << (q - k)) + (k >> (q - k)) > 3,
        "integer powers": lambda b, h, q, k: (q - k) ** 3 + 3 ** (k % 50) > (q - k) ** (k % 5 - 2),
        "extrema": lambda b, h, q, k: torch.maximum(q, k) - torch.minimum(q, k + 3) > (q - k).clamp(-5, 9),
        "sign and absolute value": lambda b, h, q, k: torch.sign(q - k) * (k - q).abs() + (-q) < -30,
        "8-bit tables": lambda b, h, q, k: i8[q % 50] + i8[k % 50] > u8[q % 50] * u8[k % 50] - i8[q % 50] * 3,
        "16-bit tables": lambda b, h, q, k: i16[q % 50] * i16[k % 50] * 7 > -i16[q % 50] + (i8[k % 50] << 3),
        "32-bit tables": lambda b, h, q, k: i32[q % 50] * 50_000_000 > i32[k % 50] * 70_000_000 - q,
        "64-bit tables": lambda b, h, q, k: huge[q % 50] + huge[k % 50] > huge[(q - k) % 50] // 3,
        "narrowing casts": lambda b, h, q, k: q.to(torch.int8) + k.to(torch.uint8) > (q * k).to(torch.int16),
        "16-bit float tables": lambda b, h, q, k: half[q % 50] * brain[k % 50] + half[k % 50] > brain[q % 50] * 0.3,
        "double tables": lambda b, h, q, k: double[q % 50] * 0.1 + q / 3 > double[k % 50] * 7.3,
        "float quotients": lambda b, h, q, k: torch.floor(q / 3) * 0.1 >= torch.ceil(k / 7.0) / 4.3,
        "rounding": lambda b, h, q, k: torch.round(q / 2) + torch.trunc((k - q) / 4) == torch.sqrt(k).to(torch.int64),
        "float remainders": lambda b, h, q, k: (q - k) / 3 % 0.7 > torch.fmod((q - k) / 3, 0.5) + (q - k) / 3 // 1.3,
        "bf16 positions": lambda b, h, q, k: q.to(torch.bfloat16) * 0.1 > k.half() / 9 - 3,
        "bools as numbers": lambda b, h, q, k: ((q > k) ^ (k > 5)) + (q == k) * (k > 3) > ((q < 100) & flag).int(),
        "bool comparisons": lambda b, h, q, k: ((q > k) <= (k > 50)) & ((q > 9) != flag) | torch.logical_not(q),
        "wrapping indices": lambda b, h, q, k: i32[(q - k) % 100 - 50] > i32[-1] + i32[offset],
        "indices beyond int32": lambda b, h, q, k: i32[q * 3] + i32[-q * k] > i32[far] + i32[-far],
        "strided and expanded tables": lambda b, h, q, k: expanded[h, q] + transposed[b, k % 3] > expanded[h, k] + 20,
        "a table of four dims": lambda b, h, q, k: four_dims[b, q % 10, h, k % 40],
        "scalars only": lambda b, h, q, k: (half[b] > 0.1) | (h % 2 == 1) | (offset > 0),
        "rows only": lambda b, h, q, k: where(q % 2 == 0, brain[q % 50] > half[h], flag),
        "columns and a constant": lambda b, h, q, k: torch.ones_like(flag) & (k > 7) & torch.full_like(flag, True),
        "nested choices": lambda b, h, q, k: where(q > 2**20, where(k > 9, q + k, 7), where(h > 1, k, -q)) % 3 == 1,
    }  # fmt: skip


def _scores_table() -> dict[str, Callable[..., Tensor]]:
    rng = torch.Generator().manual_seed(4)
    table, per_head = torch.randn(HEADS, 32, generator=rng), torch.rand(HEADS, generator=rng) + 0.5
    scale, brain = torch.tensor(0.7), torch.randn(321, generator=rng).bfloat16()
    double = torch.randn(HEADS, generator=rng).double()
    return {
        "cap in bf16": lambda s, b, h, q, k: (torch.tanh((s / 30).bfloat16()) * 30).float(),
        "temperature per head": lambda s, b, h, q, k: s / per_head[h] + scale,
        "log distance": lambda s, b, h, q, k: s - scale * torch.log1p((q - k).abs().float()),
        "bucketed distances of T5": lambda s, b, h, q, k: s + table[h, _bucket(q - k)],
        "linear in the distance": lambda s, b, h, q, k: s - 2 ** (-8 * (h + 1) / HEADS) * (q - k).abs(),
        "rotation": lambda s, b, h, q, k: s * torch.cos((q - k) * 0.01) + torch.sin(q / 10_000.0) * scale,
        "bf16 bias": lambda s, b, h, q, k: s + brain[k] * 0.1 - brain[q],
        "double slopes": lambda s, b, h, q, k: s + double[h] * (k - q) / 100,
        "gelu by tanh": lambda s, b, h, q, k: F.gelu(s, approximate="tanh"),
        "silu": lambda s, b, h, q, k: F.silu(s) + F.relu(s) + F.leaky_relu(s),
        "masked": lambda s, b, h, q, k: torch.where(k <= q, s, -float("inf")),
        "extrema": lambda s, b, h, q, k: torch.maximum(s, per_head[h]) + torch.minimum(s, scale) + s.clamp(-0.5, 0.5),
        "powers": lambda s, b, h, q, k: s**2 + s.abs() ** 1.5 + (s * s + 1) ** -0.5 + s**3 + per_head[h] ** s,
        "exponentials": lambda s, b, h, q, k: torch.exp(s) + torch.exp2(-s) + torch.expm1(s * scale),
        "logarithms": lambda s, b, h, q, k: torch.log(s.abs() + 1) + torch.log2(s * s + 0.1) + torch.log1p(s * s),
        "roots": lambda s, b, h, q, k: torch.sqrt(s.abs() + 1) * torch.rsqrt(s * s + scale),
        "quotients": lambda s, b, h, q, k: 1 / (s * s + 1) + s / (q + 1) + torch.reciprocal(per_head[h] + s * s),
        "remainders": lambda s, b, h, q, k: s % 0.7 + torch.fmod(s, 0.3) + torch.round(s) + torch.floor(s) * scale,
        "angles": lambda s, b, h, q, k: torch.atan2(s, per_head[h]) + torch.erf(s) + torch.sigmoid(s) * torch.tanh(s),
        "one read at numbers": lambda s, b, h, q, k: s * table[-1, 3] + table[h][-2],
        "no score": lambda s, b, h, q, k: table[h, q % 32] * 2.0,
    }  # fmt: skip


def _bucket(relative: Tensor) -> Tensor:
    """Hugging Face T5Attention._relative_position_bucket, bidirectional, 32 buckets up to a distance of 128."""
    side, distance = (relative > 0).long() * 16, relative.abs()
    large = 8 + (torch.log(distance.float() / 8) / np.log(128 / 8) * 8).long()
    return side + torch.where(distance < 8, distance, torch.minimum(large, torch.full_like(large, 15)))


UNARY = "neg abs sign floor ceil round trunc exp exp2 expm1 log log2 log1p sqrt rsqrt tanh sigmoid sin cos erf"


def _of_first(operation: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: operation(x)


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{name: _of_first(getattr(torch, name)) for name in (*UNARY.split(), "relu", "reciprocal")},
    **{name: getattr(torch, name) for name in ("maximum", "minimum", "fmod", "remainder", "atan2", "pow", "div")},
    **{f"pow {e}": lambda x, y, e=e: x**e for e in (0, 1, 2, 3, -1, -2, 0.5, -0.5, 2.5, -1.5, 4)},
    "floor_div": lambda x, y: x // y,
    "where": lambda x, y: torch.where(x > y, x, y),
    "divided by a number": lambda x, y: x / 3.0 + x / 1e-30,
    "divided before a step": lambda x, y: torch.floor(x / 3.0),
    "number divided": lambda x, y: 3.0 / x,
    "power of two": lambda x, y: 2**x,
    "power of three": lambda x, y: 3.0**x,
    "clamp": lambda x, y: x.clamp(-1, 2).clamp(min=y),
    "is special": lambda x, y: x.isnan().float() + 2 * x.isinf().float(),
    "huge and tiny numbers": lambda x, y: torch.where(x > 0, 1e300, 1e-300) + x * 1e-40,
    "remainder by a number": lambda x, y: torch.where(x.abs() < 1e5, x, 1.0) % 0.7,
}


def all_masks() -> dict[str, Callable[..., Tensor]]:
    return {name: make(PROBLEM) for name, make in MASKS.items()} | _masks()


def all_scores() -> dict[str, Callable[..., Tensor]]:
    cases = {name: (score.make, score.captured(PROBLEM)) for name, score in SCORES.items()}
    return {name: make(*captured) for name, (make, captured) in cases.items() if make is not None} | _scores_table()
