"""Layers of models one by one: compiled, without the rest of their model, planned where nothing is recorded."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from hf_models import ARCHITECTURES
from hf_refusals import small_plan
from hf_runs import TOKENS, Case, gradients
from torch import Tensor

from cpflex.integrations.transformers import PlanMask, attention_forward, plan_for, shard_batch

pytestmark = pytest.mark.hf


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def loss_and_gradients(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler looks at it
def test_layers_may_be_compiled_one_by_one():
    """Softcap, windows, and a plan of two kinds."""
    case = Case("gemma2")
    eager, compiled = case.model("cpflex"), case.model("cpflex")
    batch = shard_batch(TOKENS[case.tokens].batch(), case.plan(eager.config))
    for layer in compiled.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    expected = loss_and_gradients(eager, batch)
    for key, found in loss_and_gradients(compiled, batch).items():
        torch.testing.assert_close(found, expected[key], msg=lambda said, key=key: f"{key}: {said}")


def test_a_softcap_that_the_plan_does_not_know_is_refused_under_the_compiler_and_traced_without():
    plan, q = small_plan("gemma2"), torch.randn(1, 4, 96, 8)
    plan = replace(plan, softcap=None)
    q = q[:, :, : plan.plan.local_len]

    def forward(cap: float) -> Tensor:
        return attention_forward(torch.nn.Module(), q, q, q, plan["full_attention"], 0.3, softcap=cap)[0]

    with_it = replace(plan, softcap=2.0)["full_attention"]
    expected = attention_forward(torch.nn.Module(), q, q, q, with_it, 0.3, softcap=2.0)[0]
    torch.testing.assert_close(forward(2.0), expected, rtol=0, atol=0)
    mask = plan["full_attention"]
    compiled = torch.compile(
        lambda q: attention_forward(torch.nn.Module(), q, q, q, mask, 0.3, softcap=2.0)[0],
        fullgraph=True, backend="eager",
    )  # fmt: skip
    with pytest.raises(Exception, match=r"must know softcap=2.0; it has None - pass the plan of plan_for"):
        compiled(q)


def test_the_mask_of_a_layer_pickles_with_its_softcap():
    mask = pickle.loads(pickle.dumps(small_plan("gemma2")["sliding_attention"]))
    assert (mask.layer_type, mask.window, mask.softcap) == ("sliding_attention", 13, 2.0)
    assert mask.softcap_mod is not None


def layer_after_the_last(name: str, mask: Any, layer_idx: int | None = None) -> Tensor:
    config = ARCHITECTURES[name].config()
    module: Any = torch.nn.Module()
    module.config, module.layer_idx = config, config.num_hidden_layers if layer_idx is None else layer_idx
    q = torch.randn(2, 4, mask.plan.local_len, 8)
    return attention_forward(module, q, q, q, mask, 0.3)[0]


def test_a_layer_after_the_last_is_of_the_type_of_all_or_is_told_what_to_do():
    """Heads that predict several tokens, and those of draft models."""
    uniform, hybrid = small_plan("llama"), small_plan("gemma2")
    assert layer_after_the_last("llama", uniform["full_attention"]).isfinite().all()
    assert layer_after_the_last("llama", uniform["full_attention"], -1).isfinite().all(), (
        "one that stands in many places"
    )
    with pytest.raises(ValueError, match="layer_idx=-1 is beyond"):
        layer_after_the_last("gemma2", hybrid["full_attention"], -1)
    said = r"layer_idx=3 is beyond the 3 layers of the config.*PlanMask\(plan\.plan\[layer_type\]\)"
    with pytest.raises(ValueError, match=said):
        layer_after_the_last("gemma2", hybrid["full_attention"])
    assert layer_after_the_last("gemma2", PlanMask(hybrid.plan["full_attention"])).isfinite().all()


@pytest.mark.parametrize("tokens", ["packed", "padded left"])
def test_a_plan_made_in_inference_mode_trains_as_any_other(tokens: str):
    case = Case("gemma2", tokens)
    model, other = case.model("cpflex"), case.model("cpflex")
    planned = {name: torch.as_tensor(x).clone() for name, x in TOKENS[tokens].planned.items()}
    with torch.inference_mode():
        here = {name: x.clone() for name, x in planned.items()}  # tensors of inference mode
        plan = plan_for(model.config, **here)
        seen = model(**shard_batch(TOKENS[tokens].batch(), plan)).loss
    expected = loss_and_gradients(other, shard_batch(TOKENS[tokens].batch(), plan_for(model.config, **planned)))
    found = loss_and_gradients(model, shard_batch(TOKENS[tokens].batch(), plan))
    assert torch.equal(seen, expected["loss"])
    assert all(torch.equal(found[name], expected[name]) for name in expected)
