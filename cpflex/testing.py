"""Ranks as threads: a whole group in one process, through the same loops, to test and to debug (a breakpoint stops
every rank).

>>> def attention(group):
...     plan = cpflex.make_plan(cpflex.causal(), seq_len=len(tokens), group=group)
...     return plan.unshard(cpflex.flex_attention(*(plan.shard(x, dim=2) for x in (q, k, v)), block_mask=plan), dim=2)
>>> outs = cpflex.testing.run_ranks(attention, world_size=4)
"""

from cpflex.links.threads import ThreadLinks, run_ranks

__all__ = ["ThreadLinks", "run_ranks"]
