"""Every family that is called verified, a few of them each day; what the class of a model rules out; ALiBi."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import itertools

import transformers
from families import KINDS, VERIFIED_FILE, attach, compare, on_rank, one_process, recorded, verified_source
from family_configs import config_of, model_of, model_types
from hf_models import ARCHITECTURES
from hf_runs import ROWS, SEQ_LEN, TOKENS, assert_equal_to_one_process, gradients
from torch import Tensor

from cpflex.integrations.transformers import classes, plan_for, replace_attention, shard_batch
from cpflex.integrations.transformers.alibi import REPLACED, slopes
from cpflex.integrations.transformers.classes import DIFFERENT, VERIFIED
from processes import RankProcesses

pytestmark = pytest.mark.hf
INSTALLED = transformers.__version__
TABLE = classes.table_of(INSTALLED)


def small(model_type: str) -> Any:
    """The config of a family, where the installed transformers has it as the table's has."""
    if model_type not in model_types():
        pytest.skip(f"transformers {INSTALLED} has no {model_type}")
    try:
        return config_of(model_type)
    except Exception as error:
        if INSTALLED == TABLE:
            raise
        pytest.skip(f"the recipe is for transformers {TABLE}; with {INSTALLED}: {type(error).__name__}")


def check(model_type: str, processes: RankProcesses) -> None:
    small(model_type)
    for kind in KINDS:
        truths = [one_process(model_type, kind, in_double) for in_double in (False, True)]
        assert not compare(processes.run(on_rank, model_type, kind), *truths).beyond, kind


@pytest.mark.by_day(45)
@pytest.mark.parametrize("model_type", sorted(VERIFIED))
def test_two_ranks_compute_what_one_process_computes(model_type: str, two_processes: RankProcesses):
    check(model_type, two_processes)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(VERIFIED))
def test_four_ranks_compute_what_one_process_computes(model_type: str, four_processes: RankProcesses):
    check(model_type, four_processes)


@pytest.mark.by_day(45)
@pytest.mark.parametrize("model_type", sorted(VERIFIED))
def test_padding_is_that_of_one_process(model_type: str):
    """On one rank: what the class makes of the mask, and of positions that nobody gave."""
    small(model_type)
    eager, ours = (model_of(model_type, attention) for attention in ("eager", "cpflex"))
    attach(ours)
    for side in ("padded left", "padded right"):
        mask, batch = TOKENS[side].planned["attention_mask"], TOKENS[side].batch()
        if side == "padded left" and model_type in classes.COUNTS_TOKENS:
            with pytest.raises(NotImplementedError, match=f"{model_type} with padding on the left .* pad on the right"):
                plan_for(ours.config, attention_mask=mask)
            continue
        first = mask.diff(dim=1, prepend=torch.zeros(len(mask), 1)) == 1  # is predicted by padding, if by anything
        with torch.no_grad():
            labels = batch["labels"].masked_fill(first, -100)
            truth = eager(**batch | {"labels": labels}, attention_mask=mask, use_cache=False).loss
            loss = ours(**shard_batch(batch, plan_for(ours.config, attention_mask=mask), ours)).loss
        torch.testing.assert_close(loss, truth, rtol=1e-5, atol=0, msg=side)


def test_the_comparison_sees_a_gradient_that_is_off():
    """By 1e-4; and it lets pass one that is no worse than eager attention."""
    exact = 2.0, {"a.0.weight": torch.ones(9).double(), "a.0.bias": torch.full((9,), 1e-17).double()}
    eager = 2.0, {"a.0.weight": torch.ones(9) + 1e-6, "a.0.bias": torch.full((9,), 1e-7)}

    def ranks(weight: float, bias: float) -> list:
        half = {"a.0.weight": torch.full((9,), weight / 2), "a.0.bias": torch.full((9,), bias / 2)}
        return [(1.0, half), (1.0, half)]

    assert not compare(ranks(1 + 2e-6, 2e-7), eager, exact).beyond
    assert compare(ranks(1 + 2e-6, 2e-7), eager, exact).derived == {"a.0.bias": (math.inf, math.inf)}
    assert set(compare(ranks(1 + 1e-4, 2e-7), eager, exact).beyond) == {"a.0.weight"}
    assert set(compare(ranks(1.0, 1e-3), eager, exact).beyond) == {"a.0.bias"}
    assert set(compare(ranks(float("nan"), 0.0), eager, exact).beyond) == {"a.0.weight"}


