"""Small attentions, forward and backward, and of pages, for tools that watch each memory access: ``compute-sanitizer python small_run.py``."""

import torch

import cpflex

for dim, dtype in ((64, torch.bfloat16), (80, torch.float16), (24, torch.float32)):
    plan = cpflex.make_plan(cpflex.document(cu_seqlens=[0, 100, 333]) & cpflex.causal(), 333)
    q = torch.randn(1, 2, plan.local_len, dim, device="cuda", dtype=dtype, requires_grad=True)
    cpflex.flex_attention(q, q, q, None, plan, kernel_options={"backend": "triton"}).sum().backward()  # type: ignore[union-attr]
    pages = cpflex.Pages(8, page_size=16)
    pages.reserve("a", 70)
    pages.fill("a", 61)
    plan = cpflex.make_decode_plan(cpflex.causal(), pages, {"a": 3}, splits=2)
    pool = pages.pool(2, dim, dtype=dtype, device="cuda")
    q, k = (torch.randn(1, heads, 3, dim, device="cuda", dtype=dtype) for heads in (4, 2))
    for _ in range(3):
        pool.assign(k, k, plan)
        cpflex.flex_attention(q, pool.k, pool.v, None, plan, enable_gqa=True, kernel_options={"backend": "triton"})
        plan.advance()
torch.cuda.synchronize()
