"""Lightning: a LightningModule over data and context parallelism, an unmodified Hugging Face model, FSDP2, clipping.

    torchrun --nproc-per-node 2 examples/lightning_module.py         one batch at a time, over both ranks
    torchrun --nproc-per-node 4 examples/lightning_module.py         two batches at a time, two ranks each

Prints the loss of each step, and how far it is from that of one process with transformers' own attention.
"""

import os

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM, MistralConfig

from cpflex.integrations.transformers import plan_for, shard_batch
from cpflex.loss import num_labels

VOCAB, SEQ_LEN, CP, CLIP = 64, 300, 2, 2.0
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "sliding_window": 50, "initializer_range": 0.3}
ROWS = torch.randint(VOCAB, (6, SEQ_LEN), generator=torch.Generator().manual_seed(0))


def model_with(attention: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MistralConfig(vocab_size=VOCAB, **SIZES), attn_implementation=attention)


class Module(lightning.LightningModule):
    def configure_model(self) -> None:
        self.model, self.losses = model_with("cpflex"), []
        self.dp, self.cp = (self.device_mesh[dim] for dim in ("data_parallel", "tensor_parallel"))  # Lightning's names
        self.mean = self.device_mesh._flatten("dp_cp")
        for module in (*self.model.model.layers, self.model):
            fully_shard(module, mesh=self.mean)

    def train_dataloader(self) -> DataLoader:
        # the same rows for all ranks of a sequence; Lightning's own sampler for DDP gives each of them others
        sampler = DistributedSampler(ROWS, self.dp.size(), self.dp.get_local_rank(), shuffle=False)
        return DataLoader(ROWS, sampler=sampler)

    def training_step(self, tokens: Tensor, index: int) -> Tensor:
        plan = plan_for(self.model.config, self.cp, seq_len=SEQ_LEN)
        local = shard_batch({"input_ids": tokens, "labels": tokens}, plan)
        local["num_items_in_batch"] = num_labels(local["shift_labels"], self.mean)
        share = self.model(**local).loss  # the ranks' shares sum to the loss
        dist.all_reduce(loss := share.detach().clone())
        self.losses.append(loss.item())
        return share * self.mean.size()  # FSDP averages gradients

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main() -> None:
    dp = int(os.environ["WORLD_SIZE"]) // CP
    run = {"accelerator": "cpu", "devices": dp * CP, "max_epochs": 1, "gradient_clip_val": CLIP}
    silent = dict.fromkeys(("logger", "enable_checkpointing", "use_distributed_sampler"), False)
    trainer = lightning.Trainer(strategy=ModelParallelStrategy(dp, CP), **run, **silent)
    trainer.fit(module := Module())
    model = model_with("sdpa")  # the same steps, on each rank alone
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for tokens, loss in zip(ROWS.split(dp), module.losses, strict=True):
        expected = model(input_ids=tokens, labels=tokens).loss
        if trainer.is_global_zero:
            print(f"loss {loss:.6f}, difference to one rank {loss - expected:.1e}")
        expected.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
