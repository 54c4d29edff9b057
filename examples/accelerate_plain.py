"""accelerate and a loop of your own: a streamed set, rows of unlike lengths, a last batch with fewer rows.

    torchrun --nproc-per-node 2 examples/accelerate_plain.py         one batch at a time, over both ranks
    torchrun --nproc-per-node 4 examples/accelerate_plain.py         two batches at a time, two ranks each

Prints the loss of each step, and how far it is from that of one process with transformers' own attention.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DataLoaderConfiguration, DistributedType, FullyShardedDataParallelPlugin
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoModelForCausalLM, MistralConfig

from cpflex.integrations.accelerate import attach
from cpflex.integrations.transformers import plan_for, shard_batch
from cpflex.loss import IGNORE_INDEX, num_labels

VOCAB, CP, BATCH_SIZE = 64, 2, 2
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "sliding_window": 50}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[torch.Tensor]:
        random = torch.Generator().manual_seed(0)  # the ranks of a sequence go through the same rows
        for _ in range(9):
            yield torch.randint(VOCAB, (int(torch.randint(40, 200, (), generator=random)),), generator=random)


def padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    tokens, mask = (pad_sequence(x, batch_first=True) for x in (rows, [torch.ones_like(row) for row in rows]))
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, IGNORE_INDEX)}


def made(attention: str, rows: int, drop_last: bool) -> tuple[torch.nn.Module, torch.optim.Optimizer, DataLoader]:
    torch.manual_seed(0)
    config = MistralConfig(vocab_size=VOCAB, **SHAPE, **HEADS)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    loader = DataLoader(Stream(), rows, collate_fn=padded, drop_last=drop_last)
    return model, torch.optim.SGD(model.parameters(), lr=0.05), loader


def main(group: dist.ProcessGroup) -> None:
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU  # here the CPU passes for an accelerator
    accelerator = Accelerator(
        cpu=True,
        parallelism_config=ParallelismConfig(cp_size=CP, dp_shard_size=group.size() // CP),
        fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap"),
        dataloader_config=DataLoaderConfiguration(dispatch_batches=False),  # each rank reads its rows by itself
    )
    shares, data_ranks = attach(accelerator), group.size() // CP
    drop_last = data_ranks > 1  # for several data ranks, accelerate would complete the last batch with the first rows
    model, optimizer, loader = accelerator.prepare(*made("cpflex", BATCH_SIZE, drop_last))
    one_model, one_optimizer, one_loader = made("sdpa", BATCH_SIZE * data_ranks, drop_last)
    for batch, whole in zip(loader, one_loader, strict=True):
        plan = plan_for(model.config, shares.cp, attention_mask=batch["attention_mask"].cpu())
        local = shard_batch(batch, plan)
        local["num_items_in_batch"] = num_labels(local["shift_labels"], shares.mean)
        share, expected = model(**local).loss, one_model(**whole).loss  # the ranks' shares sum to the loss
        accelerator.backward(share * shares.averaged_over)
        expected.backward()
        for one in (optimizer, one_optimizer):
            one.step()
            one.zero_grad()
        dist.all_reduce(loss := share.detach(), group=group)
        if group.rank() == 0:
            print(f"{len(whole['labels'])} rows: loss {loss:.6f}, difference to one rank {loss - expected:.1e}")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(dist.group.WORLD)
    dist.destroy_process_group()
