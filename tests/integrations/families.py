"""The generated table: loss and all gradients of every causal language model family, on ranks and in one process.

python tests/integrations/families.py                    all families, and what came out
python tests/integrations/families.py --only llama opt    these alone
python tests/integrations/families.py --write            and write families.json, verified.py and docs/support-matrix.md

The truth is transformers' eager attention in one process, each document by itself, without cpflex; its own error is
known from the same in fp64.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from family_configs import VOCAB, config_of, default_config, model_class_name, model_of, model_types
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cpflex.integrations.transformers import attach_recurrent, classes, exchanged, gathered, plan_for, shard_batch
from cpflex.integrations.transformers.alibi import IMPLEMENTATION, REPLACED
from cpflex.integrations.transformers.masks import layer_types, recurrent_types

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).parent / "families.json"
VERIFIED_FILE = ROOT / "cpflex" / "integrations" / "transformers" / "verified.py"
SEQ_LEN = 83
KINDS = {"one document": (2, (SEQ_LEN,)), "packed": (1, (31, 1, 40, 11))}
"""Rows, and lengths of the documents in each."""

COUNTS_THE_WHOLE = {"llama4", "llama4_text"}
"""Families whose attention depends on the index in the whole sequence, packed or not: the truth is computed packed."""

TOLERANCE = 1e-5
TIMES = 3
"""The bar, where eager attention in fp32 is less exact than `TOLERANCE`: so many times its error against fp64."""
MOST = 1e-3
VANISHES = 1e-6

REASONS = {
    "doge": "a mask that its layers make of the values of the local tokens",
    "moshi": "sliding_window in its config, which its masks leave out",
    **dict.fromkeys(
        ("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
        "positions that begin at pad_token_id + 1, not at 0",
    ),
}
"""Of families that differ from one process, why."""

KNOWN = {
    "blt": "patches, which it makes of the local tokens",
    "git": "a loss that expects an image",
}
"""Families that nobody makes small, but whose class says enough."""

EQUAL = ("exact", "derived")

LossAndGradients = tuple[float, dict[str, Tensor]]


def tokens_of(kind: str) -> Tensor:  # [B, S]
    rows, _ = KINDS[kind]
    return torch.randint(3, VOCAB, (rows, SEQ_LEN), generator=torch.Generator().manual_seed(0))


def one_process(model_type: str, kind: str, in_double: bool = False) -> LossAndGradients:
    """Each document by itself, in fp32 or wholly in fp64."""
    model = model_of(model_type, "eager")
    rows, lengths = KINDS[kind]
    documents = [ids[None] for row in tokens_of(kind) for ids in row.split(lengths) if len(ids) > 1]
    extra: dict[str, Any] = {}
    if model_type in COUNTS_THE_WHOLE and rows == 1:
        documents = [tokens_of(kind)]
        extra["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
        extra["labels"] = documents[0].masked_fill(extra["position_ids"] == 0, -100)
    num_labels = [(extra.get("labels", ids)[:, 1:] != -100).sum().item() for ids in documents]
    total = 0.0
    with InDouble() if in_double else contextlib.nullcontext():
        model = model.double() if in_double else model
        for ids, count in zip(documents, num_labels, strict=True):
            share = model(**{"input_ids": ids, "labels": ids, "use_cache": False} | extra).loss
            share = share * count / sum(num_labels)
            share.backward()
            total += float(share.detach())
    return total, _gradients(model)


class InDouble(TorchFunctionMode):
    """fp64 wherever a model asks for fp32 by name."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def doubled(x: Any) -> Any:
            return torch.float64 if x is torch.float32 else x

        func = Tensor.double if func is Tensor.float else func
        return func(*map(doubled, args), **{name: doubled(x) for name, x in (kwargs or {}).items()})


def on_rank(group: Any, model_type: str, kind: str) -> LossAndGradients:
    """This rank's share of the loss and of the gradients."""
    model = model_of(model_type, "cpflex")
    attach(model)
    _, lengths = KINDS[kind]
    ids = tokens_of(kind)
    plan = plan_for(model.config, group, lengths=lengths, verified_only=False)
    loss = model(**shard_batch({"input_ids": ids, "labels": ids}, plan, model)).loss
    loss.backward()
    return float(loss.detach()), _gradients(model)


def attach(model: Any) -> str:
    """Let layers that mix tokens outside of attention exchange states, or gather tokens where their states are not
    known; the name of the way, if there are such layers.
    """
    if not recurrent_types(model.config.get_text_config()):
        return ""
    for how in (exchanged, gathered):
        with contextlib.suppress(NotImplementedError):
            attach_recurrent(model, how)
            return how.__name__
    return ""


def on_rank_whatever_was_found(group: Any, model_type: str, kind: str) -> LossAndGradients:
    """`on_rank`, where what an earlier table found is forgotten."""
    with mock.patch.dict(classes.DIFFERENT, clear=True):
        return on_rank(group, model_type, kind)


