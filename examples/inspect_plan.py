"""Look at a plan before there are any GPUs: planning needs no process group, and any rank of any job can be planned.

    python examples/inspect_plan.py

Prints the plan of one rank of 16 in words, and what the four layouts cost for the layers of a hybrid model.
"""

import pickle

import torch

import cpflex

SEQ_LEN, RANKS, WINDOW = 131072, 16, 4096


def documents() -> torch.Tensor:
    """Lengths as they come: many short ones, a few long ones."""
    random = torch.Generator().manual_seed(0)
    lengths = torch.randn(400, generator=random).mul(1.4).add(6.5).exp().long().clamp(16, 65536)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return torch.cat([starts[starts < SEQ_LEN], torch.tensor([SEQ_LEN])])


def main() -> None:
    full = cpflex.causal() & cpflex.document(cu_seqlens=documents())
    kinds = {"full": full, "sliding": full & cpflex.sliding_window(WINDOW)}
    where = {"weights": {"full": 8, "sliding": 24}, "rank": 3, "world_size": RANKS}
    plan = cpflex.make_plan(kinds, SEQ_LEN, **where)
    print(plan.explain())

    print(f"\n{'layout':12}{'work, most / mean':>24}{'K/V received by the worst rank, of an all-gather':>52}")
    for layout in (cpflex.contiguous, cpflex.zigzag, cpflex.striped, cpflex.balanced):
        stats = cpflex.make_plan(kinds, SEQ_LEN, layout=layout, **where).stats
        work = "  ".join(f"{kind} {stats[kind]['imbalance']:.2f}" for kind in kinds)
        received = {kind: max(stats[kind]["needed_tokens"]) / stats[kind]["all_gather_tokens"] for kind in kinds}
        print(f"{layout.__name__:12}{work:>24}{'  '.join(f'{k} {share:.0%}' for k, share in received.items()):>52}")

    size = len(pickle.dumps(plan))
    print(
        f"\npickled, as a data loader's worker would send it: {size / 1e6:.2f} MB; plan.bind(group) makes it callable"
    )


if __name__ == "__main__":
    main()
