"""Laws of the tile classifier: a verdict is a proof, and the masks that people use are decided as well as can be."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cpflex.mods.evaluate import evaluate
from cpflex.mods.graph import POSITIONS, Graph, Mod, Node
from cpflex.mods.intervals import EMPTY, FULL, PARTIAL, Interval, TileClassifier, _RangeTable, _stride
from cpflex.mods.trace import trace_mask_mod

# -- random masks: an expression is a function of the environment {"b", "h", "q", "k"}

Expression = Callable[[dict[str, Tensor]], Tensor]
Range = tuple[int, int]  # inclusive


def _nonzero(x: Tensor) -> Tensor:
    return torch.where((x == 0) | (x == -1), 3, x)  # torch dies of INT64_MIN // -1


INT_BINARY = [
    *(
        operator.add,
        operator.sub,
        operator.mul,
        operator.and_,
        operator.or_,
        operator.xor,
        torch.maximum,
        torch.minimum,
    ),
    *(lambda x, y: x // _nonzero(y), lambda x, y: x % _nonzero(y), lambda x, y: torch.fmod(x, _nonzero(y))),
    *(lambda x, y: torch.div(x, _nonzero(y), rounding_mode="trunc"), lambda x, y: x << y, lambda x, y: x >> y),
    *(lambda x, y: x << (y & 7), lambda x, y: x >> (y & 7)),
]
INT_WITH_NUMBER = [
    *(operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.and_, operator.or_),
    *(torch.fmod, lambda x, n: n - x, lambda x, n: x.clamp(min=n), lambda x, n: x.clamp(max=n), operator.xor),
    *(lambda x, n: torch.div(x, n, rounding_mode="trunc"), lambda x, n: x << abs(n) % 9, lambda x, n: x >> abs(n) % 9),
    *(lambda x, n: x ** (abs(n) % 4), lambda x, n: x.clamp(-abs(n), abs(n)), lambda x, n: n // _nonzero(x)),
]
INT_UNARY = [
    *(operator.neg, torch.abs, torch.sign, operator.invert, lambda x: x * x, lambda x: (x == 3).to(torch.int64)),
    *(lambda x, t=t: x.to(t) for t in (torch.int8, torch.int32, torch.uint8, torch.int64)),
]
FLOAT_BINARY = [
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.mod, operator.floordiv),
    *(torch.fmod, torch.maximum, torch.minimum, torch.atan2),
]
FLOAT_WITH_NUMBER = [
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.mod, operator.floordiv, torch.fmod),
    *(lambda x, n: n / x, lambda x, n: x.clamp(min=n), lambda x, n: x.clamp(max=n), lambda x, n: n - x),
    *(lambda x, n: x**2, lambda x, n: x**3.0, lambda x, n: x**n),
]
FLOAT_UNARY = [
    *(operator.neg, torch.abs, torch.sign, torch.floor, torch.ceil, torch.round, torch.trunc, torch.exp, torch.exp2),
    *(torch.expm1, torch.log, torch.log2, torch.log1p, torch.sqrt, torch.rsqrt, torch.tanh, torch.sigmoid, torch.sin),
    *(torch.erf, torch.square, torch.relu, torch.nn.functional.silu, torch.nn.functional.gelu, torch.reciprocal),
    *(lambda x, t=t: x.to(t) for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64)),
]
COMPARE = [operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne]
NUMBERS = (-64, -20, -7, -3, -2, 1, 2, 3, 4, 5, 8, 16, 31, 32, 50, 64, 100)
FLOATS = (-20.0, -1.5, -0.3, 0.1, 0.5, 1.0, 2.0, 3.7, 16.0, 40.0, 300.0)


def _table(rng: Random, kind: str, ndim: int) -> Tensor:
    shape = [rng.choice([1, 2, 5, 16, 37, 90] if ndim == 1 else [1, 2, 3, 17]) for _ in range(ndim)]
    generator = torch.Generator().manual_seed(rng.randrange(2**32))
    if kind == "bool":
        return torch.rand(shape, generator=generator) < rng.choice([0.03, 0.5, 0.97])
    if kind == "int":
        dtype = rng.choice([torch.int64, torch.int32, torch.uint8, torch.int8])
        span = rng.choice([2, 5, 60, 60, 2**62 if dtype == torch.int64 else 60])
        table = torch.randint(0 if dtype == torch.uint8 else -span // 2, span, shape, generator=generator)
        table = (table.sort(dim=-1).values if ndim and rng.random() < 0.5 else table).to(dtype)
        if rng.random() < 0.1:
            table.view(-1)[0] = rng.choice([torch.iinfo(dtype).min, torch.iinfo(dtype).max])
        return table
    table = torch.randn(shape, generator=generator) * rng.choice([1.0, 30.0])
    if rng.random() < 0.3:
        table.view(-1)[0] = rng.choice([float("inf"), float("-inf"), float("nan"), 0.0])
    return table.to(rng.choice([torch.float32, torch.bfloat16, torch.float16, torch.float64]))


def _gather(rng: Random, kind: str, depth: int) -> Expression:
    ndim = rng.choice([0, 1, 1, 1, 2, 2, 3])
    table = _table(rng, kind, ndim)
    indices = [_int(rng, depth - 1 - (ndim > 1)) for _ in range(ndim)]
    return lambda env: table[tuple(i(env).to(torch.int64) for i in indices)] if ndim else table.clone()


def _int(rng: Random, depth: int) -> Expression:
    forms = ["number", "number", "binary", "binary", "unary", "gather", "where", "float"]
    form = rng.choice(forms) if depth > 0 else rng.choice(["position", "position", "difference", "element"])
    if form == "difference":
        return lambda env: env["q"] - env["k"]
    if form in ("position", "element"):
        name = rng.choice("qkqkqkbh")
        table = _table(rng, "int", 1)
        return lambda env: env[name] if form == "position" else table[env[name]]
    if form == "gather":
        return _gather(rng, "int", depth)
    x = _float(rng, depth - 1) if form == "float" else _int(rng, depth - 1)
    if form == "float":
        return lambda env: x(env).clamp(-1e5, 1e5).to(torch.int64)
    if form == "unary":
        f = rng.choice(INT_UNARY)
        return lambda env: f(x(env))
    if form == "number":
        f, n = rng.choice(INT_WITH_NUMBER), rng.choice(NUMBERS)
        return lambda env: f(x(env), n)
    y = _int(rng, depth - 1)
    if form == "where":
        condition = _bool(rng, depth - 1)
        return lambda env: torch.where(condition(env), x(env), y(env))
    f = rng.choice(INT_BINARY)
    return lambda env: f(x(env).to(torch.int64), y(env).to(torch.int64))


def _float(rng: Random, depth: int) -> Expression:
    form = (
        rng.choice(["cast", "number", "number", "binary", "unary", "unary", "gather", "where"]) if depth > 0 else "cast"
    )
    if form == "gather":
        return _gather(rng, "float", depth)
    x = _int(rng, depth - 1) if form == "cast" else _float(rng, depth - 1)
    if form == "cast":
        dtype = rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
        return lambda env: x(env).to(dtype)
    if form == "unary":
        f = rng.choice(FLOAT_UNARY)
        return lambda env: f(x(env))
    if form == "number":
        f, n = rng.choice(FLOAT_WITH_NUMBER), rng.choice(FLOATS)
        return lambda env: f(x(env), n)
    y = _float(rng, depth - 1)
    if form == "where":
        condition = _bool(rng, depth - 1)
        return lambda env: torch.where(condition(env), x(env), y(env))
    f = rng.choice(FLOAT_BINARY)
    return lambda env: f(x(env), y(env))


def _bool(rng: Random, depth: int) -> Expression:
    form = (
        rng.choice(["compare", "compare", "compare", "logic", "not", "gather", "where", "cast"])
        if depth > 0
        else "compare"
    )
    if form == "gather":
        return _gather(rng, "bool", depth)
    if form in ("not", "logic", "where"):
        x, y, z = (_bool(rng, depth - 1) for _ in range(3))
        if form == "not":
            return lambda env: ~x(env)
        if form == "where":
            return lambda env: torch.where(x(env), y(env), z(env))
        f = rng.choice([operator.and_, operator.or_, operator.xor, operator.eq, operator.ne, operator.mul])
        return lambda env: f(x(env), y(env))
    value = rng.choice([_int, _float])
    x, y = value(rng, depth - 1), value(rng, depth - 1)
    if form == "cast":
        return lambda env: x(env).to(torch.bool)
    f = rng.choice(COMPARE)
    if rng.random() < 0.4:
        return lambda env: f(x(env), y(env))
    # against the value at one point, so that the comparison is seldom the same everywhere
    point = {name: torch.tensor(rng.randrange(150 if name in ("q", "k") else 5)) for name in ("q", "k", "b", "h")}
    return lambda env: f(x(env), x(point))


def _range(rng: Random, last: int, lengths: Sequence[int]) -> Range:
    lo = rng.randrange(last + 1)
    return lo, lo + rng.choice(lengths) - 1


def _trace(expression: Expression) -> Mod:
    return trace_mask_mod(lambda b, h, q_idx, kv_idx: expression({"b": b, "h": h, "q": q_idx, "k": kv_idx}))


def _in_float64(mod: Mod) -> Mod:
    """The same mod as a device computes it that rounds nothing."""
    double = dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), torch.float64)
    nodes = tuple(Node(op, args, double.get(dtype, dtype)) for op, args, dtype in mod.graph.nodes)
    return Mod(Graph(nodes, mod.graph.outputs), mod.captured, mod.name).map_captured(
        lambda t: t.to(double.get(t.dtype, t.dtype))
    )


class _Proofs:
    """How many tiles were tried, how many of them the mask leaves without a mixture, how many were decided."""

    def __init__(self) -> None:
        self.cases = self.uniform = self.decided = 0


def _seen(mod: Mod, b: Range, h: Range, q: Range, kv: Range) -> np.ndarray:
    sides = [torch.arange(lo, hi + 1) for lo, hi in (b, h, q, kv)]
    inputs = dict(zip(POSITIONS, torch.meshgrid(*sides, indexing="ij"), strict=True))
    return evaluate(mod.graph, mod.captured, inputs)[0].broadcast_to([len(side) for side in sides]).numpy()


def _assert_proven(verdict: int, seen: np.ndarray, what: str) -> None:
    assert verdict != FULL or seen.all(), f"false FULL: {what}"
    assert verdict != EMPTY or not seen.any(), f"false EMPTY: {what}"


def _check(mod: Mod, tiles: Sequence[tuple[Range, Range]], b: Range, h: Range, proofs: _Proofs) -> None:
    (q_lo, q_hi), (kv_lo, kv_hi) = (np.array(bounds).T for bounds in zip(*tiles, strict=True))
    classify = TileClassifier(mod)
    verdicts = classify(q_lo, q_hi, kv_lo, kv_hi, b=b, h=h)
    assert verdicts[0] == classify(q_lo[0], q_hi[0], kv_lo[0], kv_hi[0], b=b, h=h), "a verdict depends on other tiles"
    for (q, kv), verdict in zip(tiles, verdicts, strict=True):
        try:
            seen, seen_unrounded = (_seen(m, b, h, q, kv) for m in (mod, _in_float64(mod)))
        except (RuntimeError, OverflowError):  # a number that does not fit in an int8
            assume(False)
        for mask in (seen, seen_unrounded):
            _assert_proven(verdict, mask, f"b {b} h {h} q {q} kv {kv} of\n{mod.graph}")
        proofs.cases += 1
        proofs.uniform += bool(seen.all() or not seen.any())
        proofs.decided += bool(verdict != PARTIAL)


def _run_random_masks(num_masks: int, *, derandomize: bool) -> _Proofs:
    proofs = _Proofs()

    @settings(
        max_examples=num_masks,
        derandomize=derandomize,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=True))
    def run(rng: Random) -> None:
        mod = _trace(_bool(rng, rng.choice([2, 2, 3, 4])))
        tiles = [(_range(rng, 110, (1, 2, 8, 16, 40)), _range(rng, 110, (1, 2, 8, 16, 40))) for _ in range(4)]
        _check(mod, tiles, _range(rng, 2, (1, 2)), _range(rng, 3, (1, 3)), proofs)

    run()
    return proofs


def test_a_verdict_is_never_contradicted_by_the_mask_on_random_masks() -> None:
    proofs = _run_random_masks(250, derandomize=True)
    assert proofs.decided > 0.7 * proofs.uniform, "the law holds, but of too few tiles"


@pytest.mark.slow
def test_a_verdict_is_never_contradicted_by_the_mask_on_twenty_thousand_tiles() -> None:
    proofs = _run_random_masks(5000, derandomize=False)
    assert proofs.cases >= 10_000
    assert proofs.decided > 0.7 * proofs.uniform, "the law holds, but of too few tiles"


INF, NAN = float("inf"), float("nan")
INT8S = torch.tensor([-128, -1, 0, 1, 127], dtype=torch.int8)
BYTES = torch.tensor([0, 1, 128, 255], dtype=torch.uint8)
LONGS = torch.tensor([-(2**63), -(2**62), -1, 0, 5, 2**62, 2**63 - 1])
REALS = torch.tensor([-INF, -1.0, 0.0, 1.0, INF])
HOLES = torch.tensor([0.0, NAN, 1.0, 2.0])
ONE, TWO, DIGITS = torch.tensor(1), torch.tensor([-2, 2, 3]), torch.arange(10)

# on positions 0..9 a rule that is too simple proves what is not so
TRAPS = {
    "int8 abs": lambda q, k: INT8S[q].abs() >= 0,
    "int8 neg": lambda q, k: -INT8S[q] <= 127,
    "int8 neg wraps": lambda q, k: -INT8S[q] > -128,
    "int8 sum wraps": lambda q, k: INT8S[q] + INT8S[k] >= INT8S[0],
    "int8 product wraps": lambda q, k: INT8S[q] * INT8S[k] != 0,
    "int8 shift": lambda q, k: (INT8S[q] << INT8S[3]) <= 126,
    "uint8 not": lambda q, k: ~BYTES[q] >= 1,
    "uint8 neg": lambda q, k: (-BYTES[q]).to(torch.int64) <= 0,
    "uint8 difference": lambda q, k: (BYTES[q] - BYTES[k]).to(torch.int64) >= 0,
    "cast to uint8": lambda q, k: (q - 5).to(torch.uint8) <= 4,
    "cast to int32": lambda q, k: LONGS[q].to(torch.int32) >= 0,
    "cast to bool of both signs": lambda q, k: (q - 5).to(torch.bool),
    "int64 sum wraps": lambda q, k: LONGS[q] + LONGS[q] >= -(2**62),
    "int64 product wraps": lambda q, k: LONGS[q] * (k + 1) >= -(2**63) + 1,
    "int64 neg wraps": lambda q, k: -LONGS[q] >= -(2**62),
    "int64 abs": lambda q, k: LONGS[q].abs() >= 0,
    "int64 square": lambda q, k: LONGS[q] ** 2 >= 1,
    "int64 shift": lambda q, k: (LONGS[q] << k) >= LONGS[q],
    "shift by more than the bits": lambda q, k: (q + 1 << 60 + k) > 0,
    "shift right by more than the bits": lambda q, k: (LONGS[q] >> k * 20) <= 0,
    "shift by a negative number": lambda q, k: (ONE << q - 5) >= 1,
    "sign of remainder": lambda q, k: (q - 5) % 3 >= 0,
    "sign of remainder by a negative number": lambda q, k: (q - 5) % -3 < 0,
    "sign of fmod": lambda q, k: torch.fmod(q - 5, 3) >= 0,
    "sign of fmod by a negative number": lambda q, k: torch.fmod(q - 5, -3) <= 0,
    "remainder by one of several": lambda q, k: (q + 6) % (k + 3) == (q + 6) % 3,
    "remainder by both signs": lambda q, k: q % TWO[k] >= 0,
    "division by both signs": lambda q, k: q // TWO[k] >= 0,
    "truncation of a negative quotient": lambda q, k: torch.div(q - 5, 3, rounding_mode="trunc") <= -1,
    "floor of a negative quotient": lambda q, k: (q - 9) // 4 >= -2,
    "xor with unknown low bits": lambda q, k: ((q + 64) ^ (k + 64)) < 8,
    "and of both signs": lambda q, k: ((q - 5) & (k - 5)) >= 0,
    "and of both signs in int32": lambda q, k: ((q - 5).to(torch.int32) & (k - 5).to(torch.int32)) * 2 >= -2,
    "and with low bits of what may be large": lambda q, k: (LONGS[q] & 7) == 0,
    "or with large unknown bits": lambda q, k: (LONGS[q] | k) < 0,
    "negative index": lambda q, k: DIGITS[q - 5] >= 5,
    "index beyond the table": lambda q, k: INT8S[q * 100].to(torch.int64) < 127,
    "index far below the table": lambda q, k: INT8S[q - 100].to(torch.int64) > -128,
    "inf - inf": lambda q, k: REALS[q] - REALS[k] <= INF,
    "inf + -inf": lambda q, k: REALS[q] + REALS[k] >= -INF,
    "0 * inf": lambda q, k: REALS[q] * REALS[k] <= INF,
    "0 * inf inside": lambda q, k: (REALS[q] * 0.0) == 0.0,
    "inf / inf": lambda q, k: REALS[q] / REALS[k].clamp(min=1.0) <= INF,
    "inf // 2": lambda q, k: torch.div(REALS[q], 2.0, rounding_mode="floor") >= -INF,
    "inf % 2": lambda q, k: REALS[q] % 2.0 >= 0.0,
    "0 / 0": lambda q, k: (q * 0.0) / (k * 0.0) <= INF,
    "1 / both signs": lambda q, k: 1.0 / (q - 4.5) >= -2.0,
    "nan": lambda q, k: HOLES[q] >= 0.0,
    "not nan": lambda q, k: ~(HOLES[q] < 0.0) & ~(HOLES[q] >= 0.0),
    "nan is not nan": lambda q, k: HOLES[q] == HOLES[q],
    "nan through clamp": lambda q, k: HOLES[q].clamp(0.0, 9.0) >= 0.0,
    "nan through where": lambda q, k: torch.where(q < k, HOLES[q], 1.0) >= 0.0,
    "nan to bool": lambda q, k: HOLES[q].to(torch.bool),
    "log of a negative number": lambda q, k: torch.log(q - 5.0) <= INF,
    "root of a negative number": lambda q, k: torch.sqrt(q - 5.0) >= 0.0,
    "float32 beyond 2**24": lambda q, k: (q + 2**24).to(torch.float32) - 2.0**24 <= 8.0,
    "float32 overflow": lambda q, k: (q + 1) * 1e38 * 10.0 < 1e39,
    "float16 overflow": lambda q, k: (q * 10000).to(torch.float16) <= 65504.0,
    "float16 inf - inf": lambda q, k: (q * 10000).to(torch.float16) - (k * 10000).to(torch.float16) <= INF,
    "bfloat16 rounding": lambda q, k: (q + 256).to(torch.bfloat16) <= (k + 256).to(torch.bfloat16),
    "a third": lambda q, k: (q / 3.0) * 3.0 == q,
    "a tenth": lambda q, k: q * 0.1 <= 0.9,
    "floor of a rounded quotient": lambda q, k: torch.div(q.float(), 0.1, rounding_mode="floor") >= q * 10,
    "exponentials": lambda q, k: torch.exp(q * 0.1) * torch.exp(q * -0.1) == 1.0,
    "uint16 and uint64": lambda q, k: q.to(torch.uint16).to(torch.int64) < 5,
}


@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_is_avoided_on_every_tile(name: str) -> None:
    mod = _trace(lambda env: TRAPS[name](env["q"], env["k"]))
    lo, hi = np.array([(lo, hi) for lo in range(10) for hi in range(lo, 10)]).T
    verdicts = TileClassifier(mod)(lo[:, None], hi[:, None], lo, hi)
    for device in (mod, _in_float64(mod)):
        seen = _seen(device, (0, 0), (0, 0), (0, 9), (0, 9))[0, 0]
        for i, j in np.ndindex(verdicts.shape):
            what = f"q {lo[i]}..{hi[i]} k {lo[j]}..{hi[j]}"
            _assert_proven(verdicts[i, j], seen[lo[i] : hi[i] + 1, lo[j] : hi[j] + 1], what)


def test_bounds_broadcast_and_masks_without_positions_cover_the_grid() -> None:
    causal = TileClassifier(trace_mask_mod(_causal))
    start = np.arange(0, 384, 128)
    expected = [[PARTIAL, EMPTY, EMPTY], [FULL, PARTIAL, EMPTY], [FULL, FULL, PARTIAL]]
    grid = causal(start[:, None], start[:, None] + 127, start[None], start[None] + 127)
    assert grid.tolist() == expected
    assert grid.dtype == np.int8
    assert causal(np.int64(0), np.int64(9), np.int64(10), np.int64(19)).shape == ()
    assert causal(start[:0], start[:0], start[:0], start[:0]).shape == (0,)
    heads = torch.tensor([True, True, False])
    per_head = TileClassifier(trace_mask_mod(lambda b, h, q, k: heads[h]))
    for h, verdict in {(0, 1): FULL, (0, 2): PARTIAL, (2, 2): EMPTY, (2, 9): EMPTY}.items():
        assert (per_head(start[:, None], start[:, None], start, start, h=h) == np.full((3, 3), verdict)).all()


@pytest.mark.parametrize("shape", [(1,), (31,), (1000,), (3, 300), (65, 70), (2, 3, 40)], ids=str)
@pytest.mark.parametrize("kind", ["int", "bool", "float"])
def test_bounds_of_a_table_hold_over_every_box_and_are_exact_over_aligned_ones(
    shape: tuple[int, ...], kind: str
) -> None:
    rng = np.random.default_rng(0)
    elements = rng.integers(-1000, 1000, shape).astype({"int": np.int64, "bool": bool, "float": np.float64}[kind])
    table = _RangeTable(torch.from_numpy(elements))
    num_boxes = 200
    edges = [np.sort(rng.integers(0, size, (2, num_boxes)), axis=0) for size in shape]
    boxes = [Interval(lo, np.where(rng.random(num_boxes) < 0.3, lo, hi)) for lo, hi in edges]
    bounds = table(boxes)
    for i in range(num_boxes):
        box = elements[tuple(slice(lo[i], hi[i] + 1) for lo, hi in boxes)]
        assert bounds.lo[i] <= box.min()
        assert bounds.hi[i] >= box.max()
        stride = max(1 << _stride(int(hi[i] - lo[i] + 1).bit_length() - 1) for lo, hi in boxes)
        if all(lo[i] % stride == 0 and (hi[i] + 1) % stride == 0 for lo, hi in boxes):
            assert (bounds.lo[i], bounds.hi[i]) == (box.min(), box.max())


# -- the masks that people use


S, TILE = 4096, 128
DOC = torch.repeat_interleave(torch.arange(9), torch.tensor([700, 1, 129, 1000, 255, 257, 640, 90, 1024]))
SHUFFLED_DOC = torch.randperm(64, generator=torch.Generator().manual_seed(0)).repeat_interleave(64)
WINDOW, PREFIX, BLOCK = torch.tensor(1000), torch.tensor(777), 300
PER_HEAD = torch.tensor([100, 1000, 2000, 4000])
EVICTED = torch.rand(S, generator=torch.Generator().manual_seed(0)) < 0.02
VISIBLE_BLOCKS = torch.rand(32, 32, generator=torch.Generator().manual_seed(0)) < 0.3


def _causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def _neighbourhood(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return ((q // 64 - k // 64).abs() <= 5) & ((q % 64 - k % 64).abs() <= 5)


def _block_diffusion(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The first half of the sequence is noised, the second is clean; blocks of 200."""
    q_clean, k_clean = q >= S // 2, k >= S // 2
    q_block, k_block = (torch.where(clean, x - S // 2, x) // 200 for clean, x in ((q_clean, q), (k_clean, k)))
    same_noise = (q_clean == k_clean) & (q_block == k_block)
    return same_noise | (k_clean & ~q_clean & (q_block > k_block)) | (k_clean & q_clean & (q_block >= k_block))


MASKS = {
    "full": (lambda b, h, q, k: q >= 0, 1.0),
    "causal": (_causal, 1.0),
    "window": (lambda b, h, q, k: (q >= k) & (q - k < WINDOW), 1.0),
    "two-sided window": (lambda b, h, q, k: (q - k).abs() <= 300, 1.0),
    "document": (lambda b, h, q, k: DOC[q] == DOC[k], 1.0),
    "document causal": (lambda b, h, q, k: (DOC[q] == DOC[k]) & (q >= k), 1.0),
    "document window causal": (lambda b, h, q, k: (DOC[q] == DOC[k]) & (q >= k) & (k > q - WINDOW), 1.1),
    "unsorted document": (lambda b, h, q, k: (SHUFFLED_DOC[q] == SHUFFLED_DOC[k]) & (q >= k), 12.0),
    "prefix": (lambda b, h, q, k: (q >= k) | (k < PREFIX), 1.0),
    "block causal": (lambda b, h, q, k: q // BLOCK >= k // BLOCK, 1.0),
    "block causal of floats": (lambda b, h, q, k: torch.floor(q / BLOCK) >= torch.floor(k / BLOCK), 1.1),
    "dilated window": (lambda b, h, q, k: ((q - k) % 4 == 0) & (q >= k) & (q - k < 1024), 1.0),
    "global and sliding": (lambda b, h, q, k: (q >= k) & ((k < 64) | (q - k < 512)), 1.0),
    "neighbourhood": (_neighbourhood, 1.0),
    "block diffusion": (_block_diffusion, 1.0),
    "window per head": (lambda b, h, q, k: (q >= k) & (q - k < PER_HEAD[h]), 1.0),
    "evicted keys": (lambda b, h, q, k: (q >= k) & ~EVICTED[k], 1.05),
    "visible blocks": (lambda b, h, q, k: VISIBLE_BLOCKS[q // 128, k // 128], 0.0),
    "documents that see documents": (lambda b, h, q, k: VISIBLE_BLOCKS[DOC[q], DOC[k]], 1.0),
    "padding": (lambda b, h, q, k: (q < 4000) & (k < 4000) & (q >= k), 1.0),
    "decay": (lambda b, h, q, k: torch.exp((k - q).abs() * -0.01) > 0.05, 1.0),
    "disc": (lambda b, h, q, k: (q // 64 - k // 64) ** 2 + (q % 64 - k % 64) ** 2 <= 100, 1.05),
    "butterfly": (lambda b, h, q, k: (q ^ k) < 512, 0.0),
}


@pytest.mark.parametrize("name", MASKS)
def test_few_uniform_tiles_of_a_known_mask_stay_unproven(name: str) -> None:
    mask, allowed = MASKS[name]
    mod = trace_mask_mod(mask)
    start = np.arange(0, S, TILE)
    q, kv = start[:, None], start[None, :]
    verdicts = TileClassifier(mod)(q, q + TILE - 1, kv, kv + TILE - 1, h=(1, 1))
    exact = np.stack([_exact_verdicts(mod, int(row)) for row in start])
    proven = verdicts != PARTIAL
    assert (verdicts[proven] == exact[proven]).all()
    assert (~proven).sum() <= allowed * (exact == PARTIAL).sum()


def _exact_verdicts(mod: Mod, row: int) -> np.ndarray:
    q, kv = torch.arange(row, row + TILE)[:, None], torch.arange(S)
    inputs = {"b": torch.tensor(0), "h": torch.tensor(1), "q_idx": q, "kv_idx": kv}
    seen = evaluate(mod.graph, mod.captured, inputs)[0].broadcast_to(TILE, S).reshape(TILE, -1, TILE).numpy()
    return np.int8(seen.any((0, 2))) + np.int8(seen.all((0, 2)))
