"""Models of transformers on a tree: every verified family, the masks of its layers, and what is refused by name."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from families import compare
from family_configs import CHUNK, config_of, model_of, model_types
from hf_models import ARCHITECTURES, WINDOW
from hf_trees import GROUPS, PAIRS, as_a_tree, one_by_one
from torch import Tensor

from cpflex import trees
from cpflex.integrations.transformers import ModelPlan, plan_for, shard_batch
from cpflex.integrations.transformers.classes import VERIFIED, table_of
from cpflex.integrations.transformers.masks import compose, recurrent_types
from cpflex.integrations.transformers.on_trees import masks_on
from processes import RankProcesses

pytestmark = pytest.mark.hf
PACKED = trees.pack(GROUPS)
BAR = {"tolerance": 1e-6, "times": 4}
"""Of log-probabilities and gradients: 1e-6 of their norm, or four times the error of eager attention in fp32."""


def small(model_type: str) -> Any:
    installed = transformers.__version__
    if model_type not in model_types():
        pytest.skip(f"transformers {installed} has no {model_type}")
    try:
        return config_of(model_type)
    except Exception as error:
        if installed == table_of(installed):
            raise
        pytest.skip(f"the recipe is for transformers {table_of(installed)}; here {type(error).__name__}")


def check(model_type: str, processes: RankProcesses | None) -> None:
    if recurrent_types(small(model_type).get_text_config()):
        with pytest.raises(NotImplementedError, match=f"^{model_type}: .* outside of attention, .*on a tree.*lengths="):
            plan_for(config_of(model_type), tree=PACKED.tree)
        return
    truths = [one_by_one(model_type, in_double) for in_double in (False, True)]
    ranks = [as_a_tree(None, model_type)] if processes is None else processes.run(as_a_tree, model_type)
    assert not compare(ranks, *truths, **BAR).beyond


@pytest.mark.by_day(20)
@pytest.mark.parametrize("model_type", sorted(VERIFIED))
def test_a_tree_is_its_sequences_one_by_one(model_type: str):
    check(model_type, None)


@pytest.mark.by_day(60)
@pytest.mark.parametrize("model_type", sorted(VERIFIED))
def test_a_tree_on_two_ranks_is_its_sequences_one_by_one(model_type: str, two_processes: RankProcesses):
    check(model_type, two_processes)


def test_the_sequences_are_longer_than_windows_and_chunks():
    assert max(len(prompt + completion) for prompt, completion in PAIRS) > 2 * max(WINDOW, CHUNK)
    assert PACKED.tree.num_segments > 6
    assert PACKED.seq_len < sum(len(prompt + completion) for prompt, completion in PAIRS) // 2


@pytest.mark.parametrize("layer_type", ["full_attention", "sliding_attention", "chunked_attention"])
@pytest.mark.parametrize("is_depth_first", [True, False])
def test_along_a_path_masks_are_those_that_transformers_makes(layer_type: str, is_depth_first: bool):
    config = ARCHITECTURES["llama"].config()
    config.sliding_window, config.attention_chunk_size = WINDOW, CHUNK
    tree = PACKED.tree if is_depth_first else trees.Tree([-1, -1, 0, 1, 0, 2, 3], [9, 30, 20, 2, 17, 25, 40])
    token = torch.arange(tree.num_tokens)
    mask = masks_on(tree, config, [layer_type])[layer_type]
    found = mask(torch.tensor(0), torch.tensor(0), token[:, None], token)
    expected = torch.zeros_like(found)
    for path in tree.paths():
        alone = compose(config, layer_type, torch.arange(len(path))[None], None, {}, one_row=True)
        step = torch.arange(len(path))
        expected[path[:, None], path] = alone(torch.tensor(0), torch.tensor(0), step[:, None], step)
    assert torch.equal(found, expected)


def logits_of(plan: ModelPlan, model: Any, **batch: Tensor) -> Tensor:
    return model(**shard_batch({"input_ids": PACKED.tokens[None]} | batch, plan, model)).logits


def test_positions_may_begin_elsewhere():
    """As behind padding on the left: absolute positions count it."""
    model = model_of("gpt2", "cpflex")
    late = plan_for(model.config, tree=PACKED.tree, position_ids=PACKED.position_ids + 7)
    prompt, completion = PAIRS[0]
    alone = torch.tensor([prompt + completion])
    plan = plan_for(model.config, seq_len=alone.shape[1])
    positions = torch.arange(7, 7 + alone.shape[1])[None]
    expected = model(**shard_batch({"input_ids": alone, "position_ids": positions}, plan)).logits[
        0, : len(positions[0])
    ]
    path = PACKED.tree.path(int(PACKED.rows[0]))
    torch.testing.assert_close(logits_of(late, model)[0, path], expected, rtol=1e-5, atol=1e-5)
    given = logits_of(late, model, position_ids=PACKED.position_ids[None] + 7)
    torch.testing.assert_close(given[0, path], expected, rtol=1e-5, atol=1e-5)


def test_a_plan_of_a_tree_pickles():
    model = ARCHITECTURES["llama4_text"].model("cpflex")
    plan = plan_for(model.config, tree=PACKED.tree)
    assert torch.equal(logits_of(pickle.loads(pickle.dumps(plan)), model), logits_of(plan, model))
