"""One training of TRL's: as it comes, with eager attention in one process, and on all ranks with cpflex.

TRL, and what comes with it, is imported where it is used, in the ranks: it takes seconds.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType
from hf_models import ARCHITECTURES, VOCAB
from tokenizers import Tokenizer, models, pre_tokenizers
from trainer_runs import launched
from transformers import MistralForSequenceClassification, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + ' </s> ' }}"
    "{% endgeneration %}{% else %}{{ '<s> ' + m['content'] + ' ' }}{% endif %}{% endfor %}"
)
LENGTHS = ((31, 9), (4, 86), (10, 2), (60, 17), (2, 3), (20, 24), (41, 19), (20, 3), (1, 50), (5, 3))
"""Prompts and completions; the longest is longer than the window."""
NUM_EVAL = 5
"""An odd number: the last batch is not full."""
OURS = {"GRPO": "cpflex.integrations.trl_grpo"}
"""Where trainers are that are not beside the others."""
NOT_COMPARED = ("runtime", "per_second", "total_flos", "epoch", "learning_rate", "step")


@dataclass(frozen=True)
class Run:
    """One trainer on one dataset."""

    trainer: str
    rows: Callable[[], list[dict[str, Any]]]
    options: Mapping[str, Any] = field(default_factory=dict)
    lora: bool = False
    reference: bool = False
    replicated: bool = False
    """With DDP rather than FSDP2."""
    metrics: bool = False
    """Whether logits are evaluated, all of them."""
    trees: bool | None = None
    """Whether the ranks compute calls as trees; False turns it off, None is what a trainer does by itself."""

    def history(self, attention: str, folder: str, sizes: tuple[int, int] | None) -> list[dict[str, float]]:
        """What is logged, and evaluated at the end. ``sizes`` are (dp, cp); None is one process."""
        import trl
        from datasets import load_from_disk

        module = (
            importlib.import_module(OURS.get(self.trainer, "cpflex.integrations.trl")) if attention == "cpflex" else trl
        )
        config = getattr(module, f"{self.trainer}Config", getattr(trl, f"{self.trainer}Config"))
        args = config(**self._options(folder), **over(sizes, self.replicated))
        if (
            sizes is not None and not self.replicated
        ):  # accelerate shards parameters on accelerators only: the CPU passes for one
            assert args.device.type == "cpu"
            PartialState().distributed_type = DistributedType.MULTI_GPU
        model = ARCHITECTURES["mistral"].model(attention) if self.trainer != "Reward" else reward_model(attention)
        model.config.use_cache = False
        special: dict[str, Any] = {}
        if self.reference:
            special["ref_model"] = ARCHITECTURES["mistral"].model(attention, seed=1)
        if self.trainer == "GRPO":
            special["reward_funcs"] = [of_even_words, of_length]
        if self.metrics:
            special["compute_metrics"] = of_logits
        trainer = getattr(module, f"{self.trainer}Trainer")(
            model=model,
            args=args,
            train_dataset=load_from_disk(f"{folder}/train"),
            eval_dataset=load_from_disk(f"{folder}/eval"),
            processing_class=tokenizer(),
            peft_config=adapters(self.trainer) if self.lora else None,
            **special,
        )
        if attention == "cpflex" and self.trees is False:
            trainer.share_prefixes = False
        with counted_trees() if attention == "cpflex" else nullcontext([]) as calls:
            trainer.train()
            trainer.evaluate()
        if attention == "cpflex" and self.trees is not None:
            assert (None not in calls and len(calls) > 2) if self.trees else not any(calls)
        lines = [{name: float(x) for name, x in line.items()} for line in trainer.state.log_history]
        return [{k: x for k, x in line.items() if not any(part in k for part in NOT_COMPARED)} for line in lines]

    def save(self, folder: Path) -> str:
        """The data, where every rank finds them."""
        from datasets import Dataset

        for name, rows in (("train", self.rows()), ("eval", self.rows()[:NUM_EVAL])):
            Dataset.from_list(rows).save_to_disk(folder / name)
        return str(folder)

    def _options(self, folder: str) -> dict[str, Any]:
        options: dict[str, Any] = {
            "output_dir": folder,
            "use_cpu": True,
            "bf16": False,
            "max_steps": 2,
            "logging_steps": 1,
            "optim": "sgd",  # Adam hides a wrong factor, and makes much of a small gradient's error
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "max_length": 100,
        }
        if self.trainer == "GRPO":
            del options["max_length"]
        return options | dict(self.options)


@contextmanager
def counted_trees() -> Iterator[list[Any]]:
    """What becomes of each call that may be one with a tree."""
    from cpflex.integrations import trl as ours

    calls: list[Any] = []

    def tree_call(*args: Any) -> Any:
        calls.append(made(*args))
        return calls[-1]

    made, ours.tree_call = ours.tree_call, tree_call
    try:
        yield calls
    finally:
        ours.tree_call = made


def adapters(trainer: str) -> Any:
    """That change the model from the start."""
    from peft import LoraConfig

    task = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]} if trainer == "Reward" else {}
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **task)


def reward_model(attention: str) -> Any:
    """With the body of the language model."""
    body = ARCHITECTURES["mistral"].model(attention).model
    torch.manual_seed(0)
    body.config.num_labels = 1
    model = MistralForSequenceClassification(body.config)
    model.model = body
    return model.train()


def over(sizes: tuple[int, int] | None, replicated: bool) -> dict[str, Any]:
    if sizes is None:
        return {}
    wrap = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["MistralDecoderLayer"]}
    mesh = ParallelismConfig(dp_shard_size=sizes[0], cp_size=sizes[1])
    if replicated:
        return {"parallelism_config": mesh}
    return {"parallelism_config": mesh, "fsdp": True, "fsdp_config": {"version": 2, **wrap}}


@contextmanager
def started(group: dist.ProcessGroup | None) -> Iterator[None]:
    with launched(group):
        os.environ.update(CI="1", TQDM_DISABLE="1")  # TRL reports its use over the network but for CI
        yield


def trained_on_rank(group: dist.ProcessGroup, run: Run, attention: str, folder: str, dp: int) -> list[dict[str, float]]:
    with started(group):
        return run.history(attention, folder, (dp, group.size() // dp))


def trained_alone(group: dist.ProcessGroup, run: Run, folder: str) -> list[dict[str, float]]:
    """Each rank for itself."""
    with started(None):
        return run.history("eager", folder, None)


def refusal_on_rank(group: dist.ProcessGroup, run: Run, folder: str) -> str:
    with started(group):
        try:
            run.history("cpflex", folder, (1, group.size()))
        except NotImplementedError as error:
            return str(error)
    return ""


# -- data


def tokenizer() -> PreTrainedTokenizerFast:
    words = [*SPECIAL, *(f"w{index}" for index in range(len(SPECIAL), VOCAB))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    made.chat_template = CHAT_TEMPLATE
    return made


def text(index: int, length: int) -> str:
    random = torch.Generator().manual_seed(index)
    return "".join(f"w{token} " for token in torch.randint(len(SPECIAL), VOCAB, (length,), generator=random).tolist())


def completions() -> list[dict[str, Any]]:
    return [{"prompt": text(i, a), "completion": text(i + 100, b)} for i, (a, b) in enumerate(LENGTHS)]


def documents() -> list[dict[str, Any]]:
    return [{"text": text(i, a + b)} for i, (a, b) in enumerate(LENGTHS)]


def conversations() -> list[dict[str, Any]]:
    """Of two turns each."""
    return [
        {
            "messages": [
                {"role": role, "content": text(4 * i + turn, length)}
                for turn, (role, length) in enumerate((("user", a), ("assistant", b), ("user", 3), ("assistant", 5)))
            ]
        }
        for i, (a, b) in enumerate(LENGTHS)
    ]


def prompts() -> list[dict[str, Any]]:
    return [{"prompt": text(i, a)} for i, (a, _) in enumerate(LENGTHS)]


def of_even_words(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(int(word[1:]) % 2 == 0 for word in one.split())) for one in completions]


def of_length(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [0.1 * len(one) for one in completion_ids]


def of_logits(evaluated: Any) -> dict[str, float]:
    logits, labels = (torch.as_tensor(x) for x in (evaluated.predictions, evaluated.label_ids))
    counted = labels[:, 1:] >= 0
    right = logits[:, :-1].argmax(dim=-1) == labels[:, 1:]
    return {"right": float(right[counted].float().mean()), "mean": float(logits[:, :-1][counted].square().mean())}


def preferences() -> list[dict[str, Any]]:
    return [
        {"prompt": text(i, a), "chosen": text(i + 100, b), "rejected": text(i + 200, 1 + 2 * a)}
        for i, (a, b) in enumerate(LENGTHS[2:])
    ]
