"""Mods on scalars: they equal the evaluator, by a stand-in for CuTe DSL and, where it is installed, by itself."""

from __future__ import annotations

from importlib import metadata

import generated
import pytest
import torch
from cute_checks import by_cute_dsl, by_stand_in, check_mask, check_mask_mod, check_operation, check_score

from cpflex.mods.cute import require_form, tables_of
from cpflex.mods.graph import Graph
from cpflex.mods.trace import UnsupportedMod, trace_mask_mod, trace_score_mod

NO_FORM = {
    "shifts out of range": "lshift by a number that may be out of range",
    "shifts by negative numbers": "lshift by a number that may be out of range",
    "integer powers": "an integer to another power than 0 to 8",
    "double tables": "float64",
    "float remainders": "remainder .float32.",
    "log distance": "log1p .float32.",
    "double slopes": "float64",
    "exponentials": "expm1 .float32.",
    "logarithms": "log1p .float32.",
    "remainders": "remainder .float32.",
}
MASKS = [name for name in generated.all_masks() if name not in NO_FORM]
SCORES = [name for name in generated.all_scores() if name not in NO_FORM]
REFUSED_OPERATIONS = ("expm1", "log1p", "fmod", "remainder", "floor_div", "remainder by a number")
OPERATIONS = [name for name in generated.OPERATIONS if name not in REFUSED_OPERATIONS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDED_BY_TORCH = {("erf", torch.bfloat16), ("erf", torch.float16)}
"""torch flushes erf of tiny 16-bit numbers."""
POWERS_OF_HALVES = {("pow 0.5", torch.float16), ("pow -0.5", torch.float16)}
"""torch takes the root of -inf for NaN in fp32 and bf16, and for inf in fp16."""
ALL_OPERATIONS = [
    (name, dtype) for name in OPERATIONS for dtype in DTYPES if (name, dtype) not in ROUNDED_BY_TORCH | POWERS_OF_HALVES
]


def graph_of(name: str) -> Graph:
    masks = generated.all_masks()
    return (trace_mask_mod(masks[name]) if name in masks else trace_score_mod(generated.all_scores()[name])).graph


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_on_scalars_equals_the_evaluator_bit_by_bit(name: str):
    require_form(graph_of(name))
    check_mask(name, by_stand_in)


@pytest.mark.parametrize("name", SCORES)
def test_a_score_mod_on_scalars_and_its_derivative_equal_the_evaluator(name: str):
    require_form(graph_of(name))
    check_score(name, by_stand_in)


@pytest.mark.parametrize(("name", "dtype"), ALL_OPERATIONS, ids=str)
def test_an_operation_on_scalars_rounds_as_torch_does(name: str, dtype: torch.dtype):
    check_operation(name, dtype, by_stand_in)


def test_random_masks_on_scalars_equal_the_evaluator_bit_by_bit():
    compared = 0
    for mod, rng in generated._random_masks(range(60)):
        if any(node.op in generated.APPROXIMATED and node.dtype.is_floating_point for node in mod.graph.nodes):
            continue
        try:
            check_mask_mod(mod, rng, by_stand_in)
        except (UnsupportedMod, RuntimeError, OverflowError):  # a division by the int 0
            continue
        compared += 1
    assert compared > 20


@pytest.mark.parametrize("name", NO_FORM)
def test_what_has_no_form_is_refused_by_name(name: str):
    with pytest.raises(UnsupportedMod, match=f"{NO_FORM[name]}.*has no CuTe form"):
        require_form(graph_of(name))


def test_tables_are_contiguous_and_of_a_dim_at_least():
    given = [torch.tensor(3), torch.zeros(1, 1), torch.zeros(4, 2).T, torch.tensor([True, False]), torch.zeros(5, 1)]
    made = tables_of(given, torch.device("cpu"))
    assert [tuple(t.shape) for t in made] == [(1,), (1,), (2, 4), (2,), (5, 1)]
    assert all(t.is_contiguous() for t in made)
    assert made[3].dtype == torch.uint8


# -- with CuTe DSL


def is_installed() -> bool:
    try:
        return bool(metadata.version("nvidia-cutlass-dsl"))
    except metadata.PackageNotFoundError:
        return False


installed = [pytest.mark.skipif(not is_installed(), reason="nvidia-cutlass-dsl is not installed"), pytest.mark.slow]
installed += [pytest.mark.filterwarnings("ignore")]  # it warns of what it will rename


def has_erf(graph: Graph) -> bool:
    return any(node.op in ("erf", "atan2") for node in graph.nodes)


class TestCuteDsl:
    pytestmark = installed

    @pytest.mark.parametrize("name", MASKS)
    def test_a_mask_equals_the_evaluator_bit_by_bit(self, name: str):
        check_mask(name, by_cute_dsl)

    @pytest.mark.parametrize("name", [name for name in SCORES if not has_erf(graph_of(name))])
    def test_a_score_mod_and_its_derivative_equal_the_evaluator(self, name: str):
        check_score(name, by_cute_dsl)  # the CPU has no erf there

    @pytest.mark.parametrize(("name", "dtype"), [case for case in ALL_OPERATIONS if case[0] != "erf"], ids=str)
    def test_an_operation_rounds_as_torch_does(self, name: str, dtype: torch.dtype):
        check_operation(name, dtype, by_cute_dsl)
