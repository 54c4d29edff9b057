"""T5Gemma, unmodified: an encoder and a decoder that attends to it, both sequences shared, equal to one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pages import names_of
from processes import RankProcesses

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.hf,
    pytest.mark.skipif(
        int(transformers.__version__.split(".")[0]) < 5, reason="masks by layer type are given to both halves since 5"
    ),
]
BATCH, SOURCE, TARGET, VOCAB, WINDOW = 2, 150, 70, 61, 20


def model_of(attention: str) -> nn.Module:
    from transformers import T5GemmaConfig, T5GemmaForConditionalGeneration, T5GemmaModuleConfig

    part: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    part |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8}
    part |= {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": WINDOW}
    part |= {"attn_logit_softcapping": 20.0}
    part |= {"attention_dropout": 0.0, "dropout_rate": 0.0}
    halves = {half: T5GemmaModuleConfig(**part) for half in ("encoder", "decoder")}
    config = T5GemmaConfig(**halves, dropout_rate=0.0, vocab_size=VOCAB)
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = T5GemmaForConditionalGeneration(config).train()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=random)
            parameter.copy_((0.1 if parameter.ndim == 1 else 0.15) * noise)
    return model


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Source, target and labels."""
    random = torch.Generator().manual_seed(3)
    source, target, labels = (torch.randint(3, VOCAB, (BATCH, n), generator=random) for n in (SOURCE, TARGET, TARGET))
    return source, target, labels


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def on_rank(group: Any) -> tuple[float, dict[str, Tensor]]:
    """As the page about two lengths says."""
    from cpflex.integrations.transformers import PlanMask

    page = names_of("cross-attention.md")
    model = model_of("cpflex")
    source, target, labels = batch()
    encoder, decoder = page["t5gemma_plans"](WINDOW, SOURCE, TARGET, group)
    assert PlanMask(decoder["cross"]).shape == (1, 1, TARGET, SOURCE)
    logits = page["t5gemma_logits"](model, source, target, encoder, decoder)
    share = loss_of(logits, decoder.shard(labels, dim=1, pad_value=-100))
    share.backward()
    return float(share.detach()), gradients(model)


def test_t5gemma_on_ranks_is_one_process(two_processes: RankProcesses):
    model: Any = model_of("eager")
    source, target, labels = batch()
    masks = {"attention_mask": torch.ones_like(source), "decoder_attention_mask": torch.ones_like(target)}
    loss = loss_of(model(input_ids=source, decoder_input_ids=target, **masks, use_cache=False).logits, labels)
    loss.backward()
    results = two_processes.run(on_rank)
    assert sum(share for share, _ in results) == pytest.approx(float(loss.detach()), rel=1e-6)
    for name, expected in gradients(model).items():
        found = torch.stack([grads[name] for _, grads in results if name in grads]).sum(dim=0)
        error = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
        assert error < 1e-5, f"{name}: {error:.1e}"
