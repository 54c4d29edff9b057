"""pytest -p pretended_gpu -m gpu tests/gpu: the tests of a GPU, on a pretended one, up to each launch.

    cd tests/pretend && python -m pytest -p pretended_gpu -m gpu ../gpu --pretend-capability 86 --pretend-compiles

What the kernels would have computed is not there; results are compared by name, shape and dtype.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Iterator

import pytest
import torch
from pretended import Events, pretending
from torch import Tensor

torch.cuda.is_available = lambda: True  # when tests are collected


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pretend-capability", type=int, default=90, help="90: sm_90")
    parser.addoption("--pretend-sample", type=int, default=0, help="today's so many of the tests only")
    parser.addoption("--pretend-compiles", action="store_true", help="compile, and let the driver hear each launch")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A tool of CUDA's runs processes of its own, on a GPU; of the others, if wished, another sample every day."""
    kept = [item for item in items if "memcheck" not in item.name]
    if sample := config.option.pretend_sample:
        kept = random.Random(datetime.date.today().isoformat()).sample(kept, min(sample, len(kept)))
    left_out = [item for item in items if item not in kept]
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    options = item.config.option
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    with (
        pretending(options.pretend_capability, compiles=options.pretend_compiles, computes_up_to=1 << 17) as events,
        pytest.MonkeyPatch.context() as patch,
    ):
        _judge_by_shape(patch)
        found = yield
        _expect_launches(item, events)
        return found


def _expect_launches(item: pytest.Item, events: Events) -> None:
    names = {launch.name for launch in events.launches}
    assert names >= item.module.KERNELS, f"{item.name} launched {sorted(names)} only"  # type: ignore[attr-defined]
    item.add_report_section("call", "pretended", str(events.counts()))


def _judge_by_shape(patch: pytest.MonkeyPatch) -> None:
    import verdicts

    def of_a_case(case, tensors: list[Tensor], results: dict[str, Tensor]) -> None:
        (heads, kv_heads), (dim, v_dim), rows = case.heads, case.dims, (case.batch, case.seq_len)
        shapes = {"out": (heads, v_dim), "dq": (heads, dim), "dk": (kv_heads, dim), "dv": (kv_heads, v_dim)}
        assert results.keys() == {"lse", *shapes}
        assert (results["lse"].shape, results["lse"].dtype) == ((rows[0], heads, rows[1]), torch.float32)
        for name, (h, d) in shapes.items():
            assert results[name].shape == (rows[0], h, rows[1], d), name
            assert results[name].dtype == tensors[0].dtype, name
            assert results[name].is_cuda, name

    def alike(x: Tensor | dict[str, Tensor], y: Tensor | dict[str, Tensor], *_) -> None:
        described = [{n: (t.shape, t.dtype, t.is_cuda) for n, t in (z if isinstance(z, dict) else {"": z}).items()} for z in (x, y)]  # fmt: skip
        assert described[0] == described[1]

    def of_pages(found: dict[str, Tensor], true: dict[str, Tensor], close: dict[str, Tensor]) -> None:
        alike(found, close)

    patch.setattr(verdicts, "assert_within_budget", of_a_case)
    patch.setattr(verdicts, "assert_pages_within_budget", of_pages)
    patch.setattr(verdicts, "captured", lambda run: run)
    for name in ("assert_same_bits", "assert_other_bits", "assert_near", "assert_near_twin"):
        patch.setattr(verdicts, name, alike)
