"""Keywords of flash attention that collators add tell of the plan's documents, or are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from hf_models import ARCHITECTURES
from hf_runs import LENGTHS, SEQ_LEN, TOKENS, Case, assert_equal_to_one_process, gradients, one_process
from transformers import DataCollatorWithFlattening

from cpflex.integrations.transformers import plan_for, shard_batch
from cpflex.integrations.transformers.flash import without_flash_keywords
from cpflex.testing import run_ranks

pytestmark = pytest.mark.hf

CASE = Case("llama", "packed")


def collated(**options: Any) -> dict[str, Any]:
    """The packed batch of `hf_runs`, as transformers flattens it."""
    tokens = TOKENS["packed"].batch()["input_ids"][0]
    rows = [{"input_ids": one.tolist()} for one in tokens.split(LENGTHS)]
    return DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True, **options)(rows)


def on_rank(group: Any, return_position_ids: bool) -> tuple[float, dict[str, torch.Tensor]]:
    model = CASE.model("cpflex")
    batch = collated(return_position_ids=return_position_ids)
    told = without_flash_keywords(batch)
    loss = model(**shard_batch(batch, plan_for(model.config, group, position_ids=told["position_ids"]))).loss
    loss.backward()
    return float(loss.detach()), gradients(model)


@pytest.mark.parametrize("return_position_ids", [True, False])
def test_a_flattened_batch_is_that_of_one_process(return_position_ids: bool):
    assert "cu_seq_lens_q" in collated()
    assert_equal_to_one_process(run_ranks(lambda group: on_rank(group, return_position_ids), 2), one_process(CASE))


def test_documents_are_told_by_any_of_them():
    expected = collated()["position_ids"]
    batch = {name: x for name, x in collated().items() if name != "position_ids"}
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"):
        found = without_flash_keywords({"input_ids": batch["input_ids"], name: batch[name]})
        assert torch.equal(found["position_ids"], expected)
        assert set(found) == {"input_ids", "position_ids"}


def test_a_batch_without_them_stays_as_it_is():
    batch = TOKENS["packed"].batch()
    assert without_flash_keywords(batch) == batch


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"cu_seq_lens_k": torch.tensor([0, 31, 32, SEQ_LEN])},
            "cu_seq_lens_q and cu_seq_lens_k must tell of the same",
        ),
        ({"seq_idx": torch.zeros(1, SEQ_LEN, dtype=torch.int32)}, "cu_seq_lens_q and seq_idx must tell of the same"),
        ({"seq_idx": torch.zeros(1, 5, dtype=torch.int32)}, r"seq_idx must be \[1, 83\]"),
        ({"position_ids": torch.arange(SEQ_LEN)[None]}, "cu_seq_lens_q and position_ids must tell of the same"),
        ({"cu_seq_lens_q": torch.tensor([0, 31, 32])}, "from 0 to the 83"),
        ({"max_length_q": 39}, "max_length_q must be the longest document, 40; got 39"),
        ({"input_ids": torch.zeros(2, SEQ_LEN, dtype=torch.int64)}, "one row of packed documents; got 2"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_keywords_that_contradict_each_other_are_refused(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        without_flash_keywords(collated() | change)


def test_keywords_of_other_documents_than_the_plans_are_refused():
    config = ARCHITECTURES["llama"].config()
    with pytest.raises(ValueError, match="pack other documents than the plan"):
        shard_batch(collated(), plan_for(config, seq_len=SEQ_LEN))
