"""Models of text and images, unmodified: N ranks compute what one process computes, vision tower and projector too."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from accelerate import PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType
from hf_runs import averaged, gradients
from mm_models import BEGIN, IMAGE, MULTIMODAL, SEQ_LEN, VIDEO, takes_what_was_encoded
from torch import Tensor
from trainer_runs import arguments, launched, logged
from transformers import Trainer as StockTrainer

from cases import LAYOUTS
from cpflex import RankMismatch
from cpflex.integrations.trainer import Trainer
from cpflex.integrations.transformers import multimodal, plan_for, shard_batch
from processes import RankProcesses

pytestmark = [
    pytest.mark.hf,
    pytest.mark.skipif(not takes_what_was_encoded(), reason="models of this transformers take no mm_encoder_outputs"),
]

ONLY_TEXT = {"text_config": "cpflex", "vision_config": "eager"}
"""The attention: cpflex for the text, that of one process for the images."""


def one_process(
    name: str, batch: dict[str, Tensor], dtype: torch.dtype = torch.float32, **described: Any
) -> tuple[float, dict[str, Tensor]]:
    model: Any = MULTIMODAL[name].model("eager").to(dtype)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # the others multiply no such numbers
    batch = {key: x.to(dtype) if x.is_floating_point() else x for key, x in batch.items()}
    loss = model(**batch | described, use_cache=False).loss
    loss.backward()
    return float(loss.detach()), gradients(model)


ROUNDED = ("gemma4", "gemma4, keys shared", "qwen3_5", "qwen3_5_moe")
"""Models whose gradients in fp32 are off by more than 1e-5 in one process."""


def bar_of(name: str, batch: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Twice what rounding does to the gradients of one process, where that is more."""
    if name not in ROUNDED:
        return 1e-5
    _, exact = one_process(name, batch, torch.float64)
    return max(1e-5, 2 * max(errors([truth], exact).values()))


def errors(shares: list[dict[str, Tensor]], truth: dict[str, Tensor]) -> dict[str, float]:
    """Of each gradient, relative to its norm, or to a thousandth of the largest: that of a key's bias is zero but for
    rounding.
    """
    floor = float(1e-3 * max(wanted.norm() for wanted in truth.values()))
    found = {}
    for name, wanted in truth.items():
        summed = torch.stack([grads.get(name, torch.zeros_like(wanted)) for grads in shares]).sum(dim=0)
        found[name] = float((summed - wanted).norm() / wanted.norm().clamp(min=floor))
    return found


def on_rank(
    group: Any, name: str, batch: dict[str, Tensor], layout: str, planned: dict[str, Any]
) -> tuple[float, dict[str, Tensor]]:
    model = MULTIMODAL[name].model(ONLY_TEXT)
    plan = plan_for(model.config, group, **planned, layout=LAYOUTS[layout])
    loss = model(**shard_batch(batch, plan, model)).loss
    loss.backward()
    return float(loss.detach()), gradients(model)


def planned(batch: dict[str, Tensor], **described: Any) -> dict[str, Any]:
    token_types = batch.get("token_type_ids", batch.get("mm_token_type_ids"))
    return {"token_type_ids": token_types} | (described or {"seq_len": SEQ_LEN})


def assert_equal(
    shares: list[tuple[float, dict[str, Tensor]]], truth: tuple[float, dict[str, Tensor]], bar: float = 1e-5
) -> None:
    expected_loss, expected = truth
    assert abs(sum(loss for loss, _ in shares) - expected_loss) <= 1e-5 * abs(expected_loss)
    found = errors([grads for _, grads in shares], expected)
    assert max(found.values()) <= bar, max(found.items(), key=lambda item: item[1])
    assert {name for _, grads in shares for name in grads} == set(expected)


@pytest.mark.by_day(8)
@pytest.mark.parametrize("name", MULTIMODAL)
def test_text_alone_works_by_itself(name: str, two_processes: RankProcesses):
    batch = MULTIMODAL[name].batch(with_images=False)
    shares, truth = two_processes.run(on_rank, name, batch, "balanced", planned(batch)), one_process(name, batch)
    assert_equal(shares, truth, bar_of(name, batch, truth[1]))


