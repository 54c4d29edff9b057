"""Laws of generated device functions: they equal the evaluator, compile for every GPU, and compile once."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import generated
import pytest
import torch

import cases
from another_process import another_process
from cpflex import kernels
from cpflex.mods import triton_source
from cpflex.mods.trace import UnsupportedMod, trace_mask_mod, trace_score_mod
from cpflex.mods.triton_source import mask_function, pack_captured, score_function, vjp_function
from cpflex.mods.vjp import vjp

Call = Callable[..., Any]

MASKS, SCORES, OPERATIONS = list(generated.all_masks()), list(generated.all_scores()), list(generated.OPERATIONS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Call]:
    with another_process(TRITON_INTERPRET="1") as call:
        yield call


@pytest.fixture(scope="module")
def compiler() -> Iterator[Call]:
    with another_process(TRITON_INTERPRET="0") as call:
        yield call


# -- equal to the evaluator


def test_there_are_enough_of_them() -> None:
    assert len(MASKS) >= 60
    assert set(cases.MASKS) <= set(MASKS)
    assert set(cases.SCORES) - {"none"} <= set(SCORES)


@pytest.mark.by_day(3)
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_equals_the_evaluator_bit_by_bit(interpreter: Call, name: str) -> None:
    interpreter(generated.check_mask, name)


def test_random_masks_equal_the_evaluator_bit_by_bit(interpreter: Call) -> None:
    assert interpreter(generated.check_random_masks, range(20)) > 10


@pytest.mark.slow
def test_many_random_masks_equal_the_evaluator_bit_by_bit(interpreter: Call) -> None:
    assert interpreter(generated.check_random_masks, range(1000, 3000)) > 1000


@pytest.mark.by_day(2)
@pytest.mark.parametrize("name", SCORES)
def test_a_score_mod_and_its_derivatives_equal_the_evaluator(interpreter: Call, name: str) -> None:
    interpreter(generated.check_score, name)


# torch flushes erf of tiny numbers, and gives NaN for the remainder of a huge quotient
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in ("erf", "fmod", "remainder", "floor_div")])
def test_an_operation_on_special_values_equals_the_evaluator(interpreter: Call, name: str) -> None:
    interpreter(generated.check_operation, name)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    "name", ["neg", "round", "exp", "sqrt", "tanh", "maximum", "div", "pow 3", "divided by a number", "clamp"]
)
def test_an_operation_of_another_dtype_rounds_as_torch_does(interpreter: Call, name: str, dtype: torch.dtype) -> None:
    interpreter(generated.check_operation, name, dtype)


# -- one function of one text


def test_equal_graphs_give_one_function(interpreter: Call) -> None:
    assert interpreter(generated.functions_of_equal_graphs_are_one)


CAUSAL_WINDOW = """\
@triton.jit
def mask_a34ed1d255(b, h, q_idx, kv_idx, numbers, buffers, sizes):
    x0 = tl.load(buffers[0])
    return (kv_idx <= q_idx) & (kv_idx > within_int32(q_idx - x0, -1, 2147483647))
"""
DOCUMENTS = """\
@triton.jit
def mask_c6417f8ab5(b, h, q_idx, kv_idx, numbers, buffers, sizes):
    x0 = tl.load(buffers[0] + offset(q_idx, sizes, 0, 0))
    x1 = tl.load(buffers[0] + offset(kv_idx, sizes, 0, 0))
    return (x0 == x1) & (kv_idx <= q_idx)
"""
SOFTCAP_GRADIENT = """\
@triton.jit
def score_vjp_55c66c51d9(grad, score, b, h, q_idx, kv_idx, numbers, buffers, sizes):
    x0 = tanh(score * numbers[0])
    return (((grad * numbers[2]) * (numbers[3] - (x0 * x0))) * numbers[4],)
"""
ALIBI_GRADIENTS = """\
@triton.jit
def score_vjp_91a700276d(grad, score, b, h, q_idx, kv_idx, numbers, buffers, sizes):
    x0 = (grad * -1.0) * tl.abs(q_idx - kv_idx).to(tl.float32)
    return (grad, x0, place(h, sizes, 0, 0),)
