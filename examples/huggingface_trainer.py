"""Train an unmodified Hugging Face model on packed documents, with the Trainer, FSDP2 and context parallelism.

    torchrun --nproc-per-node 2 examples/huggingface_trainer.py      one sequence at a time, over both ranks
    torchrun --nproc-per-node 4 examples/huggingface_trainer.py      two sequences at a time, two ranks each

Prints the loss of the first step, and how far it is from that of transformers' own attention on one rank. The model has
sliding-window layers, which accelerate's own context parallelism refuses, as it can express causal attention only.
"""

import os
import tempfile
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM, MistralConfig, TrainingArguments

from cpflex.integrations.trainer import Trainer

VOCAB, CP, SHAPE = 64, 2, {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 50, "initializer_range": 0.3}
CU_SEQLENS = [0, 120, 121, 400]  # where the documents of each row start


def model_with(attention: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = MistralConfig(vocab_size=VOCAB, **SHAPE, **HEADS)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def packed(index: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(VOCAB, (CU_SEQLENS[-1],), generator=torch.Generator().manual_seed(index))
    position_ids = torch.cat([torch.arange(b - a) for a, b in pairwise(CU_SEQLENS)])
    return {"input_ids": tokens, "labels": tokens, "position_ids": position_ids}


def loss_on_one_rank(samples: list[dict[str, torch.Tensor]]) -> float:
    """Document by document."""
    model, losses = model_with("sdpa"), []
    for sample in samples:
        for tokens in (sample["input_ids"][a:b] for a, b in pairwise(CU_SEQLENS)):
            logits = model(tokens[None]).logits[0]
            losses.append(F.cross_entropy(logits[:-1], tokens[1:], reduction="none"))
    return torch.cat(losses).mean().item()


def main() -> None:
    os.environ["FSDP_VERSION"] = "2"  # as `accelerate launch` does; the Trainer of transformers 4.57 reads nothing else
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            parallelism_config=ParallelismConfig(cp_size=CP, dp_shard_size=dist.get_world_size() // CP),
            fsdp=True,
            per_device_train_batch_size=1,
            max_steps=3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        if arguments.device.type == "cpu":  # accelerate shards parameters on accelerators only: the CPU passes for one
            PartialState().distributed_type = DistributedType.MULTI_GPU
        samples = [packed(index) for index in range(dist.get_world_size() // CP)]  # a step sees all of them
        trainer = Trainer(model=model_with("cpflex"), args=arguments, train_dataset=samples)
        trainer.train()
    first = trainer.state.log_history[0]["loss"]
    if dist.get_rank() == 0:
        print(f"first step: loss {first:.6f}, difference to one rank {first - loss_on_one_rank(samples):.1e}")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    dist.destroy_process_group()
