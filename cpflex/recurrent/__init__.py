"""Recurrent layers over a sharded sequence: ranks exchange the states of the recurrence, not its tokens.

Any layout will do: each rank computes its fragments, the runs of consecutive tokens that it holds (`Plan.fragments`).
What a fragment does to the state that enters it is a linear map, ``state_out = M state_in + h``; the ranks gather these
summaries, compose them, and each finishes its tokens from the states that really enter its fragments. (State passing
of Mamba-2, Dao and Gu, arXiv:2405.21060, section 8; gathered as in LASP-2, Sun et al., arXiv:2502.07563.)

>>> plan = cpflex.make_plan(masks, seq_len, mesh["cp"])
>>> chain = make_chain(plan, position_ids=position_ids)                       # once per batch; pure
>>> x = causal_conv1d(x, weight, bias, chain, activation="silu")              # [B, C, S_local]
>>> out = gated_delta_rule(q, k, v, g, beta, chain, use_qk_l2norm=True)       # [B, S_local, H, Dv]
>>> y = ssd(x, dt, A, B, C, chain, D=D)                                       # [B, S_local, H, P]
"""

from cpflex.recurrent.chain import Chain, make_chain
from cpflex.recurrent.convolution import causal_conv1d
from cpflex.recurrent.delta_rule import gated_delta_rule
from cpflex.recurrent.state_space import ssd

__all__ = ["Chain", "causal_conv1d", "gated_delta_rule", "make_chain", "ssd"]