@pytest.mark.by_day(16)
@pytest.mark.parametrize("layout", ["balanced", "zigzag", "contiguous", "striped"])
@pytest.mark.parametrize("name", MULTIMODAL)
def test_images_are_those_of_one_process(name: str, layout: str, two_processes: RankProcesses):
    batch = MULTIMODAL[name].batch()
    shares = two_processes.run(on_rank, name, batch, layout, planned(batch))
    truth = one_process(name, batch)
    assert_equal(shares, truth, bar_of(name, batch, truth[1]))
    assert sum("vision" in n or "visual" in n for n in truth[1]) > 9, "gradients reach the vision tower"


# -- where documents and images are


def padded(left: tuple[int, int]) -> Tensor:
    return (torch.arange(SEQ_LEN) >= torch.tensor(left)[:, None]).long()


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl"])
def test_images_beside_padding(name: str, two_processes: RankProcesses):
    batch = MULTIMODAL[name].batch()
    mask = padded((3, 1))
    hidden = mask.diff(dim=1, prepend=torch.zeros(2, 1)) == 1  # the first token is predicted by no other
    batch["labels"] = batch["labels"].masked_fill(mask == 0, -100)
    truth = one_process(name, batch | {"labels": batch["labels"].masked_fill(hidden, -100)}, attention_mask=mask)
    shares = two_processes.run(on_rank, name, batch, "zigzag", planned(batch, attention_mask=mask))
    assert_equal(shares, truth)


LENGTHS = (30, 14, 39)


def packed_positions(name: str, batch: dict[str, Tensor]) -> Tensor:
    """[4, B, S]: the text's in each document, then what the model makes of each by itself."""
    model = MULTIMODAL[name].model("eager").model
    grids = list(batch["image_grid_thw"])
    rows = []
    for row in batch["input_ids"]:
        parts = []
        for ids in row.split(LENGTHS):
            types = (ids == IMAGE)[None].long()
            count = int((types.diff(prepend=torch.zeros(1, 1), dim=1) == 1).sum())
            own = torch.stack([grids.pop(0) for _ in range(count)]) if count else None
            positions, _ = model.get_rope_index(ids[None], mm_token_type_ids=types, image_grid_thw=own)
            parts.append(torch.cat([torch.arange(len(ids))[None, None], positions]))
        rows.append(torch.cat(parts, dim=-1))
    return torch.cat(rows, dim=1)


