"""Preferences with TRL: DPO with long answers, of the model and of its reference, over the ranks of a sequence.

    torchrun --nproc-per-node 2 examples/trl_dpo.py      a batch of pairs over both ranks
    torchrun --nproc-per-node 4 examples/trl_dpo.py      two batches, two ranks each

Prints the loss of the first step, and how far it is from that of transformers' own attention on one rank.
"""

import tempfile

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config
from trl import DPOConfig

from cpflex.integrations.trl import DPOTrainer  # instead of trl's

VOCAB, CP, OPTIONS = 64, 2, {"logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "bf16": False}
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8, "initializer_range": 0.3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB}
LENGTHS = ((20, 90, 150), (70, 30, 40), (5, 180, 60), (33, 77, 120))  # prompts, chosen and rejected answers


def model_with(attention: str, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(Qwen3Config(**SHAPE, **HEADS), attn_implementation=attention)


def text(length: int) -> str:
    return "".join(f"w{2 + (i * i + length) % (VOCAB - 2)} " for i in range(length))


def log_prob(model: torch.nn.Module, prompt: str, answer: str) -> torch.Tensor:
    tokens = torch.tensor([int(word[1:]) for word in (prompt + answer).split()] + [1])  # TRL ends answers
    log_probs = model(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])
    return log_probs[len(prompt.split()) - 1 :].sum()


@torch.no_grad()
def loss_on_one_rank(pairs: list[dict[str, str]]) -> float:
    model, reference, losses = model_with("sdpa", seed=0), model_with("sdpa", seed=1), []
    for prompt, chosen, rejected in (pair.values() for pair in pairs):
        gained = log_prob(model, prompt, chosen) - log_prob(model, prompt, rejected)
        gained -= log_prob(reference, prompt, chosen) - log_prob(reference, prompt, rejected)
        losses.append(-F.logsigmoid(0.1 * gained))
    return torch.stack(losses).mean().item()


def main() -> None:
    pairs = [{"prompt": text(a), "chosen": text(b), "rejected": text(c)} for a, b, c in LENGTHS]
    vocabulary = {"<pad>": 0, "<end>": 1} | {f"w{token}": token for token in range(2, VOCAB)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    mesh = ParallelismConfig(cp_size=CP, dp_shard_size=dist.get_world_size() // CP)
    with tempfile.TemporaryDirectory() as folder:
        batch = {"per_device_train_batch_size": 4 // mesh.dp_shard_size, "max_steps": 3}  # all pairs
        arguments = DPOConfig(output_dir=folder, parallelism_config=mesh, fsdp=True, **batch, **OPTIONS)
        if arguments.device.type == "cpu":  # accelerate shards parameters on accelerators only: the CPU passes for one
            PartialState().distributed_type = DistributedType.MULTI_GPU
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
        data = {"train_dataset": Dataset.from_list(pairs), "processing_class": tokenizer}
        both = {"model": model_with("cpflex", seed=0), "ref_model": model_with("cpflex", seed=1)}
        trainer = DPOTrainer(**both, args=arguments, **data)
        trainer.train()
    first = trainer.state.log_history[0]["loss"]
    if dist.get_rank() == 0:
        print(f"first step: loss {first:.6f}, difference to one rank {first - loss_on_one_rank(pairs):.1e}")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    dist.destroy_process_group()
