"""Prefill over ranks, then transformers' own generate: the tokens of one process."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from family_configs import model_of, model_types
from generations import SEQ_LEN, TOLERANCE, generated, off, one_process, outcome_of, prompts, recorded
from generations import on_rank as on_one_rank
from hf_models import ARCHITECTURES
from torch import Tensor

from cpflex import RankMismatch
from cpflex.integrations.transformers import (
    VERIFIED,
    attach_recurrent,
    detach_recurrent,
    exchanged,
    plan_for,
    prefill,
    shard_batch,
)
from cpflex.integrations.transformers.verified import VERIFIED_BY_RELEASE
from processes import RankProcesses

pytestmark = pytest.mark.hf
NEW = 20
EOS = 7


PADDING = torch.ones(3, SEQ_LEN, dtype=torch.int64)
PADDING[0, :26], PADDING[2, :61] = 0, 0


def model_for_generation(name: str, attention: str, eos: int | None = None) -> Any:
    model = ARCHITECTURES[name].model(attention) if name in ARCHITECTURES else model_of(name, attention)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = eos, 0
    return model.eval()


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"seed": 5},
    "padded left": {"attention_mask": PADDING},
    "with an end": {"eos": EOS, "new": 2 * NEW},
}


def run(name: str, way: str, attention: str, group: Any = None) -> tuple[Tensor, Tensor]:
    asked = dict(WAYS[way])
    model = model_for_generation(name, attention, asked.pop("eos", None))
    mask = asked.get("attention_mask")
    tokens = prompts(2 if mask is None else len(mask))
    cache = None
    if attention == "cpflex":
        cache = prefill(model, tokens, group, max_new_tokens=asked.get("new", NEW), attention_mask=mask)
    return generated(model, tokens, cache, **{"new": NEW} | asked)


def on_rank(group: Any, name: str, way: str) -> tuple[Tensor, Tensor]:
    return run(name, way, "cpflex", group)


def check(name: str, way: str, processes: RankProcesses) -> None:
    tokens, logits = run(name, way, "eager")
    for found, found_logits in processes.run(on_rank, name, way):
        torch.testing.assert_close(found_logits, logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(found, tokens)


def matches_the_table(model_type: str, processes: RankProcesses) -> None:
    """What comes out is what the table says; a release without one may refuse by name, and differ in nothing."""
    if model_type not in model_types():
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    known = recorded().get(transformers.__version__, {"types": {}})["types"].get(model_type)
    try:
        truth = one_process(model_type)
    except Exception as error:
        if known is not None:
            raise
        pytest.skip(f"the recipe is for another release; with this one: {type(error).__name__}")
    row = outcome_of(model_type, {processes.world_size: processes}, truth)
    if known is None:
        assert row["outcome"] in ("equal", "refused"), row
    else:
        assert [row.get(x) for x in ("outcome", "why", "refused")] == [
            known.get(x) for x in ("outcome", "why", "refused")
        ]


@pytest.mark.parametrize("model_type", ["jamba", "bloom", "diffllama"])
def test_one_rank_generates_the_tokens_of_one_process(model_type: str):
    """With states of recurrent layers, ALiBi, two attentions in a layer."""
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("these types are verified with transformers 5")
    truth, eos = one_process(model_type)
    for way, answer in on_one_rank(None, model_type, eos).items():
        assert not isinstance(answer, str), answer
        assert off(answer, truth[way]) <= TOLERANCE, way


@pytest.mark.by_day(130)
@pytest.mark.parametrize("model_type", sorted(VERIFIED))
def test_two_ranks_generate_the_tokens_of_one_process(model_type: str, two_processes: RankProcesses):
    matches_the_table(model_type, two_processes)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(VERIFIED))
def test_four_ranks_generate_the_tokens_of_one_process(model_type: str, four_processes: RankProcesses):
    matches_the_table(model_type, four_processes)


def test_the_table_is_of_verified_types_of_its_release():
    for release, table in recorded().items():
        assert set(table["types"]) <= VERIFIED_BY_RELEASE[release]
        assert {row["outcome"] for row in table["types"].values()} == {"equal", "refused"}


@pytest.mark.by_day(4)
@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("gemma2", "sampled"),
        ("gpt_oss", "padded left"),
        ("llama4_text", "padded left"),
        ("gemma3_text", "with an end"),
    ],
)
def test_two_ranks_sample_pad_and_end_as_one_process(name: str, way: str, two_processes: RankProcesses):
    check(name, way, two_processes)


# -- going on


def talked(name: str, attention: str, group: Any = None) -> Tensor:
    """A prompt, its answer, a further question, its answer."""
    model, tokens = model_for_generation(name, attention), prompts()
    cache = prefill(model, tokens, group, max_new_tokens=2 * NEW + 9) if attention == "cpflex" else None
    answered, _ = generated(model, tokens, cache)
    return generated(model, torch.cat([answered, prompts(seq_len=9, seed=2)], dim=1), cache)[0]


def talked_on_rank(group: Any, name: str) -> Tensor:
    return talked(name, "cpflex", group)


@pytest.mark.parametrize("name", ["gemma3_text"])
def test_a_cache_goes_on_after_more_tokens_of_the_user(name: str, two_processes: RankProcesses):
    truth = talked(name, "eager")
    assert all(torch.equal(found, truth) for found in two_processes.run(talked_on_rank, name))


def sampled_unequally(group: Any) -> str:
    model, tokens = model_for_generation("llama", "cpflex"), prompts()
    cache = prefill(model, tokens, group, max_new_tokens=NEW)
    try:
        generated(model, tokens, cache, seed=torch.distributed.get_rank())
    except RankMismatch as error:
        return str(error)
    return "nothing was noticed"


def test_ranks_that_sample_other_tokens_are_found_out(two_processes: RankProcesses):
    for said in two_processes.run(sampled_unequally):
        assert "token" in said, said


def pages_of(group: Any) -> tuple[int, list[int]]:
    model, tokens = model_for_generation("llama", "cpflex"), prompts()
    cache = prefill(model, tokens, group, max_new_tokens=NEW)
    return cache.pools[0].k.shape[2], [cache.pages.world_size, cache.get_seq_length()]


def test_every_rank_keeps_a_part_of_the_prompt(two_processes: RankProcesses):
    whole, _ = pages_of(None)
    for rows, facts in two_processes.run(pages_of):
        assert rows < whole and facts == [2, SEQ_LEN - 1]


# -- what is refused


def from_prefill(name: str = "llama", room: int = NEW, mask: Tensor | None = None, **asked: Any) -> Any:
    model = model_for_generation(name, "cpflex")
    tokens = prompts(2 if mask is None else len(mask))
    cache = prefill(model, tokens, max_new_tokens=room, attention_mask=mask)
    return generated(model, tokens, cache, **asked)


def only_prefill(name: str = "llama", mask: Tensor | None = None, **changes: Any) -> Any:
    model = ARCHITECTURES[name].model("cpflex", **changes).eval()
    return prefill(model, prompts(2 if mask is None else len(mask)), max_new_tokens=NEW, attention_mask=mask)


def after_prefill(change: Any, name: str = "bamba") -> Any:
    """What was changed about a model, with a cache from before."""
    model = model_for_generation(name, "cpflex")
    cache = prefill(model, prompts(), max_new_tokens=NEW)
    change(model)
    return generated(model, prompts(), cache)


REFUSED = {
    "beam search": (lambda: from_prefill(num_beams=2), NotImplementedError, "beam search"),
    "several answers": (lambda: from_prefill(seed=1, num_return_sequences=2), NotImplementedError, "rows"),
    "more than there is room for": (lambda: from_prefill(room=5), ValueError, "max_new_tokens"),
    "padding that prefill was not told of": (
        lambda: from_prefill(attention_mask=PADDING[:2]),
        ValueError,
        "must be that of prefill",
    ),
    "padding that generate was not told of": (
        lambda: from_prefill(mask=PADDING),
        ValueError,
        "prefill was given padding",
    ),
    "a plain cache": (
        lambda: generated(model_for_generation("llama", "cpflex"), prompts()),
        ValueError,
        "pass the cache of prefill",
    ),
    "a static cache": (
        lambda: generated(model_for_generation("llama", "cpflex"), prompts(), cache_implementation="static"),
        ValueError,
        "pass the cache of prefill",
    ),
    "a static cache beside it": (lambda: from_prefill(cache_implementation="static"), ValueError, "cache"),
    "padding on the right": (lambda: only_prefill(mask=PADDING.flip(1)), NotImplementedError, "on the left alone"),
    "another implementation": (
        lambda: prefill(ARCHITECTURES["llama"].model("eager"), prompts(), max_new_tokens=1),
        ValueError,
        "attn_implementation",
    ),
    "no room": (
        lambda: prefill(ARCHITECTURES["llama"].model("cpflex"), prompts(), max_new_tokens=0),
        ValueError,
        "max_new_tokens",
    ),
    "one token": (
        lambda: prefill(ARCHITECTURES["llama"].model("cpflex"), prompts(seq_len=1), max_new_tokens=1),
        ValueError,
        "at least 2",
    ),
    "recurrent layers with a cache of their own": (
        lambda: prefill(model_of("minimax", "cpflex").eval(), prompts(), max_new_tokens=NEW),
        NotImplementedError,
        "a cache of its class",
    ),
    "heads that no kernel of pages takes": (
        lambda: prefill(model_of("gemma4_text", "cpflex").eval(), prompts(), max_new_tokens=NEW),
        NotImplementedError,
        "head dims must be at most 256",
    ),
    "keys of the last loop": (
        lambda: prefill(model_of("dory", "cpflex", recurrent_kv_cache_mode="last_loop"), prompts(), max_new_tokens=NEW),
        NotImplementedError,
        "recurrent_kv_cache_mode",
    ),
    "images": (lambda: from_prefill(pixel_values=torch.zeros(1)), (NotImplementedError, ValueError), "pixel_values"),
    "tokens of images": (
        lambda: prefill(model_of("gemma3", "cpflex", image_token_id=9), torch.full((1, 5), 9), max_new_tokens=NEW),
        NotImplementedError,
        "text alone",
    ),
    "recurrent layers that were detached": (
        lambda: after_prefill(detach_recurrent),
        NotImplementedError,
        "after prefill",
    ),
    "recurrent layers that were attached otherwise": (
        lambda: after_prefill(lambda model: attach_recurrent(model, exchanged)),
        NotImplementedError,
        "after prefill",
    ),
    "a layer that was computed with the prompt alone": (
        lambda: after_prefill(lambda model: setattr(model.model, "layers", model.model.layers[:1]), "llama"),
        NotImplementedError,
        "computed 1 attentions, and 2 with the prompt",
    ),
    "layers in another order": (
        lambda: after_prefill(lambda model: setattr(model.model, "layers", model.model.layers[::-1]), "llama"),
        ValueError,
        "attention 0 of the prompt was that of",
    ),
    "RoPE that changes with the length": (
        lambda: only_prefill(rope_scaling={"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=90),
        NotImplementedError,
        "dynamic RoPE that changes at 90",
    ),
    "an encoder and a decoder": (
        lambda: prefill(
            transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=9, d_model=8, num_layers=1)),
            prompts(),
            max_new_tokens=NEW,
        ),
        ValueError,
        "attn_implementation",
    ),
    "prompt lookup": (
        lambda: from_prefill("llama", prompt_lookup_num_tokens=3),
        (NotImplementedError, ValueError),
        "assisted generation|beam search|rows|one sequence|batch",
    ),
}


@pytest.mark.parametrize("which", REFUSED)
def test_what_cannot_be_right_is_refused_by_name(which: str):
    ask, error, said = REFUSED[which]
    with pytest.raises(error, match=said):
        ask()


def test_prompt_lookup_is_refused_for_one_row():
    model, tokens = model_for_generation("llama", "cpflex"), prompts(1)
    cache = prefill(model, tokens, max_new_tokens=NEW)
    with pytest.raises(NotImplementedError, match="assisted generation and prompt lookup"):
        generated(model, tokens, cache, prompt_lookup_num_tokens=3)


def test_a_cache_goes_with_its_own_model():
    model, other = (model_for_generation("llama", "cpflex") for _ in range(2))
    cache = prefill(model, prompts(), max_new_tokens=NEW)
    with pytest.raises((ValueError, RuntimeError), match=r"pass the cache of prefill|call that model itself"):
        generated(other, prompts(), cache)


ON_EVERY_RANK: dict[str, tuple[dict[str, Any], str]] = {
    "beam search": ({"num_beams": 2}, "beam search"),
    "several answers": ({"seed": 1, "num_return_sequences": 2}, "num_return_sequences"),
    "more than there is room for": ({"new": 2 * NEW}, "larger max_new_tokens"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, "assisted generation and prompt lookup"),
    "an assistant": ({"assistant_model": "llama"}, "assisted generation and prompt lookup"),
    "a static cache": ({"cache_implementation": "static"}, "cache_implementation"),
    "a quantised cache": ({"cache_implementation": "quantized"}, "cache_implementation"),
    "an offloaded cache": ({"cache_implementation": "offloaded"}, "cache_implementation"),
    "contrastive search": ({"penalty_alpha": 0.6, "top_k": 4}, "[Cc]ontrastive"),
    "no cache": ({"use_cache": False}, "use_cache=False"),
    "another padding": ({"attention_mask": torch.arange(SEQ_LEN)[None] > 3}, "must be that of prefill"),
}


def refused_on_rank(group: Any) -> tuple[dict[str, str], Tensor]:
    """What each is refused with, and what the group generates after all of them."""
    model, tokens, said = model_for_generation("llama", "cpflex"), prompts(1), {}
    for what, (asked, _) in ON_EVERY_RANK.items():
        given = dict(asked)
        if "assistant_model" in given:
            given["assistant_model"] = model_for_generation(given["assistant_model"], "eager")
        cache = prefill(model, tokens, group, max_new_tokens=NEW)
        try:
            generated(model, tokens, cache, **given)
            said[what] = "nothing"
        except (NotImplementedError, ValueError) as refusal:
            said[what] = str(refusal)
    return said, generated(model, tokens, prefill(model, tokens, group, max_new_tokens=NEW))[0]


def test_every_rank_refuses_alike_and_the_group_goes_on(two_processes: RankProcesses):
    truth, _ = generated(model_for_generation("llama", "eager"), prompts(1))
    for said, tokens in two_processes.run(refused_on_rank):
        for what, (_, words) in ON_EVERY_RANK.items():
            assert re.search(words, said[what]), (what, said[what])
        assert torch.equal(tokens, truth)


def test_a_model_whose_layers_were_attached_still_trains_after_prefill():
    model, tokens = model_of("bamba", "cpflex"), prompts()
    attach_recurrent(model, exchanged)

    def loss() -> Tensor:
        plan = plan_for(model.config, seq_len=SEQ_LEN)
        return model(**shard_batch({"input_ids": tokens, "labels": tokens}, plan, model)).loss

    before = loss()
    model.eval()
    for _ in range(2):
        assert generated(model, tokens, prefill(model, tokens, max_new_tokens=NEW))[0].shape[1] > SEQ_LEN
    assert torch.equal(loss(), before)