@pytest.mark.parametrize("given", ["by the user", "by the model"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_packed_documents_with_images_have_positions_of_their_own(name: str, given: str, two_processes: RankProcesses):
    """An image in the first document of a row and in its last, and one in the last of the other row."""
    batch = MULTIMODAL[name].batch()
    ids = batch["input_ids"]
    ids[0, 36:45], ids[1, 34:50] = 5, 5
    ids[0, 50:58], ids[1, 46:61] = IMAGE, IMAGE
    batch["labels"] = ids.masked_fill(ids == IMAGE, -100)
    batch["mm_token_type_ids"] = (ids == IMAGE).long()
    positions = packed_positions(name, batch)
    starts = torch.tensor([0, *LENGTHS[:-1]]).cumsum(0)
    labels = batch["labels"].index_fill(1, starts, -100)
    truth = one_process(name, batch | {"labels": labels}, position_ids=positions)
    if given == "by the user":
        batch["position_ids"] = positions
        described = {"position_ids": positions}
    else:
        described = {"lengths": LENGTHS}
    assert_equal(two_processes.run(on_rank, name, batch, "balanced", described), truth)


def test_videos_are_encoded_as_images_are(two_processes: RankProcesses):
    """Beside an image."""
    batch = MULTIMODAL["qwen2_5_vl"].batch()
    ids = batch["input_ids"]
    ids[1, 9], ids[1, 10:22] = BEGIN, VIDEO
    batch["labels"] = batch["labels"].masked_fill(ids == VIDEO, -100)
    batch["video_grid_thw"] = torch.tensor([[2, 4, 6]])
    batch["pixel_values_videos"] = torch.randn(2 * 4 * 6, 24, generator=torch.Generator().manual_seed(3))
    batch["second_per_grid_ts"] = torch.tensor([1.0])
    batch["mm_token_type_ids"] = batch["mm_token_type_ids"] + 2 * (ids == VIDEO)
    truth = one_process("qwen2_5_vl", batch)
    assert_equal(two_processes.run(on_rank, "qwen2_5_vl", batch, "striped", planned(batch)), truth)


# -- what averages gradients


def wrapped_on_rank(group: Any, name: str, batch: dict[str, Tensor], wrap: str) -> tuple[float, dict[str, Tensor]]:
    model = MULTIMODAL[name].model(ONLY_TEXT)
    plan = plan_for(model.config, group, **planned(batch))
    options = {"find_unused_parameters": True}  # towers have parameters that nobody uses
    return averaged(group, wrap, model, model.model.language_model.layers, batch, plan, **options)


@pytest.mark.parametrize("wrap", ["DDP", "FSDP"])
@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl"])
def test_averaged_gradients_of_the_multiplied_loss_are_those_of_one_process(
    name: str, wrap: str, two_processes: RankProcesses
):
    batch = MULTIMODAL[name].batch()
    truth = one_process(name, batch)
    for result in two_processes.run(wrapped_on_rank, name, batch, wrap):
        assert_equal([result], truth)


# -- the Trainer


def samples() -> list[dict[str, Tensor]]:
    """One row each, with two or three images."""
    batch = MULTIMODAL["gemma3"].batch()
    rows = {name: batch[name].split(1) for name in ("input_ids", "labels", "token_type_ids")}
    return [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]


def with_images(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A row of two samples has three images, the other two."""
    batch = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    count = int(batch["token_type_ids"].sum()) // 16
    return batch | {"pixel_values": MULTIMODAL["gemma3"].batch()["pixel_values"][:count]}


def trained_on_rank(group: Any, folder: str) -> list[tuple[float, float]]:
    wrap = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["Gemma3DecoderLayer"]}
    with launched(group):
        sizes = ParallelismConfig(cp_size=group.size())
        options = arguments(folder, 1, parallelism_config=sizes, fsdp=True, fsdp_config={"version": 2, **wrap})
        assert options.device.type == "cpu"  # makes the state
        PartialState().distributed_type = DistributedType.MULTI_GPU
        model = MULTIMODAL["gemma3"].model(ONLY_TEXT)
        return logged(Trainer(model=model, args=options, train_dataset=samples(), data_collator=with_images))


def test_the_trainer_encodes_images(two_processes: RankProcesses, tmp_path: Any):
    with launched(None):
        options, model = arguments(str(tmp_path), batch_size=1), MULTIMODAL["gemma3"].model("eager")
        model.config.use_cache = False
        stock = StockTrainer(model=model, args=options, train_dataset=samples(), data_collator=with_images)
        expected = logged(stock)
    for steps in two_processes.run(trained_on_rank, str(tmp_path)):
        for ours, theirs in zip(steps, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)


# -- what is said


def test_what_is_called_verified_is_what_is_tested():
    assert {model.config().model_type for model in MULTIMODAL.values()} == multimodal.VERIFIED
    text = {model.config().get_text_config().model_type for model in MULTIMODAL.values()}
    assert text >= multimodal.VERIFIED_TEXT


def test_images_beside_documents_seen_in_both_directions_are_refused():
    """transformers looks images up by the position in the document."""
    model = MULTIMODAL["gemma3"]
    types = model.batch()["token_type_ids"]
    with pytest.raises(NotImplementedError, match="plan one document a row"):
        plan_for(model.config(), lengths=LENGTHS, token_type_ids=types)
    with pytest.raises(NotImplementedError, match="or_mask_function"):
        plan_for(
            model.config(),
            seq_len=SEQ_LEN,
            token_type_ids=types,
            batch_size=2,
            or_mask_function=lambda b, h, q_idx, kv_idx: q_idx == kv_idx,
        )
    assert plan_for(model.config(), lengths=LENGTHS, token_type_ids=torch.zeros_like(types)), "of text alone"


@pytest.mark.parametrize(
    ("types", "message"),
    [(torch.zeros(2, SEQ_LEN + 1), r"must be \[B, 83\]"), (torch.zeros(SEQ_LEN), r"must be \[B, 83\]")],
)
def test_token_types_of_another_length_are_refused(types: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        plan_for(MULTIMODAL["gemma3"].config(), seq_len=SEQ_LEN, token_type_ids=types)


def test_a_plan_without_the_images_of_the_batch_is_refused():
    """Its masks would hide the rest of each image."""
    model, batch = MULTIMODAL["gemma3"].model(ONLY_TEXT), MULTIMODAL["gemma3"].batch()
    with pytest.raises(ValueError, match=r"plan_for\(token_type_ids=batch\['token_type_ids'\]\)"):
        shard_batch(batch, plan_for(model.config, seq_len=SEQ_LEN), model)


def test_as_many_image_tokens_as_features():
    model, batch = MULTIMODAL["llava"].model(ONLY_TEXT), MULTIMODAL["llava"].batch()
    plan = plan_for(model.config, seq_len=SEQ_LEN)
    with pytest.raises(ValueError, match="got 48 image tokens and 32 features"):
        shard_batch(batch | {"pixel_values": batch["pixel_values"][:2]}, plan, model)
    with pytest.raises(ValueError, match="need input_ids"):
        embeds = torch.zeros(2, SEQ_LEN, 32)
        shard_batch({"inputs_embeds": embeds, "pixel_values": batch["pixel_values"]}, plan, model)
    with pytest.raises(ValueError, match=r"got \['input_features'\]"):
        shard_batch(batch | {"input_features": torch.zeros(1)}, plan, model)


def test_positions_of_three_rows_do_not_tell_documents():
    config = MULTIMODAL["qwen2_5_vl"].config()
    positions = torch.arange(SEQ_LEN).expand(4, 1, -1)
    assert plan_for(config, position_ids=positions).position_ids.shape == (1, SEQ_LEN)
    with pytest.raises(ValueError, match="do not tell documents apart"):
        plan_for(config, position_ids=positions[:3])
    packed = plan_for(config, lengths=LENGTHS)
    with pytest.raises(ValueError, match="pack other documents"):
        shard_batch({"input_ids": positions[0], "position_ids": positions}, packed)


def test_videos_in_packed_documents_need_positions():
    model = MULTIMODAL["qwen2_5_vl"].model(ONLY_TEXT)
    batch = {"input_ids": torch.full((1, SEQ_LEN), 5), "pixel_values_videos": torch.zeros(4, 24)}
    with pytest.raises(NotImplementedError, match=r"pass position_ids \[4, B, S\]"):
        shard_batch(batch, plan_for(model.config, lengths=LENGTHS), model)


@pytest.mark.parametrize("name", sorted(set(MULTIMODAL) - {"got_ocr2"}))  # whose tower has attention of its own
def test_a_vision_tower_with_this_attention_says_what_to_load(name: str):
    model, batch = MULTIMODAL[name].model("cpflex"), MULTIMODAL[name].batch()
    plan = plan_for(model.config, **planned(batch))
    with pytest.raises((ValueError, TypeError), match=re.escape('attn_implementation={"text_config": "cpflex"}')):
        shard_batch(batch, plan, model)


def other_pixels(group: Any) -> None:
    """As random crops of each rank's own do."""
    model, batch = MULTIMODAL["llava"].model(ONLY_TEXT), MULTIMODAL["llava"].batch()
    batch["pixel_values"] = batch["pixel_values"] + group.rank()
    shard_batch(batch, plan_for(model.config, group, seq_len=SEQ_LEN), model)


def test_ranks_with_other_pixels_are_found_out(two_processes: RankProcesses):
    for outcome in two_processes.outcomes(other_pixels):
        assert isinstance(outcome.error, RankMismatch), outcome.traceback
        assert "the ranks disagree about pixel_values" in str(outcome.error)
