"""Heads: what a model makes of its hidden states, and how much of the sequence that takes.

A language model's head looks at each token alone, and takes the number of labels: it runs on this rank's tokens. A head
that pools a token, or averages over the tokens it sees, must see all of them. It does: the body of such a model runs on
this rank's tokens, the scores of the last linear layer, a few numbers a token, are gathered in order, and the rest of
the unmodified class sees what it sees in one process.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cpflex import Plan
from cpflex.integrations.transformers.attention import plan_mask_in
from cpflex.integrations.transformers.classes import causal_lm_class

# B batch, S tokens of the whole sequence, S_local of this rank, E hidden size, N scores of a token

LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
WHOLE = {
    "ForTokenClassification": ("labels",),
    "ForSequenceClassification": ("labels",),
    "ForQuestionAnswering": ("start_positions", "end_positions"),
}
"""Heads that see the whole sequence, and what they take besides the tokens."""
POOLING = ("ForSequenceClassification", "ForQuestionAnswering")
"""Heads that come to one result for a row, whatever documents are in it."""
SCORES = ("score", "classifier", "qa_outputs")
"""Names of the last linear layer of these heads."""


def unwrapped(model: Any) -> Any:
    """The model of transformers inside DDP, `torch.compile` and PEFT."""
    if isinstance(model, DistributedDataParallel):
        return unwrapped(model.module)
    if isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
        return unwrapped(compiled)
    if (base_model := getattr(model, "get_base_model", None)) is not None:  # of PEFT
        return unwrapped(base_model())
    return model


def head_of(model: Any) -> str | None:
    """How the name of the model's class ends: in one of `LANGUAGE_MODELS` or `WHOLE`. None of a body without a head.

    Raises:
        NotImplementedError: another head.
    """
    model = unwrapped(model)
    for base in type(model).__mro__:
        for known in (*LANGUAGE_MODELS, *WHOLE):
            if base.__name__.endswith(known):
                return known
    if type(model) is causal_lm_class(model.config):  # type: ignore[arg-type]
        return "ForCausalLM"  # whatever it is called
    if getattr(model, "base_model", None) is model:
        return None
    raise NotImplementedError(
        f"the head of {type(model).__name__} is not known: it may mix tokens of several ranks; known are "
        f"{[*LANGUAGE_MODELS, *WHOLE]} - shard the batch for the body, model.base_model, and compute the rest from "
        "plan.plan.unshard(hidden_states, dim=1)"
    )


class WholeSequence:
    """Hooks of a model: its body sees this rank's tokens, its head those of all.

    The loss, which every rank computes from all tokens, is divided by the number of ranks: their losses sum to it. The
    gradient of the scores is summed over the ranks, so what a user computes from the logits, on every rank, is
    differentiated as the sum of what the ranks make of it.
    """

    def __init__(self, model: nn.Module, scores: nn.Module) -> None:
        self.scores = scores
        self.plan: Plan | None = None
        self.num_ranks = 1
        body: Any = model.base_model
        self._handles = [
            body.register_forward_pre_hook(self._shard, with_kwargs=True),
            scores.register_forward_hook(self._gather),
            model.register_forward_hook(self._share),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _shard(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Of ``input_ids`` [B, S] or ``inputs_embeds`` [B, S, E], before the body."""
        mask = plan_mask_in(kwargs)
        if mask is None:
            return None  # another attention, of the whole sequence
        self.plan, self.num_ranks = mask.plan, mask.plan.world_size
        tokens = {name: x for name in ("input_ids", "inputs_embeds") if (x := kwargs.get(name)) is not None}
        local = {name: mask.plan.shard(x, dim=1, pad_value=0) for name, x in tokens.items()}
        if args and args[0] is not None:
            args = (mask.plan.shard(args[0], dim=1, pad_value=0), *args[1:])
        return args, kwargs | local

    def _gather(self, scores: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Scores of this rank's tokens [B, S_local, N], to those of all [B, S, N]."""
        plan, self.plan = self.plan, None
        if plan is None:
            return None
        if output.ndim != 3 or output.shape[1] != plan.local_len:
            raise NotImplementedError(f"a head that pools before it scores, to shape {tuple(output.shape)}")
        return plan.unshard(output, dim=1)

    def _share(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """A loss that all ranks know, to this rank's share of it."""
        if self.plan is not None:
            self.plan = None
            raise NotImplementedError(f"{type(model).__name__} did not use its layer of scores, {SCORES}")
        ranks, self.num_ranks = self.num_ranks, 1
        if isinstance(output, tuple):
            raise NotImplementedError("return_dict=False: what is a loss and what not can be told in a dict only")
        if output.get("loss") is not None:
            output["loss"] = output["loss"] / ranks
        return output


def see_whole_sequence(model: Any) -> None:
    """Give a model with a head of `WHOLE` its hooks, once."""
    model = unwrapped(model)
    named = [layer for name in SCORES if isinstance(layer := getattr(model, name, None), nn.Module)]
    if len(named) != 1:
        raise NotImplementedError(f"{type(model).__name__}: one of {SCORES} must be its last linear layer")
    hooks = getattr(model, "_cpflex_head", None)
    if hooks is not None and hooks.scores is named[0]:
        return
    if hooks is not None:  # PEFT has put its own layer in the place of the scores since
        hooks.remove()
    model._cpflex_head = WholeSequence(model, named[0])