def _gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# -- how far off


@dataclass(frozen=True)
class Comparison:
    """Errors of the ranks' sums against fp64."""

    worst: float
    """The largest error of the loss and of the gradients, each relative to its norm, but for those in ``derived``."""
    derived: Mapping[str, tuple[float, float]]
    """Parameters that need more than the tolerance, and the bar they are within."""
    beyond: Mapping[str, float]
    """Parameters, or ``loss``, that are beyond their bar, and their errors."""


def compare(
    shares: list[LossAndGradients],
    eager: LossAndGradients,
    exact: LossAndGradients,
    tolerance: float = TOLERANCE,
    times: float = TIMES,
) -> Comparison:
    """A gradient may be off by ``tolerance``, 1e-5, of its norm; or by ``times``, three times, as much as eager
    attention in fp32 is, be it that gradient or the median one: where a gradient is a small difference of large terms,
    or nothing but rounding. No bar is above 1e-3 of the norm, or of the median norm: beyond that a comparison says
    nothing.
    """
    losses, grads = zip(*shares, strict=True)
    off: dict[str, tuple[float, float, float]] = {
        "loss": (abs(sum(losses) - exact[0]), abs(eager[0] - exact[0]), abs(exact[0]))
    }
    for name, wanted in exact[1].items():
        # transformers 4 leaves out experts that no token of a rank goes to
        found = torch.stack([grad.get(name, torch.zeros(wanted.shape)).double() for grad in grads]).sum(dim=0)
        of_eager = eager[1].get(name, torch.zeros(wanted.shape)).double()
        off[name] = (float((found - wanted).norm()), float((of_eager - wanted).norm()), float(wanted.norm()))
    usual, usual_norm = (torch.tensor([row[i] for row in off.values()]).median().item() for i in (1, 2))
    worst, derived, beyond = 0.0, {}, {}
    for name, (error, of_eager, norm) in off.items():
        bar = min(times * max(of_eager, usual), MOST * max(norm, usual_norm))
        if error <= tolerance * norm:
            worst = max(worst, error / norm if norm else 0.0)
        elif error <= bar:
            vanishes = norm <= VANISHES * usual_norm
            derived[name] = (math.inf, math.inf) if vanishes else (error / norm, bar / norm)
        else:
            beyond[name] = error / norm if norm else math.inf
    return Comparison(worst, derived, beyond)


# -- the table


def outcome_of(model_type: str, ranks: Mapping[int, Any]) -> dict[str, Any]:
    """What came out for a family: a row of the table."""
    row: dict[str, Any] = {"class": model_class_name(model_type)}
    if model_type in KNOWN:
        return row | {"outcome": "differs", "why": KNOWN[model_type]}
    try:
        with mock.patch.dict(classes.DIFFERENT, clear=True):
            plan_for(_config(model_type), seq_len=SEQ_LEN, verified_only=False)
    except NotImplementedError as refusal:
        return row | {"outcome": "refused", "why": str(refusal).partition("parallelism: ")[2] or str(refusal)}
    except Exception as error:  # noqa: BLE001 - a row of the table
        return row | {"outcome": "not built", "why": _line(error)}
    if (found := model_of(model_type, "cpflex").config.model_type) != model_type:
        return row | {"outcome": "not built", "why": f"its class takes another config, {found}"}
    try:
        truths = {kind: [one_process(model_type, kind, in_double) for in_double in (False, True)] for kind in KINDS}
    except Exception as error:  # noqa: BLE001 - a row of the table
        return row | {"outcome": "not built", "why": _line(error)}
    row["worst"], derived, beyond = {}, {}, {}
    for kind in KINDS:
        for world_size, processes in ranks.items():
            outcomes = processes.outcomes(on_rank_whatever_was_found, model_type, kind)
            if failed := [outcome.error for outcome in outcomes if outcome.error is not None]:
                if isinstance(failed[0], NotImplementedError):
                    return row | {"outcome": "refused", "why": str(failed[0])}
                return row | {"outcome": "fails", "why": REASONS.get(model_type, _line(failed[0]))}
            found = compare([outcome.result for outcome in outcomes], *truths[kind])
            row["worst"][f"{kind}, {world_size} ranks"] = float(f"{found.worst:.1e}")
            for name, error_and_bar in found.derived.items():
                rounded = [float(f"{x:.0e}") for x in error_and_bar]
                derived[_short(name)] = max(rounded, derived.get(_short(name), rounded))
            for name, error in found.beyond.items():
                beyond[_short(name)] = max(float(f"{error:.0e}"), beyond.get(_short(name), 0.0))
    if beyond:
        return row | {"outcome": "differs", "why": REASONS.get(model_type, "its loss or gradients"), "beyond": beyond}
    bars = {name: None if math.inf in error_and_bar else error_and_bar for name, error_and_bar in derived.items()}
    row["layers"], row["needs"] = sorted(set(layer_types(_config(model_type).get_text_config()))), needs(model_type)
    return row | ({"outcome": "derived", "bars": bars} if bars else {"outcome": "exact"})