"""


def test_the_text_is_readable_and_the_same_on_every_run(compiler: Call) -> None:
    assert compiler(generated.source_of_mask, "sliding17") == CAUSAL_WINDOW
    assert compiler(generated.source_of_mask, "doc_causal") == DOCUMENTS
    assert compiler(generated.source_of_score, "softcap", ()) == SOFTCAP_GRADIENT
    assert compiler(generated.source_of_score, "alibi", (0,)) == ALIBI_GRADIENTS


def test_what_a_score_mod_and_its_derivative_both_compute_reads_the_same_numbers() -> None:
    graph = trace_score_mod(lambda s, b, h, q, k: torch.tanh(s / 3.0) * 5.0 + torch.exp((q - k + 7) * -0.25)).graph
    score_mod, score_vjp = score_function(graph), vjp_function(vjp(graph, ()))
    assert score_vjp.numbers[: len(score_mod.numbers)] == score_mod.numbers == (1 / 3.0, 5.0, 15, -0.25)
    assert "tanh(score * numbers[0])" in triton_source.source_of(graph)
    assert "tanh(score * numbers[0])" in triton_source.source_of(vjp(graph, ()))


@pytest.mark.parametrize("number", [0, -0.0, 2**31, float("inf"), 1e-40])
def test_some_numbers_stay_in_the_text(number: float) -> None:
    graph = trace_score_mod(lambda s, b, h, q, k: torch.where(q - k < number, s, -s)).graph
    function, numbers = score_function(graph)
    assert numbers == ()
    assert "numbers[" not in triton_source.source_of(function)


def test_the_documentation_shows_the_text_of_today() -> None:
    assert textwrap.indent(CAUSAL_WINDOW, "    ") in (triton_source.__doc__ or "")
    assert CAUSAL_WINDOW in (kernels.__doc__ or "")


# -- compiled without a GPU


@pytest.mark.parametrize("capability", [80, 90])
def test_mods_compile_to_machine_code_without_a_gpu(compiler: Call, capability: int) -> None:
    for name in ("doc_sliding_causal", "sliding_tile_3d", "8-bit tables"):
        assert compiler(generated.compile_mask, name, capability)["cubin"] > 0
    assert compiler(generated.compile_score, ["relative_bias", "softcap", "alibi"], capability)["cubin"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_all_mods_compile_to_machine_code_without_a_gpu(compiler: Call, capability: int) -> None:
    for name in MASKS:
        compiler(generated.compile_mask, name, capability)
    for name in SCORES:
        compiler(generated.compile_score, [name], capability)
    compiler(generated.compile_random_masks, range(capability, capability + 50))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_operations_compile_to_machine_code_without_a_gpu(compiler: Call, dtype: torch.dtype) -> None:
    refused = ("fmod", "remainder", "atan2", "floor_div", "remainder by a number") if dtype == torch.float64 else ()
    names = [name for name in OPERATIONS if name not in refused]
    for i in range(0, len(names), 8):
        compiler(generated.compile_operations, names[i : i + 8], dtype, 90)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("table lengths", 1),
        ("table values", 1),
        ("an odd address", 1),
        ("windows", 1),
        ("numbers", 1),
        ("two graphs", 2),
    ],
)
def test_new_data_compiles_nothing(compiler: Call, case: str, expected: int) -> None:
    assert compiler(generated.count_variants, case) == expected


# -- refusals


def test_what_has_no_triton_form_is_refused_by_name() -> None:
    unsigned, double = torch.zeros(3, dtype=torch.uint16), torch.ones(3, dtype=torch.float64)
    with pytest.raises(UnsupportedMod, match=r"gather .uint16. .*backend.*reference"):
        mask_function(trace_mask_mod(lambda b, h, q, k: unsigned[q] == unsigned[k]).graph)
    with pytest.raises(UnsupportedMod, match=r"atan2 .float64."):
        score_function(trace_score_mod(lambda s, b, h, q, k: torch.atan2(s, double[h])).graph)
    with pytest.raises(UnsupportedMod, match=r"the number 300 .int8."):
        mask_function(trace_mask_mod(lambda b, h, q, k: q.to(torch.int8) > 300).graph)
    with pytest.raises(UnsupportedMod, match="negative power"):
        mask_function(trace_mask_mod(lambda b, h, q, k: q**-2 > k).graph)


def test_captured_tensors_are_packed_with_their_sizes_and_strides() -> None:
    table = torch.arange(12, dtype=torch.float32).view(3, 4)
    buffers, sizes = pack_captured([torch.tensor(5), table.T, table[1:]], "cpu")
    assert [t.shape for t in buffers] == [(), (4, 3), (2, 4)]
    assert sizes.dtype == torch.int64
    assert sizes.view(3, 2, 8)[:, :, :3].tolist() == [[[0] * 3] * 2, [[4, 3, 0], [1, 4, 0]], [[2, 4, 0], [4, 1, 0]]]
    assert buffers[1].data_ptr() == table.data_ptr()
    assert pack_captured([], "cpu")[0] == ()


@pytest.mark.parametrize(
    "tensor", [torch.zeros(3, 0), torch.zeros([1] * 9), torch.zeros(1).expand(2**31)], ids=["empty", "9 dims", "long"]
)
def test_tensors_that_cannot_be_packed_are_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="a captured tensor must have at most 8 dims"):
        pack_captured([tensor], "cpu")


# -- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_generated_functions_equal_the_evaluator_on_a_gpu(compiler: Call) -> None:
    for name in MASKS:
        compiler(generated.check_mask, name, "cuda")
    for name in SCORES:
        compiler(generated.check_score, name, "cuda")
    first, last = compiler(generated.launches_compile_once, "cuda")
    assert first == last
