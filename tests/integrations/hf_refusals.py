"""What is refused, by name, before anything is exchanged: how to ask for it, and what is said."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from hf_models import ARCHITECTURES, VOCAB
from hf_runs import ROWS, SEQ_LEN, TOKENS
from torch import Tensor

from cpflex.integrations.transformers import ModelPlan, attention_forward, plan_for, shard_batch
from cpflex.trees import Tree


def attend(plan: ModelPlan, q_len: int | None = None, **arguments: Any) -> Tensor:
    q, k, v = (torch.randn(2, plan.plan.local_len, heads, 8).transpose(1, 2) for heads in (4, 2, 2))
    q = q[:, :, :q_len]
    out, weights = attention_forward(
        torch.nn.Module(), q, k, v, plan.attention_mask, 0.3, **{"dropout": 0.0} | arguments
    )
    assert weights is None
    return out


def small_plan(name: str = "llama", **changes: Any) -> ModelPlan:
    return plan_for(ARCHITECTURES[name].config(**changes), seq_len=SEQ_LEN)


def run_model(name: str = "llama", plan: Any = None, **arguments: Any) -> Any:
    model = ARCHITECTURES[name].model("cpflex")
    batch = shard_batch(TOKENS["one document"].batch(), plan or small_plan(name))
    return model(**batch | arguments)


def with_dropout() -> None:
    model = ARCHITECTURES["llama"].model("cpflex", attention_dropout=0.1)
    model(**shard_batch(TOKENS["one document"].batch(), small_plan()))


def swapped() -> Any:
    plan = small_plan("gemma2")
    return {"full_attention": plan["sliding_attention"], "sliding_attention": plan["full_attention"]}


TREE = Tree([-1, 0, 0], [40, 30, 13])


def tree_plan(name: str = "llama", **arguments: Any) -> ModelPlan:
    return plan_for(ARCHITECTURES[name].config(), tree=TREE, **arguments)


def shard_a_tree(**batch: Any) -> Any:
    return shard_batch({"input_ids": TOKENS["one document"].batch()["input_ids"][:1]} | batch, tree_plan())


def rank_sequences_of_a_tree() -> Any:
    model = transformers.LlamaForSequenceClassification(ARCHITECTURES["llama"].config())
    return shard_batch({"input_ids": TOKENS["one document"].batch()["input_ids"][:1]}, tree_plan(), model)


REFUSALS = {
    "attention dropout": (with_dropout, NotImplementedError, "dropout"),
    "no plan": (lambda: run_model(attention_mask=None), ValueError, "pass the plan as attention_mask"),
    "a 2-D mask of local tokens": (
        lambda: run_model(attention_mask=torch.ones(2, 96)),
        ValueError,
        "pass the plan as attention_mask",
    ),
    "a 4-D mask": (
        lambda: run_model(attention_mask=torch.zeros(1, 1, SEQ_LEN, SEQ_LEN)),
        TypeError,
        "attention_mask must be the plan",
    ),
    "a 4-D mask to plan for": (
        lambda: plan_for(ARCHITECTURES["llama"].config(), attention_mask=torch.ones(1, 1, 9, 9)),
        NotImplementedError,
        "and_mask_function",
    ),
    "documents in an attention mask": (
        lambda: plan_for(ARCHITECTURES["llama"].config(), attention_mask=torch.tensor([[1, 1, 2, 2]])),
        NotImplementedError,
        "doc_ids",
    ),
    "a KV cache": (lambda: attend(small_plan(), use_cache=True), NotImplementedError, "use_cache=False"),
    "decoding": (lambda: attend(small_plan(), q_len=1), NotImplementedError, "no KV cache"),
    "attention weights": (
        lambda: attend(small_plan(), output_attentions=True),
        NotImplementedError,
        "output_attentions",
    ),
    "a position bias": (
        lambda: attend(small_plan(), position_bias=torch.zeros(1)),
        NotImplementedError,
        "position_bias",
    ),
    "logits of the last tokens alone": (
        lambda: attend(small_plan(), logits_to_keep=1),
        NotImplementedError,
        "logits_to_keep",
    ),
    "a mask cut to the last tokens": (
        lambda: small_plan().attention_mask[:, :, slice(-1, None), :],
        NotImplementedError,
        "logits_to_keep=0",
    ),
    "bidirectional layers": (lambda: attend(small_plan(), is_causal=False), NotImplementedError, "is_causal"),
    "lengths of flash attention": (
        lambda: run_model(cu_seq_lens_q=torch.tensor([0, 83])),
        NotImplementedError,
        "cu_seq_lens_q",
    ),
    "the plan of another kind of layer": (
        lambda: run_model("gemma2", attention_mask=swapped()),
        ValueError,
        "it was given the plan of",
    ),
    "a full plan for all layers": (
        lambda: run_model("gemma2", attention_mask=small_plan("gemma2")["full_attention"]),
        ValueError,
        "layer 0 is of type 'sliding_attention'",
    ),
    "a plan of another window": (
        lambda: run_model("mistral", small_plan("mistral", sliding_window=5)),
        ValueError,
        "has sliding_window=13; its plan has 5",
    ),
    "the load balancing loss of experts": (
        lambda: small_plan("gpt_oss", output_router_logits=True),
        NotImplementedError,
        "output_router_logits",
    ),
    "the load balancing loss, asked for in the call": (
        lambda: run_model("mixtral", output_router_logits=True),
        NotImplementedError,
        "output_router_logits",
    ),
    "bidirectional models": (
        lambda: small_plan("gemma3_text", use_bidirectional_attention=True),
        NotImplementedError,
        "bidirectional",
    ),
    "linear attention layers": (
        lambda: small_plan("qwen2", layer_types=["full_attention", "linear_attention", "full_attention"]),
        NotImplementedError,
        "linear_attention",
    ),
    "images without the model that encodes them": (
        lambda: shard_batch(TOKENS["one document"].batch() | {"pixel_values": torch.zeros(1)}, small_plan()),
        ValueError,
        r"shard_batch\(batch, plan, model\)",
    ),
    "models of images that nobody compared": (
        lambda: plan_for(transformers.Blip2Config(), seq_len=9),
        NotImplementedError,
        "more than text",
    ),
    "models nobody compared": (lambda: plan_for(other_config(), seq_len=9), NotImplementedError, "verified_only=False"),
    "encoders": (
        lambda: plan_for(transformers.BertConfig(), seq_len=9, verified_only=False),
        NotImplementedError,
        "is_decoder=True",
    ),
    "an encoder and a decoder": (
        lambda: plan_for(transformers.T5Config(), seq_len=9, verified_only=False),
        NotImplementedError,
        "an encoder and a decoder",
    ),
    "recurrent models": (
        lambda: plan_for(transformers.RwkvConfig(), seq_len=9, verified_only=False),
        NotImplementedError,
        "recurrent layers",
    ),
    "models whose attention cannot be replaced": (
        lambda: plan_for(transformers.GPTNeoConfig(), seq_len=9, verified_only=False),
        NotImplementedError,
        "attention that its class computes by itself",
    ),
    "ALiBi models that were not prepared": (
        lambda: plan_for(transformers.BloomConfig(), seq_len=9, verified_only=False),
        NotImplementedError,
        "replace_attention",
    ),
    "models that the table found to differ": (
        lambda: plan_for(transformers.RobertaConfig(is_decoder=True), seq_len=9, verified_only=False),
        NotImplementedError,
        "not supported with context parallelism",
    ),
    "padding on the left, where positions leave it out": (
        lambda: plan_for(transformers.OPTConfig(), attention_mask=torch.tensor([[0, 1, 1]]), verified_only=False),
        NotImplementedError,
        "pad on the right",
    ),
    "a loss of more than labels": (
        lambda: small_plan(z_loss_coefficient=0.1),
        NotImplementedError,
        "z_loss_coefficient=0.1",
    ),
    "several descriptions": (
        lambda: plan_for(ARCHITECTURES["llama"].config(), seq_len=9, lengths=[9]),
        ValueError,
        "exactly one of",
    ),
    "lengths that fall": (
        lambda: plan_for(ARCHITECTURES["llama"].config(), cu_seqlens=[0, 9, 3]),
        ValueError,
        "cu_seqlens",
    ),
    "a tree that is none": (
        lambda: plan_for(ARCHITECTURES["llama"].config(), tree=[-1, 0]),
        ValueError,
        r"must be a cpflex\.trees\.Tree",
    ),
    "a tree and documents": (lambda: tree_plan(lengths=[83]), ValueError, "exactly one of"),
    "models of positions in three dimensions on a tree": (
        lambda: plan_for(transformers.Qwen2_5_VLConfig(), tree=TREE, verified_only=False),
        NotImplementedError,
        "more than text",
    ),
    "functions of pairs on a tree": (
        lambda: tree_plan(or_mask_function=lambda b, h, q, k: q == k),
        NotImplementedError,
        "or_mask_function.*on a tree",
    ),
    "images on a tree, in its masks": (
        lambda: tree_plan(token_type_ids=torch.ones(1, SEQ_LEN, dtype=torch.int64)),
        NotImplementedError,
        "images are not supported on a tree",
    ),
    "images on a tree": (
        lambda: shard_a_tree(pixel_values=torch.zeros(1)),
        NotImplementedError,
        "images are not supported on a tree",
    ),
    "positions of time, height and width on a tree": (
        lambda: tree_plan(position_ids=torch.zeros(4, 1, SEQ_LEN, dtype=torch.int64)),
        NotImplementedError,
        "time, height and width",
    ),
    "positions that do not count along a tree": (
        lambda: tree_plan(position_ids=torch.arange(SEQ_LEN)),
        ValueError,
        "counting on along each path",
    ),
    "positions of another plan of a tree": (
        lambda: shard_a_tree(position_ids=TREE.depths[None] + 3),
        ValueError,
        "begin elsewhere than the plan's",
    ),
    "labels of a tree": (
        lambda: shard_a_tree(labels=torch.zeros(1, SEQ_LEN, dtype=torch.int64)),
        NotImplementedError,
        r"packed\.shard\(plan\.plan\)\.log_probs",
    ),
    "a head that pools a tree": (rank_sequences_of_a_tree, NotImplementedError, "ForSequenceClassification.*on a tree"),
    "positions of other documents": (
        lambda: shard_batch(TOKENS["one document"].batch() | {"position_ids": ROWS}, small_plan()),
        ValueError,
        "pack other documents",
    ),
    "padding of another batch": (
        lambda: shard_batch(
            TOKENS["one document"].batch() | {"attention_mask": TOKENS["padded left"].planned["attention_mask"]},
            small_plan(),
        ),
        ValueError,
        "not that of the plan",
    ),
    "tensors that nobody shards": (
        lambda: shard_batch(TOKENS["one document"].batch() | {"token_type_ids": ROWS}, small_plan()),
        ValueError,
        "token_type_ids",
    ),
    "a sharded batch": (
        lambda: shard_batch({"input_ids": torch.zeros(1, 20, dtype=torch.int64)}, small_plan()),
        ValueError,
        "83 tokens",
    ),
}


def other_config() -> Any:
    class OwnConfig(transformers.LlamaConfig):
        model_type = "own"

    return OwnConfig(vocab_size=VOCAB)
