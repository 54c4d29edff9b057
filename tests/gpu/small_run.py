"""Small attentions, forward and backward, for tools that watch each memory access: ``compute-sanitizer python small_run.py``."""

import torch

import cpflex

for dim, dtype in ((64, torch.bfloat16), (80, torch.float16), (24, torch.float32)):
    plan = cpflex.make_plan(cpflex.document(cu_seqlens=[0, 100, 333]) & cpflex.causal(), 333)
    q = torch.randn(1, 2, plan.local_len, dim, device="cuda", dtype=dtype, requires_grad=True)
    cpflex.flex_attention(q, q, q, None, plan, kernel_options={"backend": "triton"}).sum().backward()  # type: ignore[union-attr]
torch.cuda.synchronize()
