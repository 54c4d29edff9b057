"""Prefill over ranks, then transformers' own generate: the tokens of one process."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from family_configs import model_of, model_types
from hf_models import ARCHITECTURES, VOCAB
from torch import Tensor

from cpflex import RankMismatch
from cpflex.integrations.transformers import VERIFIED, prefill
from processes import RankProcesses

pytestmark = pytest.mark.hf
SEQ_LEN, NEW = 83, 20
EOS = 7


def prompts(rows: int = 2, seq_len: int = SEQ_LEN, seed: int = 1) -> Tensor:
    return torch.randint(8, VOCAB, (rows, seq_len), generator=torch.Generator().manual_seed(seed))


PADDING = torch.ones(3, SEQ_LEN, dtype=torch.int64)
PADDING[0, :26], PADDING[2, :61] = 0, 0


def model_for_generation(name: str, attention: str, eos: int | None = None) -> Any:
    model = ARCHITECTURES[name].model(attention) if name in ARCHITECTURES else model_of(name, attention)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = eos, 0
    return model.eval()


def generated(
    model: Any, tokens: Tensor, cache: Any = None, seed: int | None = None, new: int = NEW, **asked: Any
) -> tuple[Tensor, Tensor]:
    """Tokens, and the logits that they were chosen from."""
    if cache is not None:
        asked[cache.keyword] = cache
    if seed is not None:
        torch.manual_seed(seed)
    out = model.generate(
        tokens,
        max_new_tokens=new,
        do_sample=seed is not None,
        output_logits=True,
        return_dict_in_generate=True,
        **asked,
    )
    return out.sequences, torch.stack(out.logits)


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
    return generated(model, tokens, cache, **asked)


def on_rank(group: Any, name: str, way: str) -> tuple[Tensor, Tensor]:
    return run(name, way, "cpflex", group)


def check(name: str, way: str, processes: RankProcesses) -> None:
    tokens, logits = run(name, way, "eager")
    for found, found_logits in processes.run(on_rank, name, way):
        torch.testing.assert_close(found_logits, logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(found, tokens)


@pytest.mark.by_day(45)
@pytest.mark.parametrize("name", sorted(VERIFIED | set(ARCHITECTURES)))
def test_two_ranks_generate_the_tokens_of_one_process(name: str, two_processes: RankProcesses):
    if name not in ARCHITECTURES and name not in model_types():
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    try:
        prefill(model_for_generation(name, "cpflex"), prompts(), max_new_tokens=NEW)
    except (NotImplementedError, ValueError) as refusal:
        said = r"not supported with the cache of prefill|computes attention twice|head dims|cpflex-replaced"
        assert name not in ARCHITECTURES and re.search(said, str(refusal)), str(refusal)
        pytest.skip(f"refused by name: {refusal}")
    check(name, "greedy", two_processes)


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


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss", "llama4_text", "gemma2"])
def test_four_ranks_generate_the_tokens_of_one_process(name: str, way: str, four_processes: RankProcesses):
    check(name, way, four_processes)


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
    "recurrent layers": (
        lambda: prefill(model_of("qwen3_next", "cpflex").eval(), prompts(), max_new_tokens=NEW),
        NotImplementedError,
        "outside of attention",
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
