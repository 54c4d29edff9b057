"""Supervised fine-tuning with TRL: prompts and completions of any lengths, packed, over the ranks of a sequence.

    torchrun --nproc-per-node 2 examples/trl_sft.py      one pack at a time, over both ranks
    torchrun --nproc-per-node 4 examples/trl_sft.py      two packs at a time, two ranks each

Prints the loss of the first step, and how far it is from that of transformers' own attention on one rank. Beside
accelerate's own context parallelism, in which documents of a pack see one another, TRL refuses to pack.
"""

import tempfile

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config
from trl import SFTConfig

from cpflex.integrations.trl import SFTTrainer  # instead of trl's

VOCAB, CP, OPTIONS = 64, 2, {"logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "bf16": False}
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8, "initializer_range": 0.3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB}
LENGTHS = ((20, 30), (70, 80), (90, 110), (10, 90), (60, 40), (150, 50))  # prompts and completions, in packs of 200


def model_with(attention: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(Qwen3Config(**SHAPE, **HEADS), attn_implementation=attention)


def sample(index: int, prompt: int, completion: int) -> dict[str, list[int]]:
    """Tokens, of which those of the prompt are not to be learned; texts would do as well."""
    tokens = torch.randint(2, VOCAB, (prompt + completion,), generator=torch.Generator().manual_seed(index)).tolist()
    return {"input_ids": tokens, "labels": [-100] * prompt + tokens[prompt:]}


def loss_on_one_rank(samples: list[dict[str, list[int]]]) -> float:
    """Sample by sample."""
    model, losses = model_with("sdpa"), []
    for tokens, labels in ((torch.tensor(x["input_ids"]), torch.tensor(x["labels"])) for x in samples):
        logits = model(tokens[None]).logits[0, :-1]
        losses.append(F.cross_entropy(logits, labels[1:], reduction="none")[labels[1:] >= 0])
    return torch.cat(losses).mean().item()


def main() -> None:
    dp, samples = dist.get_world_size() // CP, [sample(index, *lengths) for index, lengths in enumerate(LENGTHS)]
    words = Tokenizer(models.WordLevel({f"w{token}": token for token in range(VOCAB)}, unk_token="w0"))
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            parallelism_config=ParallelismConfig(cp_size=CP, dp_shard_size=dp),
            fsdp=True,
            packing=True,
            max_length=200,
            per_device_train_batch_size=4 // dp,  # a step sees all packs
            max_steps=3,
            **OPTIONS,
        )
        if arguments.device.type == "cpu":  # accelerate shards parameters on accelerators only: the CPU passes for one
            PartialState().distributed_type = DistributedType.MULTI_GPU
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
        data = {"train_dataset": Dataset.from_list(samples), "processing_class": tokenizer}
        trainer = SFTTrainer(model=model_with("cpflex"), args=arguments, **data)
        trainer.train()
    first = trainer.state.log_history[0]["loss"]
    if dist.get_rank() == 0:
        print(f"first step: loss {first:.6f}, difference to one rank {first - loss_on_one_rank(samples):.1e}")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    dist.destroy_process_group()
