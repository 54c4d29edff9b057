"""Hugging Face models, unmodified: N ranks compute what one process with transformers' own attention computes."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from hf_models import ARCHITECTURES, WINDOW
from hf_refusals import REFUSALS, attend, other_config
from hf_runs import (
    HIDDEN_KEYS,
    SEQ_LEN,
    TOKENS,
    Case,
    assert_equal_to_one_process,
    logits_on_rank,
    on_rank,
    one_process,
    trace_tokens,
    train_on_rank,
    train_one_process,
    with_functions_on_rank,
    wrapped_on_rank,
    written_out_masks,
)
from support_matrix import DOCUMENT, support_matrix
from torch import Tensor

import cpflex
from cpflex.integrations.transformers import PlanMask, masks, plan_for, shard_batch
from cpflex.integrations.transformers.batch import shifted
from processes import RankProcesses

pytestmark = pytest.mark.hf
LAYOUT_NAMES = ("balanced", "zigzag", "striped", "contiguous")


def matrix() -> list:
    """Every architecture with every kind of batch on 2 and on 4 ranks, the layouts in turn; a quarter is in the default
    run.
    """
    params = []
    for (i, name), (j, tokens), (k, world_size) in itertools.product(*map(enumerate, (ARCHITECTURES, TOKENS, (2, 4)))):
        case = Case(name, tokens, world_size, LAYOUT_NAMES[(i + 2 * j + k) % 4])
        marks = [] if (i + j + 2 * k) % 4 == 0 else [pytest.mark.slow]
        params.append(pytest.param(case, world_size, id=str(case), marks=marks))
    return params


@pytest.mark.parametrize(("case", "processes"), matrix(), indirect=["processes"])
def test_ranks_compute_the_loss_and_gradients_of_one_process(case: Case, processes: RankProcesses):
    assert_equal_to_one_process(processes.run(on_rank, case), one_process(case))


@pytest.mark.parametrize("wrap", ["DDP", "FSDP"])
def test_averaged_gradients_of_the_multiplied_loss_are_those_of_one_process(wrap: str, two_processes: RankProcesses):
    case = Case("gemma2", "packed")
    for result in two_processes.run(wrapped_on_rank, case, wrap):
        assert_equal_to_one_process([result], one_process(case))


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "llama4_text", "mistral"])
def test_bfloat16_is_as_exact_as_in_one_process(name: str, two_processes: RankProcesses):
    """The median over the tokens: where rounding sends a token to another expert, the error is large in both."""
    case = Case(name, "one document")
    batch = TOKENS[case.tokens].batch()
    with torch.no_grad():
        truth = case.model("eager")(**batch, use_cache=False).logits
        rounded = case.model("eager").bfloat16()(**batch, use_cache=False).logits
    (ours, _) = two_processes.run(logits_on_rank, case)
    errors = [((x.float() - truth).norm(dim=-1) / truth.norm(dim=-1)).median() for x in (ours, rounded)]
    assert errors[0] <= 1.5 * errors[1]


def test_a_model_type_nobody_compared_can_be_planned_on_ones_own_account():
    config = other_config()
    assert plan_for(config, seq_len=SEQ_LEN, verified_only=False).windows == {"full_attention": None}


@pytest.mark.parametrize("name", ["gemma2", pytest.param("olmo3", marks=pytest.mark.slow)])
def test_training_follows_the_loss_of_one_process(name: str, two_processes: RankProcesses):
    """50 steps of a hybrid model on packs that change, with activation checkpointing on the ranks only."""
    case = Case(name, world_size=2)
    expected = torch.tensor(train_one_process(case))
    for losses in two_processes.run(train_on_rank, case, timeout=200):
        torch.testing.assert_close(torch.tensor(losses), expected, rtol=1e-5, atol=0)
    assert expected[-3:].mean() < 0.9 * expected[:3].mean(), "it learns"


# -- probes


def embeddings() -> Tensor:
    return torch.randn(1, SEQ_LEN, 32, generator=torch.Generator().manual_seed(5))


def changed(embeds: Tensor, where: Tensor) -> Tensor:
    return torch.where(where[:, None], 3 * embeds.flip(2) + 1, embeds)


@pytest.mark.parametrize("layout", ["balanced", pytest.param("striped", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "gpt_oss", "llama4_text", "olmo3"])
def test_no_document_hears_of_another_through_the_whole_model(name: str, layout: str, two_processes: RankProcesses):
    """Bit by bit, in logits and in gradients of the inputs.

    Every token goes to all experts: how many share one changes the rounding of its matrix products.
    """
    all_experts = (("num_experts_per_tok", 4),) if name in ("gpt_oss", "llama4_text") else ()
    case = Case(name, "packed", 2, layout, all_experts)
    inside = TOKENS["packed"].documents[0] == 3
    before, after = (
        two_processes.run(trace_tokens, case, embeds) for embeds in (embeddings(), changed(embeddings(), inside))
    )
    for rank in range(2):
        for what in ("logits", "gradient"):
            assert torch.equal(before[rank][what][:, ~inside], after[rank][what][:, ~inside]), f"{what} moved"
            assert not torch.equal(before[rank][what][:, inside], after[rank][what][:, inside]), f"{what} did not move"


@pytest.mark.parametrize("layout", ["balanced", "zigzag"])
def test_nothing_moves_beyond_the_windows_of_the_layers(layout: str, two_processes: RankProcesses):
    case = Case("mistral", "one document", 2, layout)
    token, reach = 20, 2 * (WINDOW - 1)
    position = torch.arange(SEQ_LEN)
    embeds = embeddings().expand(2, -1, -1)
    before, after = (
        two_processes.run(trace_tokens, case, x)[0]["logits"] for x in (embeds, changed(embeds, position == token))
    )
    moved = (before != after).flatten(2).any(-1)
    assert not moved[:, (position < token) | (position > token + reach)].any()
    assert moved[:, token + reach].all(), "the last token that two windows reach"


# -- masks that users write


@pytest.mark.parametrize("name", ["gemma2", "qwen2"])
def test_mask_functions_of_users_are_planned(name: str, two_processes: RankProcesses):
    case = Case(name, "one document")

    def with_functions(seen: Tensor, _sliding: bool) -> Tensor:
        q, k = torch.arange(SEQ_LEN)[:, None], torch.arange(SEQ_LEN)[None, :]
        return (seen | ((q < 20) & (k < 20))) & ((q == k) | ~HIDDEN_KEYS)

    model = case.model("eager")
    masks = written_out_masks(model.config, torch.zeros(2, SEQ_LEN), with_functions)
    loss = model(**TOKENS[case.tokens].batch(), attention_mask=masks, use_cache=False).loss
    loss.backward()
    truth = float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_equal_to_one_process(two_processes.run(with_functions_on_rank, case), truth)


def test_a_plan_of_the_users_own_masks():
    """Plans by themselves are taken, too: here every layer sees all keys."""
    model = ARCHITECTURES["llama"].model("cpflex")
    plan = cpflex.make_plan(cpflex.full(), SEQ_LEN)
    ids = TOKENS["one document"].batch()["input_ids"]
    local, position_ids = (plan.shard(x, 1, pad_value=0) for x in (ids, torch.arange(SEQ_LEN)[None]))
    out = model(input_ids=local, position_ids=position_ids, attention_mask=PlanMask(plan), use_cache=False).logits
    out = plan.unshard(out, 1)
    truth = ARCHITECTURES["llama"].model("eager")
    no_mask = torch.zeros(1, 1, SEQ_LEN, SEQ_LEN)
    torch.testing.assert_close(
        out, truth(input_ids=ids, attention_mask=no_mask, use_cache=False).logits, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("described", ["packed", "rows packed differently", "padded left"])
def test_every_description_of_documents_gives_one_plan(described: str):
    tokens, config = TOKENS[described], ARCHITECTURES["gemma2"].config()
    plan = plan_for(config, rank=1, world_size=3, **tokens.planned)
    if described != "padded left":
        others = [{"position_ids": tokens.one_process["position_ids"]}, {"doc_ids": tokens.documents}]
        if described == "packed":
            others += [{"cu_seqlens": torch.tensor([0, 31, 32, 72, 83])}, {"doc_ids": tokens.documents[0]}]
        for other in others:
            same = plan_for(config, rank=1, world_size=3, **other)
            assert same.plan.fingerprint == plan.plan.fingerprint
            assert torch.equal(same.position_ids, plan.position_ids)
    assert set(plan.windows) == {"full_attention", "sliding_attention"}
    assert plan.windows["sliding_attention"] == WINDOW


def test_plans_pickle_and_are_bound_later():
    plan = plan_for(ARCHITECTURES["gemma2"].config(), rank=0, world_size=1, **TOKENS["padded left"].planned)
    copy = pickle.loads(pickle.dumps(plan)).bind(None)
    batch = shard_batch(TOKENS["padded left"].batch(), copy)
    assert pickle.loads(pickle.dumps(batch["attention_mask"]))["sliding_attention"].window == WINDOW
    model = ARCHITECTURES["gemma2"].model("cpflex")
    assert model(**batch).loss.isfinite()


def test_the_implementation_is_chosen_as_any_other():
    from transformers import AutoModelForCausalLM

    config = ARCHITECTURES["qwen2"].config()
    made = AutoModelForCausalLM.from_config(config, attn_implementation="cpflex")
    switched = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    switched.set_attn_implementation("cpflex")
    for model in (made, switched):
        plan = plan_for(model.config, **TOKENS["packed"].planned)
        assert model(**shard_batch(TOKENS["packed"].batch(), plan)).loss.isfinite()


def test_a_mask_goes_where_batches_are_moved():
    mask = plan_for(ARCHITECTURES["llama"].config(), seq_len=SEQ_LEN).attention_mask
    assert isinstance(mask, PlanMask)
    assert mask.to("cpu", non_blocking=True) is mask
    assert str(SEQ_LEN) in f"{mask} {mask!r}"


# -- batches


def test_labels_in_padding_are_cleared_by_the_trainer_as_by_shard_batch():
    """Also real labels that lie there: neither are they predicted, nor by padding."""
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    labels = torch.arange(1, 11).view(2, 5)
    expected = torch.tensor([[-100, -100, 4, 5, -100], [7, 8, -100, -100, -100]])
    plan = plan_for(ARCHITECTURES["llama"].config(), attention_mask=mask)
    batch = {"input_ids": labels, "labels": labels, "attention_mask": mask}
    assert torch.equal(plan.plan.shard(expected, 1, pad_value=-100), shard_batch(batch, plan)["labels"])
    assert torch.equal(shifted(labels, None, mask), expected)
    packed = torch.tensor([[0, 1, 2, 0, 1]])
    assert shifted(labels, packed, None).tolist() == [[2, 3, -100, 5, -100], [7, 8, -100, 10, -100]]


def test_masks_of_a_release_that_needs_something_unknown_are_refused(monkeypatch: pytest.MonkeyPatch):
    def newer(config, inputs_embeds, attention_mask, sink_table, position_ids=None):
        raise AssertionError("not called")

    monkeypatch.setitem(masks.MAKERS, "full_attention", newer)
    with pytest.raises(NotImplementedError, match=r"newer of transformers .* needs \['sink_table'\]"):
        plan_for(ARCHITECTURES["llama"].config(), seq_len=64)


def test_a_batch_is_shifted_before_it_is_sharded():
    config = ARCHITECTURES["llama"].config()
    ids = torch.arange(3, 3 + SEQ_LEN)[None]
    parts = []
    for rank in range(3):
        plan = plan_for(config, rank=rank, world_size=3, layout=cpflex.striped, **TOKENS["packed"].planned)
        part = shard_batch({"input_ids": ids, "labels": ids}, plan)
        real = plan.plan.positions < SEQ_LEN
        parts.append(part)
        wanted = torch.where(part["shift_labels"] == -100, -100, part["input_ids"] + 1)
        assert torch.equal(part["shift_labels"][:, real], wanted[:, real]), "each token's label is the next token"
        assert (part["shift_labels"][:, ~real] == -100).all()
        assert part["num_items_in_batch"] == SEQ_LEN - len(TOKENS["packed"].planned["lengths"])
        assert torch.equal(part["position_ids"][:, real], plan.position_ids[:, plan.plan.positions[real]])
        assert part["use_cache"] is False
    assert sum(int((part["shift_labels"] != -100).sum()) for part in parts) == parts[0]["num_items_in_batch"]


def shard_another_batch(group: Any, name: str) -> None:
    """As a sampler does that knows nothing of sequences on several ranks."""
    plan = plan_for(ARCHITECTURES["llama"].config(), group, seq_len=SEQ_LEN)
    batch = {"input_ids": torch.arange(SEQ_LEN)[None], "labels": torch.arange(SEQ_LEN)[None]}
    shard_batch(batch, plan)
    if group.rank() == 1:
        if name == "a mistake":
            batch["pixels"] = torch.zeros(1)
        else:
            batch[name] = batch[name] + 1
    shard_batch(batch, plan)


@pytest.mark.parametrize("name", ["input_ids", "labels"])
def test_ranks_of_a_sequence_that_hold_other_samples_are_found_out(name: str, two_processes: RankProcesses):
    for outcome in two_processes.outcomes(shard_another_batch, name):
        assert isinstance(outcome.error, cpflex.RankMismatch), outcome.traceback
        assert f"the ranks disagree about {name}" in str(outcome.error)


def test_what_shard_batch_refuses_on_one_rank_is_raised_on_all(two_processes: RankProcesses):
    waiting, refused = two_processes.outcomes(shard_another_batch, "a mistake")
    assert isinstance(refused.error, ValueError), refused.traceback
    assert isinstance(waiting.error, cpflex.RankMismatch), waiting.traceback
    assert "group rank 1 raised ValueError: shard_batch knows" in str(waiting.error)


def test_what_a_batch_already_knows_is_used():
    plan = plan_for(ARCHITECTURES["llama"].config(), **TOKENS["packed"].planned)
    ids = torch.full((1, SEQ_LEN), 7)
    labels = torch.full((1, SEQ_LEN), 9)
    part = shard_batch({"input_ids": ids, "shift_labels": labels, "num_items_in_batch": 1000}, plan)
    assert torch.equal(part["labels"][:, :SEQ_LEN], labels)
    assert part["num_items_in_batch"] == 1000
    assert "labels" not in shard_batch({"input_ids": ids}, plan)


# -- the attention function


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_autocast_is_as_exact_as_with_attention_of_one_process(name: str):
    """It leaves queries and keys in fp32, after RoPE, beside values in bf16."""
    case = Case(name, "one document")
    batch = TOKENS[case.tokens].batch()
    del batch["labels"]
    plan = plan_for(ARCHITECTURES[name].config(), seq_len=SEQ_LEN)
    with torch.no_grad():
        truth = case.model("eager")(**batch, use_cache=False).logits
        with torch.autocast("cpu", torch.bfloat16):
            rounded = case.model("eager")(**batch, use_cache=False).logits
            ours = plan.plan.unshard(case.model("cpflex")(**shard_batch(batch, plan)).logits, dim=1)
    errors = [((x.float() - truth).norm(dim=-1) / truth.norm(dim=-1)).median() for x in (ours, rounded)]
    assert 0 < errors[0] <= 1.5 * errors[1]


def test_masks_are_never_made_from_local_tokens():
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    with pytest.raises(ValueError, match="from the tokens of one rank"):
        ALL_MASK_ATTENTION_FUNCTIONS["cpflex"](batch_size=1, q_length=8, kv_length=8)


def test_attention_gives_what_models_expect():
    plan = plan_for(ARCHITECTURES["llama"].config(), seq_len=SEQ_LEN)
    out = attend(plan, softcap=None, s_aux=torch.zeros(4), output_attentions=False, position_ids=torch.zeros(1))
    assert out.shape == (2, plan.plan.local_len, 4, 8)
    assert out.is_contiguous()


# -- RoPE that looks at the longest position


def rope_case(name: str, rope: dict[str, Any], tokens: str, layout: str = "zigzag", **changes: Any) -> Case:
    """With the given RoPE, under the name that this version of transformers has for it."""
    if hasattr(ARCHITECTURES[name].config(), "rope_parameters"):
        changes["rope_parameters"] = {"rope_theta": 10000.0, "rope_type": rope["type"]} | rope
        if "original_max_position_embeddings" in changes:
            original = changes["original_max_position_embeddings"]
            changes["rope_parameters"]["original_max_position_embeddings"] = original
    else:
        changes["rope_scaling"] = rope
    return Case(name, tokens, 2, layout, tuple(changes.items()))


def dynamic(tokens: str) -> Case:
    return rope_case("llama", {"type": "dynamic", "factor": 4.0}, tokens, max_position_embeddings=64)


def longrope(original: int, tokens: str, layout: str) -> Case:
    factors = {"short_factor": [1.0, 1.2, 1.4, 1.6], "long_factor": [1.0, 2.0, 4.0, 8.0]}
    return rope_case("phi3", {"type": "longrope"} | factors, tokens, layout, original_max_position_embeddings=original)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(longrope(45, "packed", "zigzag"), id="longrope, documents are short"),
        pytest.param(longrope(20, "one document", "zigzag"), id="longrope, every rank sees a long one"),
        pytest.param(dynamic("packed"), id="dynamic, documents are short"),
    ],
)
def test_rope_of_the_longest_position_where_ranks_agree(case: Case, two_processes: RankProcesses):
    assert_equal_to_one_process(two_processes.run(on_rank, case), one_process(case))


@pytest.mark.parametrize(
    ("case", "rope"),
    [
        (longrope(60, "one document", "contiguous"), "longrope"),
        (dynamic("one document"), "dynamic"),
    ],
)
def test_rope_of_the_longest_position_is_refused_where_ranks_would_differ(case: Case, rope: str):
    config = ARCHITECTURES[case.architecture].config(**dict(case.changes))
    plan = case.plan(config, rank=0, world_size=2)
    with pytest.raises(NotImplementedError, match=f"{rope} RoPE .* 83 tokens"):
        shard_batch(TOKENS[case.tokens].batch(), plan)
    one = case.plan(config)
    assert shard_batch(TOKENS[case.tokens].batch(), one), "one rank sees all positions"


# -- refusals


@pytest.mark.parametrize("what", REFUSALS)
def test_what_cannot_be_honoured_is_refused_by_name(what: str):
    act, error, message = REFUSALS[what]
    with pytest.raises(error, match=message):
        act()


def dropout_on_one_rank(group: Any) -> None:
    model = ARCHITECTURES["llama"].model("cpflex", attention_dropout=0.1 * (group.rank() == 1))
    plan = plan_for(model.config, group, seq_len=SEQ_LEN)
    model(**shard_batch(TOKENS["one document"].batch(), plan))


def test_a_refusal_on_one_rank_reaches_the_other(two_processes: RankProcesses):
    first, second = two_processes.outcomes(dropout_on_one_rank)
    assert isinstance(first.error, cpflex.RankMismatch)
    assert "dropout" in str(first.error)
    assert isinstance(second.error, NotImplementedError)


def test_the_table_in_the_docs_is_that_of_the_tests():
    assert DOCUMENT.read_text() == support_matrix(), "run `python tests/integrations/support_matrix.py --write`"
