"""Models with recurrent or convolutional layers: N ranks compute what one process computes on each document alone."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

import trainer_runs
from accelerate import PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType
from hf_hybrids import (
    HYBRIDS,
    assert_equal_to_documents_alone,
    hybrid_model,
    hybrid_on_rank,
    wrapped_hybrid_on_rank,
)
from hf_models import ARCHITECTURES, VOCAB
from hf_runs import TOKENS, Case
from transformers import Trainer as StockTrainer

import cpflex
from cpflex.integrations import transformers as integration
from cpflex.integrations.trainer import Trainer
from cpflex.integrations.transformers import (
    RecurrentMask,
    attach_recurrent,
    detach_recurrent,
    exchanged,
    gathered,
    plan_for,
    recurrent,
    shard_batch,
)
from processes import RankProcesses

pytestmark = [
    pytest.mark.hf,
    pytest.mark.skipif(not recurrent.hands_out_masks(), reason="this transformers gives such layers no mask of theirs"),
]
LAYOUT_NAMES = ("balanced", "zigzag", "striped", "contiguous")
DESCRIBED = ("one document", "packed", "rows packed differently", "padded left", "padded right")
EXCHANGED = tuple(name for name in HYBRIDS if name not in ("jamba", "minimax", "zamba"))
DOCUMENT = Path(__file__).parents[2] / "docs" / "hybrids.md"
PACKED = Case("qwen3_next", "packed")


def matrix() -> list:
    """Every architecture with every kind of batch on 2 and on 4 ranks, in both ways, the layouts in turn."""
    params = []
    for how, names in ((gathered, tuple(HYBRIDS)), (exchanged, EXCHANGED)):
        for (i, name), (j, tokens), (k, world_size) in itertools.product(*map(enumerate, (names, DESCRIBED, (2, 4)))):
            case = Case(name, tokens, world_size, LAYOUT_NAMES[(i + j + 2 * k) % 4])
            params.append(pytest.param(how, case, world_size, id=f"{how.__name__}-{case}"))
    return params


@pytest.mark.by_day(45)
@pytest.mark.parametrize(("how", "case", "processes"), matrix(), indirect=["processes"])
def test_ranks_compute_the_loss_and_gradients_of_documents_alone(how: Any, case: Case, processes: RankProcesses):
    assert_equal_to_documents_alone(processes.run(hybrid_on_rank, case, how), case)


@pytest.mark.parametrize("how", [exchanged, gathered])
@pytest.mark.parametrize("wrap", ["DDP", "FSDP"])
def test_layers_stay_attached_under_what_averages_gradients_and_recomputes(
    wrap: str, how: Any, two_processes: RankProcesses
):
    for result in two_processes.run(wrapped_hybrid_on_rank, PACKED, wrap, how):
        assert_equal_to_documents_alone([result], PACKED)


def logged_by_the_trainer(group: Any, folder: str) -> list[tuple[float, float]]:
    """(loss, norm of gradients) of each step, under FSDP2."""
    with trainer_runs.launched(group):
        wrap = {
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["BambaDecoderLayer"],
        }
        sizes = ParallelismConfig(cp_size=2, dp_shard_size=1)
        options = trainer_runs.arguments(
            folder, batch_size=1, parallelism_config=sizes, fsdp=True, fsdp_config={"version": 2, **wrap}
        )
        assert options.device.type == "cpu"  # makes the state
        PartialState().distributed_type = DistributedType.MULTI_GPU
        model = hybrid_model(Case("bamba"), "cpflex", exchanged)
        return trainer_runs.logged(Trainer(model=model, args=options, train_dataset=one_document_rows()))


def one_document_rows() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, VOCAB, (2, 90), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row, "position_ids": torch.arange(90)} for row in ids]


@pytest.mark.by_day(4)
def test_the_trainer_takes_a_model_that_is_attached(two_processes: RankProcesses, tmp_path: Path):
    model = hybrid_model(Case("bamba"), "eager")
    model.config.use_cache = False
    with trainer_runs.launched(None):
        options = trainer_runs.arguments(str(tmp_path), batch_size=1)
        expected = trainer_runs.logged(StockTrainer(model=model, args=options, train_dataset=one_document_rows()))
    assert len(expected) == 2
    for steps in two_processes.run(logged_by_the_trainer, str(tmp_path)):
        for ours, theirs in zip(steps, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)


def test_what_is_called_a_verified_hybrid_is_what_is_tested():
    assert set(HYBRIDS) == integration.HYBRIDS
    assert {HYBRIDS[name].config().model_type for name in HYBRIDS} == integration.HYBRIDS


def test_the_document_names_every_model_type_and_what_it_exchanges():
    rows = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| ") and "`" in line]
    for name in HYBRIDS:
        (row,) = [row for row in rows if f"`{name}`" in row]
        assert ("| yes |" in row) == (name in EXCHANGED)


# -- attaching


def loss_of(model: Any, case: Case = PACKED) -> torch.Tensor:
    return model(**shard_batch(TOKENS[case.tokens].batch(), case.plan(model.config))).loss


def test_attaching_twice_is_attaching_once_and_detaching_leaves_the_model_as_it_was():
    model = hybrid_model(PACKED, "cpflex")
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    names = attach_recurrent(model, gathered)
    assert names == ["model.layers.0.linear_attn", "model.layers.2.linear_attn"]
    expected = loss_of(model)
    assert attach_recurrent(model, gathered) == names
    assert torch.equal(loss_of(model), expected)
    detach_recurrent(model)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_is_attached_to_its_own_layers(copied: Any):
    model = hybrid_model(PACKED, "cpflex", gathered)
    expected = loss_of(model)
    twin = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(loss_of(twin), expected)


def test_a_plan_of_a_hybrid_pickles_and_moves_to_devices():
    plan = pickle.loads(pickle.dumps(plan_for(HYBRIDS["falcon_h1"].config(), **TOKENS["packed"].planned)))
    assert set(plan.attention_mask) == {"full_attention", "linear_attention"}
    mask = pickle.loads(pickle.dumps(plan.attention_mask))["linear_attention"]
    assert isinstance(mask, RecurrentMask)
    assert mask.to("cpu", non_blocking=True) is mask


def test_layers_without_attention_weigh_nothing_in_the_plan():
    """Blocks of experts and of mixing alone; hybrid ones are attention blocks as well."""
    for name in HYBRIDS:
        config = HYBRIDS[name].config()
        plan = plan_for(config, rank=0, world_size=2, **TOKENS["packed"].planned)
        assert list(plan.windows) == ["full_attention"]


@pytest.mark.parametrize(
    ("name", "of_one_layer"),
    [
        ("qwen3_next", 4 * 6 * (6 + 5)),
        ("kimi_linear", 3 * 6 * (6 + 6)),
        ("bamba", 8 * (6 * 8 + 1)),
        ("nemotron_h", 8 * (6 * 8 + 1)),
        ("lfm2", 0),
        ("minimax", 0),
    ],
)
def test_the_summaries_of_a_model_are_counted_by_its_config(name: str, of_one_layer: int):
    config = HYBRIDS[name].config()
    assert recurrent.summary_numbers(config) == of_one_layer * config.layer_types.count("linear_attention")


def test_plans_keep_consecutive_chunks_together_where_summaries_are_large():
    """Documents of unlike lengths, which `balanced` would deal out in many pieces."""
    documents = {"lengths": [900, 100, 2000, 52, 1044], "rank": 0, "world_size": 4}
    small, large = ({"linear_key_head_dim": dim, "linear_value_head_dim": dim} for dim in (1, 256))
    plans = [plan_for(HYBRIDS["qwen3_next"].config(**sizes), **documents).plan for sizes in (small, large)]
    few, many = sorted(sum(map(len, plan.fragments)) for plan in plans)
    assert few < many
    assert sum(map(len, plans[1].fragments)) == few
    config = ARCHITECTURES["llama"].config()
    plain, told = (plan_for(config, **documents, **options).plan for options in ({}, {"layout": cpflex.balanced}))
    assert plain.fragments == told.fragments, "without such layers, as ever"


def test_a_plan_says_what_such_layers_cost():
    config = HYBRIDS["qwen3_next"].config()
    plan = plan_for(config, rank=1, world_size=2, layout=cpflex.contiguous, **TOKENS["packed"].planned)
    assert "linear_attention: outside of attention" in plan.explain()
    assert "48 tokens received in each such layer, 83 held; 51 computed, of which 35 belong to rank 1" in plan.explain()
    assert (
        "outside of attention"
        not in plan_for(HYBRIDS["lfm2"].config(layer_types=["full_attention"] * 3), seq_len=9).explain()
    )


def test_a_rank_without_tokens_has_gradients_of_every_parameter():
    model = hybrid_model(PACKED, "cpflex", gathered)
    plan = plan_for(model.config, seq_len=3, rank=3, world_size=4, layout=cpflex.contiguous)
    assert sum(run.is_heard for run in plan.recurrent_mask.runs[0]) == 1


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
@pytest.mark.parametrize("how", [exchanged, gathered])
@pytest.mark.parametrize("name", ["qwen3_next", "bamba", "lfm2"])
def test_bfloat16_is_as_exact_as_in_one_process(name: str, how: Any, autocast: bool):
    """The median over the tokens, which experts may make large for some."""
    case, dtype = Case(name, "one document"), torch.float32 if autocast else torch.bfloat16
    ids = TOKENS[case.tokens].batch()["input_ids"]
    plan = case.plan(HYBRIDS[name].config())
    with torch.no_grad():
        truth = hybrid_model(case, "eager")(input_ids=ids, use_cache=False).logits
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            rounded = hybrid_model(case, "eager").to(dtype)(input_ids=ids, use_cache=False).logits
            ours = hybrid_model(case, "cpflex", how).to(dtype)(**shard_batch({"input_ids": ids}, plan)).logits
    ours = plan.plan.unshard(ours, dim=1)
    assert ours.dtype == rounded.dtype
    errors = [((x.float() - truth).norm(dim=-1) / truth.norm(dim=-1)).median() for x in (ours, rounded)]
    assert 0 < errors[0] <= 1.5 * errors[1]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("how", [exchanged, pytest.param(gathered, marks=pytest.mark.slow)])
def test_the_compiler_leaves_attached_layers_out(how: Any):
    model = hybrid_model(PACKED, "cpflex", how)
    expected = loss_of(model)
    for layer in model.model.layers:
        layer.compile(backend="eager")
    torch.testing.assert_close(loss_of(model), expected)
    torch.compiler.reset()


# -- refusals


def test_a_hybrid_is_refused_until_a_way_is_chosen():
    for name in HYBRIDS:
        model = hybrid_model(Case(name), "cpflex")
        with pytest.raises(NotImplementedError, match=r"choose how with attach_recurrent\(model, exchanged\)"):
            loss_of(model, Case(name))


def attached_on_one_rank(group: Any, how: Any) -> None:
    model = hybrid_model(PACKED, "cpflex", how if group.rank() == 0 else None)
    model(**shard_batch(TOKENS["packed"].batch(), PACKED.plan(model.config, group)))


@pytest.mark.parametrize("how", [exchanged, gathered])
def test_a_rank_that_chose_no_way_is_found_out_by_all(how: Any, two_processes: RankProcesses):
    waiting, refused = two_processes.outcomes(attached_on_one_rank, how)
    assert isinstance(refused.error, NotImplementedError), refused.traceback
    assert isinstance(waiting.error, cpflex.RankMismatch), waiting.traceback
    assert "this model has layers that mix tokens outside of attention" in str(waiting.error)


def attached_in_two_ways(group: Any) -> None:
    model = hybrid_model(PACKED, "cpflex", (exchanged, gathered)[group.rank()])
    model(**shard_batch(TOKENS["packed"].batch(), PACKED.plan(model.config, group)))


def test_ranks_that_chose_different_ways_are_found_out(two_processes: RankProcesses):
    for outcome in two_processes.outcomes(attached_in_two_ways):
        assert isinstance(outcome.error, cpflex.RankMismatch), outcome.traceback
        assert "Qwen3NextGatedDeltaNet, gathered" in str(outcome.error)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("minimax", "for MiniMaxLightningAttention is not known: it mixes tokens in its own forward"),
        ("jamba", "for JambaMambaMixer is not known: it calls mamba_selective_scan"),
        ("zamba", "for ZambaMambaMixer is not known: it calls mamba_selective_scan"),
    ],
)
def test_layers_whose_states_are_not_known_are_refused_by_name(name: str, said: str):
    model = hybrid_model(Case(name), "cpflex")
    with pytest.raises(
        NotImplementedError, match=rf"{said}.*attach_recurrent\(model, gathered\) works for every layer"
    ):
        attach_recurrent(model, exchanged)
    assert not any("forward" in vars(module) for module in model.modules()), "none is changed"


@pytest.mark.parametrize("mask", ["none", "a tensor", "another plan"])
def test_an_attached_layer_takes_nothing_but_the_plan(mask: str):
    model = hybrid_model(PACKED, "cpflex", gathered)
    batch = shard_batch(TOKENS["packed"].batch(), PACKED.plan(model.config))
    others = {"none": None, "a tensor": torch.ones(1, 83), "another plan": batch["attention_mask"]["full_attention"]}
    batch["attention_mask"] = batch["attention_mask"] | {"linear_attention": others[mask]}
    with pytest.raises(ValueError, match=r"must get the plan as attention_mask.*detach_recurrent\(model\)"):
        model(**batch)


def test_models_that_cannot_be_attached_are_refused():
    with pytest.raises(NotImplementedError, match="a model without attention"):
        plan_for(HYBRIDS["bamba"].config(attn_layer_indices=[]), seq_len=9)
    with pytest.raises(ValueError, match="lfm2 has no layers that mix tokens outside of attention: nothing to attach"):
        attach_recurrent(HYBRIDS["lfm2"].model("cpflex", layer_types=["full_attention"] * 3), gathered)
    model = hybrid_model(PACKED, "cpflex")
    model.model.layers[2].linear_attn = torch.nn.Identity()
    with pytest.raises(NotImplementedError, match=r"has 2 layers that mix.*finds 1: \['model.layers.0.linear_attn'\]"):
        attach_recurrent(model, gathered)


def test_a_release_without_masks_for_such_layers_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr("transformers.masking_utils.create_recurrent_attention_mask")
    for name in HYBRIDS:
        with pytest.raises(NotImplementedError, match="mix tokens outside of attention, before transformers 5"):
            plan_for(HYBRIDS[name].config(), seq_len=9)


def test_a_cache_is_refused():
    from transformers import DynamicCache

    model = hybrid_model(PACKED, "cpflex", gathered)
    batch = shard_batch(TOKENS["packed"].batch(), PACKED.plan(model.config))
    with pytest.raises(NotImplementedError, match="a cache is not supported; pass use_cache=False"):
        model(**batch, cache=DynamicCache(config=model.config))
