"""Heads other than a language model's: labels of tokens, of sequences, rewards, answers; against one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from hf_models import ARCHITECTURES
from hf_runs import SEQ_LEN, TOKENS, assert_equal_to_one_process, gradients
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from cpflex.integrations.transformers import plan_for, shard_batch
from cpflex.integrations.transformers.heads import head_of
from processes import RankProcesses

pytestmark = pytest.mark.hf
PAD = 0


@dataclass(frozen=True)
class Headed:
    """A class of transformers with a head, and a batch for it."""

    architecture: str
    head: str
    tokens: str = "one document"
    num_labels: int = 3
    problem: str = ""

    def __str__(self) -> str:
        return f"{self.architecture}{self.head}-{self.problem or self.num_labels}-{self.tokens}"

    def model(self, attention: str) -> Any:
        """Equal weights for equal heads, whatever the attention."""
        config = ARCHITECTURES[self.architecture].config(num_labels=self.num_labels, classifier_dropout=0.0)
        config.problem_type = self.problem or None
        config._attn_implementation = attention
        name = ARCHITECTURES[self.architecture].prefix + self.head
        if not hasattr(transformers, name):
            pytest.skip(f"transformers {transformers.__version__} has no {name}")
        model = getattr(transformers, name)(config)
        random = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=random)
                parameter.copy_(1 + 0.1 * noise if parameter.ndim == 1 else 0.15 * noise)
        return model.train()

    def batch(self) -> dict[str, Tensor]:
        tokens, random = TOKENS[self.tokens], torch.Generator().manual_seed(1)
        ids = tokens.batch()["input_ids"]
        if (mask := tokens.planned.get("attention_mask")) is not None:
            ids = ids.masked_fill(mask == 0, PAD)

        def draw(*shape: int) -> Tensor:
            return torch.randint(self.num_labels, shape, generator=random)

        if self.head == "ForTokenClassification":
            labels = draw(*ids.shape).masked_fill(torch.arange(SEQ_LEN) % 5 == 2, -100)
            return {"input_ids": ids, "labels": labels.masked_fill(ids == PAD, -100)}
        if self.head == "ForQuestionAnswering":
            first = torch.randint(20, 70, (len(ids),), generator=random)
            return {"input_ids": ids, "start_positions": first, "end_positions": first + 9}
        if self.problem == "multi_label_classification":
            return {"input_ids": ids, "labels": draw(len(ids), self.num_labels).gt(0).float()}
        labels = draw(len(ids)) if self.num_labels > 1 else torch.randn(len(ids), generator=random)
        return {"input_ids": ids, "labels": labels}


TOKEN, SEQUENCE, ANSWER = "ForTokenClassification", "ForSequenceClassification", "ForQuestionAnswering"
HEADED = [
    Headed("llama", TOKEN, "padded right"),
    Headed("qwen3", TOKEN, "packed"),
    Headed("llama", SEQUENCE, "padded right", num_labels=1),
    Headed("llama", SEQUENCE, "padded left"),
    Headed("mistral", SEQUENCE, "one document", problem="multi_label_classification"),
    Headed("gemma2", SEQUENCE, "one document"),
    Headed("gpt_oss", SEQUENCE, "padded left"),
    Headed("llama", ANSWER, "padded right"),
    Headed("mistral", TOKEN, "one document"),
    Headed("gemma2", TOKEN, "rows packed differently"),
    Headed("qwen2", SEQUENCE, "padded right", num_labels=1),
    Headed("qwen2", ANSWER, "one document"),
]
IN_EVERY_RUN = 3


def matrix() -> list:
    params = []
    for index, case in enumerate(HEADED):
        for world_size in (2, 4):
            often = (index < IN_EVERY_RUN) == (world_size == 2) and index < IN_EVERY_RUN + 1
            marks = [] if often else [pytest.mark.slow]
            params.append(pytest.param(case, world_size, id=f"{case}-w{world_size}", marks=marks))
    return params


def one_process(case: Headed) -> tuple[float, dict[str, Tensor], Tensor]:
    model = case.model("eager")
    out = model(**case.batch(), **TOKENS[case.tokens].one_process, use_cache=False)
    out.loss.backward()
    return float(out.loss.detach()), gradients(model), results(out)


def results(out: Any) -> Tensor:
    logits = out.logits if "logits" in out else torch.stack([out.start_logits, out.end_logits])
    return logits.detach()


def on_rank(group: Any, case: Headed) -> tuple[float, dict[str, Tensor], Tensor]:
    model = case.model("cpflex")
    plan = plan_for(model.config, group, **TOKENS[case.tokens].planned)
    out = model(**shard_batch(case.batch(), plan, model))
    out.loss.backward()
    return float(out.loss.detach()), gradients(model), results(out)


def largest(grads: dict[str, Tensor]) -> float:
    return max(float(grad.norm()) for grad in grads.values())


@pytest.mark.parametrize(("case", "processes"), matrix(), indirect=["processes"])
def test_heads_see_what_they_see_in_one_process(case: Headed, processes: RankProcesses):
    loss, grads, logits = one_process(case)
    ranks = processes.run(on_rank, case)
    small = {name for name, grad in grads.items() if grad.norm() < 0.02 * largest(grads)}
    for name in small:  # what cancels, as a bias before a softmax does: what is left is rounding of the terms
        summed = torch.stack([grad.pop(name) for _, grad, _ in ranks]).sum(dim=0)
        assert (summed - grads[name]).norm() <= 1e-6 * largest(grads), name
    kept = {name: grad for name, grad in grads.items() if name not in small}
    assert_equal_to_one_process([(share, grad) for share, grad, _ in ranks], (loss, kept))
    for _, _, ours in ranks:
        torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-5)


# -- wrapped


def wrapped_on_rank(group: Any, case: Headed, wrap: str) -> tuple[float, dict[str, Tensor]]:
    """The whole gradients, which are averaged over the ranks: the share is multiplied by their number."""
    model = case.model("cpflex")
    plan = plan_for(model.config, group, **TOKENS[case.tokens].planned)
    if wrap == "DDP":
        wrapped = DistributedDataParallel(model, process_group=group)
    else:
        mesh = init_device_mesh("cpu", (group.size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    loss = wrapped(**shard_batch(case.batch(), plan, wrapped)).loss
    (loss * group.size()).backward()
    grads = gradients(model)
    if wrap == "FSDP":
        grads = {name: grad.full_tensor() for name, grad in grads.items()}
    return float(loss.detach()) * group.size(), grads


@pytest.mark.parametrize("wrap", ["DDP", "FSDP"])
def test_a_reward_model_may_be_wrapped(wrap: str, two_processes: RankProcesses):
    case = Headed("llama", SEQUENCE, "padded right", num_labels=1)
    loss, grads, _ = one_process(case)
    for result in two_processes.run(wrapped_on_rank, case, wrap):
        assert_equal_to_one_process([result], (loss, grads))


def adapted(case: Headed, model: Any) -> Any:
    """With adapters; PEFT trains a copy of the scores, in the place of the layer."""
    import peft

    torch.manual_seed(3)
    adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="SEQ_CLS")
    return peft.get_peft_model(model, adapters)


def adapted_on_rank(group: Any, case: Headed, is_late: bool) -> tuple[float, dict[str, Tensor]]:
    model = case.model("cpflex")
    plan = plan_for(model.config, group, **TOKENS[case.tokens].planned)
    if is_late:  # the hooks are there already
        shard_batch(case.batch(), plan, model)
    model = adapted(case, model)
    loss = model(**shard_batch(case.batch(), plan, model)).loss
    loss.backward()
    return float(loss.detach()), gradients(model)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
@pytest.mark.parametrize("is_late", [False, True])
def test_a_reward_model_may_have_adapters(is_late: bool, two_processes: RankProcesses):
    pytest.importorskip("peft")
    case = Headed("llama", SEQUENCE, "padded right", num_labels=1)
    model = adapted(case, case.model("eager"))
    loss = model(**case.batch(), **TOKENS[case.tokens].one_process, use_cache=False).loss
    loss.backward()
    truth = float(loss.detach()), gradients(model)
    assert_equal_to_one_process(two_processes.run(adapted_on_rank, case, is_late), truth)


def preference(rewards: Tensor) -> Tensor:
    return -torch.nn.functional.logsigmoid(rewards[0] - rewards[1]).mean()


def rewards_on_rank(group: Any, case: Headed) -> tuple[float, dict[str, Tensor]]:
    model = case.model("cpflex")
    plan = plan_for(model.config, group, **TOKENS[case.tokens].planned)
    batch = {"input_ids": case.batch()["input_ids"]}
    loss = preference(model(**shard_batch(batch, plan, model)).logits) / group.size()
    loss.backward()
    return float(loss.detach()), gradients(model)


def test_what_is_computed_from_the_logits_has_the_gradient_of_one_process(two_processes: RankProcesses):
    case = Headed("llama", SEQUENCE, "padded right", num_labels=1)
    model = case.model("eager")
    loss = preference(model(case.batch()["input_ids"], **TOKENS[case.tokens].one_process, use_cache=False).logits)
    loss.backward()
    truth = float(loss.detach()), gradients(model)
    assert_equal_to_one_process(two_processes.run(rewards_on_rank, case), truth)


def test_a_model_runs_as_before_on_whole_sequences_with_another_attention():
    """The hooks stay on it."""
    case = Headed("llama", SEQUENCE, "padded right", num_labels=1)
    model = case.model("cpflex")
    shard_batch(case.batch(), plan_for(model.config, **TOKENS[case.tokens].planned), model)
    model.set_attn_implementation("eager")
    out = model(**case.batch(), **TOKENS[case.tokens].one_process, use_cache=False)
    torch.testing.assert_close(out.logits.detach(), one_process(case)[2])


# -- refusals


def with_head(name: str, head: str) -> Any:
    """None if transformers has none for the text alone."""
    made = getattr(transformers, ARCHITECTURES[name].prefix + head, None)
    is_of_text = made is not None and made.config_class is type(ARCHITECTURES[name].config())
    return Headed(name, head).model("cpflex") if is_of_text else None


@pytest.mark.parametrize("head", [TOKEN, SEQUENCE, ANSWER])
def test_no_other_head_takes_what_is_for_a_language_model(head: str):
    """Of all verified model types that have it."""
    tried = 0
    for name in ARCHITECTURES:
        if (model := with_head(name, head)) is None:
            continue
        tried += 1
        plan = plan_for(model.config, **TOKENS["one document"].planned)
        whole = TOKENS["one document"].batch()
        for batch in (whole, {"input_ids": whole["input_ids"]}):
            with pytest.raises(NotImplementedError, match="another head"):
                model(**shard_batch(batch, plan))
    assert tried >= 4


class OfMyOwn(transformers.LlamaPreTrainedModel):
    """A head that nobody knows."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = transformers.LlamaModel(config)