def test_what_is_called_verified_is_what_the_table_found():
    assert VERIFIED_FILE.read_text() == verified_source(recorded()), (
        "run `python tests/integrations/families.py --write`"
    )
    assert set(ARCHITECTURES) <= VERIFIED
    assert not VERIFIED & set(DIFFERENT)
    assert len(VERIFIED) >= (70 if TABLE > "5" else 40)


def test_a_release_without_a_table_has_that_of_an_older_one():
    known = list(recorded())
    assert [classes.table_of(release) for release in known] == known
    assert classes.table_of("99.0.0.dev0") == known[-1]
    assert classes.table_of("5.23.10") == known[0] == classes.table_of("4.0.0")


def test_the_table_is_of_every_family_of_its_release():
    if INSTALLED != TABLE:
        pytest.skip(f"the table is of transformers {TABLE}; this is {INSTALLED}")
    assert set(recorded()[TABLE]["families"]) == set(model_types())


# -- what the class of a model says


@pytest.mark.parametrize(
    "model_type", ["albert", "bert", "deberta-v2", "distilbert", "electra", "modernbert", "roberta"]
)
def test_encoders_are_refused_by_name(model_type: str):
    config = transformers.AutoConfig.for_model(model_type)
    with pytest.raises(NotImplementedError, match=f"^{model_type}: .*encoder.*bidirectional"):
        plan_for(config, seq_len=SEQ_LEN, verified_only=False)


