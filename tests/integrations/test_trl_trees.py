"""Calls of TRL's trainers as trees: the numbers and gradients of the rows one by one; when rows stay what they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("trl")

from family_configs import config_of as family_config
from hf_models import ARCHITECTURES
from torch import Tensor
from trl_calls import OUTPUTS, ROWS, batch, called, config_of

from cpflex.integrations.trl_trees import TreeCall, tree_call
from processes import RankProcesses

pytestmark = pytest.mark.hf


def assert_same(ranks: list[dict[str, Tensor]], expected: dict[str, Tensor]) -> None:
    for found in ranks:
        for name in OUTPUTS:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
    for name in expected.keys() - set(OUTPUTS) - {"label_mask"}:
        summed = torch.stack([found[name] for found in ranks]).sum(dim=0)
        error = (summed - expected[name]).norm() / expected[name].norm()
        assert error <= 1e-5, f"{name}: {error}"


@pytest.mark.parametrize("name", ["mistral", "gemma2", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_a_tree_gives_what_the_rows_give(name: str):
    assert_same([called(None, name, "cpflex", share_prefixes=True)], called(None, name, "eager"))


@pytest.mark.by_day(3)
@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss"])
def test_a_tree_on_two_ranks_gives_what_the_rows_give(name: str, two_processes: RankProcesses):
    assert_same(two_processes.run(called, name, "cpflex", True), called(None, name, "eager"))


def made(call: dict[str, Any], config: Any = None, **options: Any) -> TreeCall | None:
    config = config_of("mistral") if config is None else config
    return tree_call(call | {"fused_lm_head": True}, config, None, options)


def test_what_rows_share_is_stored_once():
    call = made(batch())
    assert call is not None
    assert call.packed.num_completions == len(ROWS)
    assert call.packed.seq_len == 31 + 24 + 6 + 1 + 17
    assert call.is_term.sum() == call.packed.num_terms == sum(len(completion) for _, completion in ROWS)


def without_rope(name: str = "gpt2") -> Any:
    import transformers

    return transformers.AutoConfig.for_model(name, attn_implementation="cpflex")


def with_hole() -> dict[str, Tensor]:
    call = batch()
    call["attention_mask"][0, 10] = 0
    return call


def with_label_first() -> dict[str, Tensor]:
    call = batch()
    call["labels"][0, 0] = 5
    return call


def dynamic() -> Any:
    config = ARCHITECTURES["llama"].config(max_position_embeddings=32)
    name = "rope_parameters" if hasattr(config, "rope_parameters") else "rope_scaling"
    setattr(config, name, {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    return config


STAY_ROWS = {
    "nothing is shared": lambda: made(batch([ROWS[0], ROWS[3]])),
    "no labels": lambda: made(batch() | {"labels": None}),
    "images": lambda: made(batch() | {"pixel_values": torch.zeros(1)}),
    "a hole in a row": lambda: made(with_hole()),
    "a label before which nothing stands": lambda: made(with_label_first()),
    "functions of pairs": lambda: made(batch(), and_mask_function=lambda b, h, q, k: k >= 0),
    "positions that count the padding": lambda: made(batch(), without_rope()),
    "positions that count tokens alone": lambda: made(batch(), without_rope("opt")),
    "RoPE that counts the longest row": lambda: made(batch(), dynamic()),
    "recurrent layers": lambda: made(batch(), family_config("lfm2")),
}


@pytest.mark.parametrize("why", STAY_ROWS)
def test_rows_stay_rows_where_a_tree_might_say_something_else(why: str):
    assert STAY_ROWS[why]() is None


def test_positions_that_count_the_padding_are_kept_where_all_rows_have_the_same():
    rows = [(prompt, completion) for prompt, completion in ROWS if len(prompt) > 20]
    call = {
        name: torch.nn.functional.pad(x, (4, 0), value=-100 * (name == "labels")) for name, x in batch(rows).items()
    }
    found = made(call, without_rope())
    assert found is not None
    assert torch.equal(found.plan.position_ids[0], found.packed.position_ids + 4)