def classify(tokens: str = "one document", **arguments: Any) -> Any:
    case = Headed("llama", SEQUENCE, tokens)
    model = case.model("cpflex")
    return model(**shard_batch(case.batch(), plan_for(model.config, **TOKENS[tokens].planned), model), **arguments)


REFUSED = {
    "a head of ones own": (lambda: head_of(OfMyOwn(ARCHITECTURES["llama"].config())), "head of OfMyOwn is not known"),
    "one result for several documents": (lambda: classify("packed"), "one result for each row"),
    "logits of the last tokens": (
        lambda: shard_batch(TOKENS["one document"].batch() | {"logits_to_keep": 1}, plan_of("llama")),
        "logits_to_keep",
    ),
    "a tuple": (lambda: classify(return_dict=False), "return_dict"),
    "labels of rows": (
        lambda: shard_batch(Headed("llama", SEQUENCE).batch(), plan_of("llama")),
        r"must be \[B, S\]; got shape \(2,\) - for another head pass the model",
    ),
    "labels for a model without a head": (
        lambda: shard_batch(TOKENS["one document"].batch(), plan_of("llama"), body()),
        "labels",
    ),
}


def plan_of(name: str) -> Any:
    return plan_for(ARCHITECTURES[name].config(), **TOKENS["one document"].planned)


def body() -> Any:
    return Headed("llama", TOKEN).model("cpflex").base_model


@pytest.mark.parametrize("what", REFUSED)
def test_what_heads_cannot_do_is_refused(what: str):
    ask, message = REFUSED[what]
    with pytest.raises((NotImplementedError, ValueError), match=message):
        ask()


def test_a_model_without_a_head_gives_this_ranks_hidden_states():
    batch = {"input_ids": TOKENS["one document"].batch()["input_ids"]}
    hidden = body()(**shard_batch(batch, plan_of("llama"), body())).last_hidden_state
    expected = Headed("llama", TOKEN).model("eager").base_model(**batch, use_cache=False).last_hidden_state
    torch.testing.assert_close(hidden[:, :SEQ_LEN], expected, rtol=1e-4, atol=1e-5)
