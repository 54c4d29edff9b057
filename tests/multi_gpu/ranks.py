"""One rank under torchrun: scenarios one after the other, and how each ended, in a file of the rank.

torchrun --standalone --nproc-per-node 2 tests/multi_gpu/ranks.py cuda:nccl FOLDER zoo_sample idle_ranks
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).parents[1]))

from scenarios import LAST, SAFE

TIMEOUT = timedelta(seconds=120)


def main(backend: str, folder: str, *names: str) -> None:
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if "nccl" in backend else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    dist.init_process_group(backend, timeout=TIMEOUT)

    def make_group() -> dist.ProcessGroup:
        return dist.new_group(list(range(dist.get_world_size())), backend=backend, timeout=TIMEOUT)

    ended: dict[str, str] = {}
    for name in names:
        torch.manual_seed(rank)
        try:
            (SAFE | LAST)[name](make_group, device)
            ended[name] = "passed"
        except Exception:  # noqa: BLE001 - reported to the test
            ended[name] = traceback.format_exc()
        Path(folder, f"rank{rank}.json").write_text(json.dumps(ended))
    # without goodbyes: a device may be stopped, and others may be gone
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