def test_every_type_with_a_masked_language_model_is_a_decoder_or_refused():
    """Of the installed release; some of the composite ones need packages of their own."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    for model_type in sorted(set(MODEL_FOR_MASKED_LM_MAPPING_NAMES) - set(model_types())):
        config = transformers.AutoConfig.for_model(model_type)
        assert classes.ruled_out(config) is not None, model_type


@pytest.mark.parametrize("model_type", ["bart", "marian", "mt5", "t5", "whisper"])
def test_encoders_with_a_decoder_are_refused_by_name(model_type: str):
    config = transformers.AutoConfig.for_model(model_type)
    with pytest.raises(NotImplementedError, match="an encoder and a decoder"):
        plan_for(config, seq_len=SEQ_LEN, verified_only=False)


def test_what_the_table_found_to_differ_is_refused_even_if_asked_for():
    for model_type in sorted(set(DIFFERENT) & set(model_types())):
        with pytest.raises(NotImplementedError, match="not supported with context parallelism"):
            plan_for(small(model_type), seq_len=SEQ_LEN, verified_only=False)


@pytest.mark.parametrize("coefficient", ["z_loss_coefficient", "router_z_loss_coef"])
def test_losses_of_more_than_labels_are_refused_by_name(coefficient: str):
    config = ARCHITECTURES["llama"].config()
    plan_for(config, seq_len=SEQ_LEN)
    setattr(config, coefficient, 0.1)
    with pytest.raises(NotImplementedError, match=rf"{coefficient}=0\.1\): set it to 0"):
        plan_for(config, seq_len=SEQ_LEN)


def test_a_config_class_that_transformers_does_not_know_is_ones_own_account():
    class Own(transformers.LlamaConfig):
        model_type = "own"

    config = Own(num_hidden_layers=2)
    with pytest.raises(NotImplementedError, match="verified_only=False"):
        plan_for(config, seq_len=SEQ_LEN)
    assert plan_for(config, seq_len=SEQ_LEN, verified_only=False)


# -- ALiBi

HAS_ALIBI = tuple(int(x) for x in INSTALLED.split(".")[:2]) >= (5, 24)
only_where_masks_can_be_given = pytest.mark.skipif(not HAS_ALIBI, reason="older classes make their masks themselves")
BIASED = {
    "bloom": ("bloom", {}),
    "mpt": ("mpt", {}),
    "falcon with RoPE": ("falcon", {}),
    "falcon": ("falcon", {"alibi": True}),
    "falcon, a head of keys for each of queries": ("falcon", {"alibi": True, "multi_query": False, "num_kv_heads": 4}),
    "falcon, new": ("falcon", {"alibi": True, "new_decoder_architecture": True}),
}


def replaced_on_rank(group: Any, which: str, tokens: str) -> tuple[float, dict[str, Tensor]]:
    model_type, changes = BIASED[which]
    model = model_of(model_type, "cpflex", **changes)
    plan = plan_for(model.config, group, **TOKENS[tokens].planned)
    loss = model(**shard_batch(TOKENS[tokens].batch(), plan)).loss
    loss.backward()
    return float(loss.detach()), gradients(model)


def by_itself(which: str, tokens: str) -> tuple[float, dict[str, Tensor]]:
    """Each document, or row without its padding, in one process. Falcon's eager attention adds ALiBi twice; that of
    sdpa, which is the usual one, once.
    """
    model_type, changes = BIASED[which]
    model = model_of(model_type, "sdpa" if changes.get("alibi") else "eager", **changes)
    documents = []
    for row, ids, spans in zip(range(9), TOKENS[tokens].batch()["input_ids"], _spans(tokens), strict=False):
        documents += [(row, ids[begin:end][None]) for begin, end in spans if end - begin > 1]
    num_labels = sum(ids.shape[1] - 1 for _, ids in documents)
    total = 0.0
    for _, ids in documents:
        share = model(input_ids=ids, labels=ids, use_cache=False).loss * (ids.shape[1] - 1) / num_labels
        share.backward()
        total += float(share.detach())
    return total, gradients(model)


def _spans(tokens: str) -> list[list[tuple[int, int]]]:
    """Of each row, where its documents begin and end."""
    if "padded" in tokens:
        mask = TOKENS[tokens].planned["attention_mask"]
        return [[(int(row.nonzero()[0]), int(row.nonzero()[-1]) + 1)] for row in mask]
    if tokens == "rows packed differently":
        starts = [[*(row == 0).nonzero()[:, 0].tolist(), SEQ_LEN] for row in ROWS]
    else:
        starts = [[0, *torch.tensor(TOKENS[tokens].planned["lengths"]).cumsum(0).tolist()]]
    return [list(itertools.pairwise(row)) for row in starts]


@only_where_masks_can_be_given
@pytest.mark.by_day(6)
@pytest.mark.parametrize("tokens", ["packed", "rows packed differently", "padded left"])
@pytest.mark.parametrize("which", BIASED)
def test_slopes_of_alibi_are_a_score_mod(which: str, tokens: str, two_processes: RankProcesses):
    assert_equal_to_one_process(two_processes.run(replaced_on_rank, which, tokens), by_itself(which, tokens))


@pytest.mark.parametrize(
    ("num_heads", "expected"),
    [
        (4, [2**-2, 2**-4, 2**-6, 2**-8]),
        (8, [2**-i for i in range(1, 9)]),
        (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),
    ],
)
def test_slopes_are_those_of_the_paper(num_heads: int, expected: list[float]):
    assert slopes(num_heads) == tuple(expected)


@pytest.mark.parametrize("num_heads", [1, 2, 3, 7, 12, 16, 20, 71])
def test_slopes_are_those_of_the_models(num_heads: int):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    ours = torch.tensor(slopes(num_heads))
    theirs = build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), num_heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    bias = build_mpt_alibi_tensor(num_heads, 2)
    torch.testing.assert_close(ours, bias[:, 0, 1] - bias[:, 0, 0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("model_type", sorted(REPLACED))
@pytest.mark.parametrize("implementation", ["eager", "cpflex"])
def test_models_with_attention_of_their_own_say_what_to_do(model_type: str, implementation: str):
    config = small(model_type)
    config._attn_implementation = implementation
    with pytest.raises(
        NotImplementedError, match=r"model = cpflex\.integrations\.transformers\.replace_attention\(model\)"
    ):
        plan_for(config, seq_len=SEQ_LEN, verified_only=False)


@only_where_masks_can_be_given
def test_a_prepared_model_pickles_and_is_copied():
    model = model_of("bloom", "cpflex")
    batch = {"input_ids": TOKENS["one document"].batch()["input_ids"]}
    expected = model(**shard_batch(batch, plan_for(model.config, seq_len=SEQ_LEN))).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        plan = pickle.loads(pickle.dumps(plan_for(other.config, seq_len=SEQ_LEN)))
        assert torch.equal(other(**shard_batch(batch, plan)).logits, expected)
        other.transformer.h[0].self_attention.dense.weight.data.zero_()
        assert not torch.equal(other(**shard_batch(batch, plan)).logits, expected)


def test_only_models_with_attention_of_their_own_are_prepared():
    with pytest.raises(NotImplementedError, match="got 'llama': pass attn_implementation=\"cpflex\""):
        replace_attention(ARCHITECTURES["llama"].model("eager"))
