"""A sample of the zoo on real gloo processes, and on groups whose ranks are not the job's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from cases import FACTORS, Problem, whole_product
from oracle import assert_within_budget
from processes import RankProcesses
from runs import assemble, attend_on_rank

SAMPLE = [
    Problem("causal", "none", 321, "gqa", "d16dv24", "fp32", "zigzag", "ring"),
    Problem("full", "alibi", 127, "mha", "d16", "bf16", "contiguous", "ring"),
    Problem("doc_sliding_causal", "temperature", 1000, "mqa", "d24", "fp32", "contiguous", "direct"),
    Problem("prefix_lm_per_document", "relative_bias", 300, "gqa", "d16", "bf16", "striped", "direct"),
    Problem("eviction", "key_bias", 1000, "mha", "d24", "fp32", "striped", "ring"),
    Problem("padding", "softcap", 127, "gqa", "d16dv24", "fp16", "zigzag", "auto"),
    Problem("window_per_head", "gelu", 300, "mqa", "d16", "fp32", "balanced", "auto"),
    Problem("doc_per_batch", "detach", 1000, "mha", "d16dv24", "bf16", "balanced", "direct"),
    Problem("block_diffusion", "log_position", 5, "gqa", "d24", "fp32", "zigzag", "ring"),
    Problem("nothing", "relative_bias", 321, "mha", "d16", "fp32", "contiguous", "auto"),
    Problem("two_sided", "none", 1, "mha", "d16", "fp32", "contiguous", "direct"),
    Problem("doc_causal", "relative_bias", 1000, "gqa", "d16dv24", "bf16", "balanced", "even:3"),
    Problem("full", "none", 321, "mha", "d24", "fp32", "zigzag", "ring:both"),
]
PLANS = ("mask", "layout", "schedule", "world_size")
WHOLE = [
    Problem(**row)
    for row in whole_product(
        {name: FACTORS[name] for name in PLANS} | {"world_size": [1, 2, 4]},
        {name: values for name, values in FACTORS.items() if name not in PLANS},
    )
]


@pytest.mark.parametrize("processes", [2, 4], indirect=True)
@pytest.mark.parametrize("problem", SAMPLE, ids=str)
def test_processes_compute_what_one_dense_attention_does(problem: Problem, processes: RankProcesses):
    results = processes.run(attend_on_rank, problem)
    assert_within_budget(assemble(results), problem.dense(torch.float32), problem.dense())


def attend_alone(group: dist.ProcessGroup, problem: Problem) -> dict[str, Any]:
    """In a gloo group of one rank."""
    alone = [dist.new_group([rank]) for rank in range(group.size())][group.rank()]
    try:
        return attend_on_rank(alone, problem)
    finally:
        dist.destroy_process_group(alone)


@pytest.mark.slow
@pytest.mark.parametrize("problem", WHOLE, ids=str)
def test_every_mask_in_every_layout_and_schedule_on_processes(problem: Problem, request: pytest.FixtureRequest):
    processes: RankProcesses = request.getfixturevalue("four_processes" if problem.world_size == 4 else "two_processes")
    if problem.world_size == 1:
        results = processes.run(attend_alone, problem)[:1]
    else:
        results = processes.run(attend_on_rank, problem)
    assert_within_budget(assemble(results), problem.dense(torch.float32), problem.dense())


def attend_on_mesh(group: dist.ProcessGroup, problem: Problem, dim: str, as_group: bool) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))[dim]
    return attend_on_rank(mesh.get_group() if as_group else mesh, problem)


@pytest.mark.parametrize("as_group", [False, True], ids=["mesh", "group"])
@pytest.mark.parametrize("dim", ["dp", "cp"])
def test_a_dim_of_a_mesh_is_a_group_of_its_own(dim: str, as_group: bool, four_processes: RankProcesses):
    problem = Problem("doc_causal", "relative_bias", 300)
    results = four_processes.run(attend_on_mesh, problem, dim, as_group)
    groups = [(0, 1), (2, 3)] if dim == "cp" else [(0, 2), (1, 3)]
    for members in groups:
        whole = assemble([results[rank] for rank in members])
        assert_within_budget(whole, problem.dense(torch.float32), problem.dense())