def needs(model_type: str) -> str:
    """What a user does besides choosing the implementation."""
    if model_type in REPLACED:
        return "`replace_attention(model)`"
    if how := attach(model_of(model_type, "cpflex")):
        return f"`attach_recurrent(model, {how})`"
    return "`is_decoder=True`" if classes.ruled_out(default_config(model_type)) else ""


def _config(model_type: str) -> Any:
    """Small, or else as it comes: some families are refused before anybody makes them small."""
    try:
        config = config_of(model_type)
        config._attn_implementation = IMPLEMENTATION if model_type in REPLACED else "cpflex"
        return config
    except Exception:  # noqa: BLE001 - whatever classes raise
        return default_config(model_type)


def _short(name: str) -> str:
    """Of a parameter, without the number of its layer."""
    return re.sub(r"^.*\.\d+\.", "", name)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def recorded() -> dict[str, Any]:
    """By release of transformers, the oldest first."""
    return json.loads(RECORD.read_text())


def record_text(record: Mapping[str, Any]) -> str:
    """JSON with a family in each line."""
    tables = []
    for release, table in record.items():
        rows = [f"   {json.dumps(name)}: {json.dumps(row)}" for name, row in table["families"].items()]
        about = [f"  {json.dumps(name)}: {json.dumps(table[name])}" for name in ("day", "torch")]
        families = '  "families": {\n' + ",\n".join(rows) + "\n  }"
        tables.append(f" {json.dumps(release)}: {{\n" + ",\n".join([*about, families]) + "\n }")
    return "{\n" + ",\n".join(tables) + "\n}\n"


def verified_source(record: Mapping[str, Any]) -> str:
    """The text of verified.py."""
    lines = [
        '"""Model types, by what the generated table found. Made by `python tests/integrations/families.py --write`."""',
        "",
        "VERIFIED_BY_RELEASE: dict[str, frozenset[str]] = {",
    ]
    for release, table in record.items():
        verified = (name for name, row in table["families"].items() if row["outcome"] in EQUAL)
        lines += [f'    "{release}": frozenset(', "        (", *(f'            "{name}",' for name in verified)]
        lines += ["        )", "    ),"]
    lines += ["}", '"""Whose loss and gradients on ranks are those of one process, by release of transformers."""', ""]
    lines += ["DIFFERENT_BY_RELEASE: dict[str, dict[str, str]] = {"]
    for release, table in record.items():
        different = ((name, row) for name, row in table["families"].items() if row["outcome"] in ("differs", "fails"))
        lines += [f'    "{release}": {{', *(f'        "{name}": "{_reason(name, row)}",' for name, row in different)]
        lines += ["    },"]
    lines += ["}", '"""Whose loss or gradients are not, and why."""', ""]
    return "\n".join(lines)


def _reason(model_type: str, row: Mapping[str, Any]) -> str:
    if model_type in KNOWN | REASONS:
        return (KNOWN | REASONS)[model_type]
    if "KeyError: 'cpflex'" in row["why"]:
        return "attention that its class computes by itself"
    if row["outcome"] == "differs":
        return "its loss or gradients differ from those of one process"
    return "its class does not take a plan for its mask"


def run(model_types: list[str]) -> dict[str, Any]:
    """The rows of these families, each on 2 and on 4 gloo processes."""
    from processes import RankProcesses

    ranks = {world_size: RankProcesses(world_size) for world_size in (2, 4)}
    rows = {}
    for index, model_type in enumerate(model_types):
        rows[model_type] = outcome_of(model_type, ranks)
        told = rows[model_type].get("why") or rows[model_type].get("bars") or rows[model_type]["worst"]
        print(f"{index + 1:3}/{len(model_types)} {model_type:28} {rows[model_type]['outcome']:9} {told}", flush=True)
    for processes in ranks.values():
        processes.close()
    return rows


def main() -> None:
    import transformers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="model types; the others stay as they were")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    rows = run(options.only or model_types())
    if options.write:
        release, known = version("transformers"), recorded()
        table = {
            "day": f"{datetime.date.today()}",
            "torch": version("torch"),
            "families": dict(sorted(((known[release]["families"] if options.only else {}) | rows).items())),
        }
        record = dict(sorted((known | {release: table}).items(), key=lambda item: [int(n) for n in item[0].split(".")]))
        RECORD.write_text(record_text(record))
        VERIFIED_FILE.write_text(verified_source(record))
        from support_matrix import DOCUMENT, support_matrix

        DOCUMENT.write_text(support_matrix())


if __name__ == "__main__":
    main()
