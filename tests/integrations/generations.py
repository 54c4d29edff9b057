"""The generated table: what `generate` gives after `prefill` over ranks, for every verified type, beside one process.

python tests/integrations/generations.py                    all types, and what came out
python tests/integrations/generations.py --only llama opt    these alone
python tests/integrations/generations.py --write            and write generations.json and docs/support-matrix.md

The truth is transformers' own `generate` with eager attention and its own cache, in one process.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from family_configs import VOCAB, model_of, model_types
from torch import Tensor

from cpflex.integrations.transformers import VERIFIED, prefill

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).parent / "generations.json"
SEQ_LEN, NEW = 83, 8
PAD = 0
TOLERANCE = 1e-4
"""Of the largest logit of one process."""


@dataclass(frozen=True)
class Way:
    """How tokens are asked for."""

    seq_len: int = SEQ_LEN
    new: int = NEW
    padding: tuple[int, ...] = (0, 0)
    """Tokens of it at the beginning of each row."""
    seed: int | None = None
    """Of sampling; None is greedy."""
    ends: bool = False
    """Whether the first row meets its end early: at the token that would be its third."""
    more: int = 0
    """Tokens that the user adds to the answer, for another one."""

    @property
    def tokens(self) -> Tensor:  # [B, S]
        return prompts(len(self.padding), self.seq_len)

    @property
    def attention_mask(self) -> Tensor | None:  # [B, S]
        if not any(self.padding):
            return None
        return (torch.arange(self.seq_len) >= torch.tensor(self.padding)[:, None]).long()


WAYS = {
    "greedy, in two turns": Way(new=4, more=5),
    "sampled, with an end": Way(seed=5, ends=True, new=6),
    "padded left": Way(padding=(26, 0, SEQ_LEN - 1), seed=3, new=5),
    "a short prompt": Way(seq_len=2, padding=(0,), new=2),
}


class Answer(NamedTuple):
    """Tokens, and the logits that they were chosen from."""

    tokens: Tensor  # [B, S + new]
    logits: Tensor  # [new, B, vocabulary]


def prompts(rows: int = 2, seq_len: int = SEQ_LEN, seed: int = 1) -> Tensor:
    return torch.randint(8, VOCAB, (rows, seq_len), generator=torch.Generator().manual_seed(seed))


def model_for_generation(model_type: str, attention: str) -> Any:
    model = model_of(model_type, attention)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, PAD
    model.generation_config.use_cache = True  # MPT's config says otherwise
    return model.eval()


def generated(
    model: Any, tokens: Tensor, cache: Any = None, seed: int | None = None, new: int = NEW, **asked: Any
) -> Answer:
    if cache is not None:
        asked[cache.keyword] = cache
    if seed is not None:
        torch.manual_seed(seed)
    asked |= {"max_new_tokens": new, "do_sample": seed is not None, "output_logits": True}
    out = model.generate(tokens, return_dict_in_generate=True, **asked)
    return Answer(out.sequences, torch.stack(out.logits))


def answer(model: Any, way: Way, eos: int | None, cache: Any = None) -> Answer:
    """With the cache of prefill, or with none in one process."""
    mask = way.attention_mask
    asked: dict[str, Any] = {"seed": way.seed, "new": way.new} | ({} if mask is None else {"attention_mask": mask})
    asked |= {"eos_token_id": eos} if way.ends else {}
    found = generated(model, way.tokens, cache, **asked)
    if not way.more:
        return found
    if cache is None:  # some layers of transformers begin anew where a cache is given several tokens
        asked["use_cache"] = False
    told = torch.cat([found.tokens, prompts(len(found.tokens), way.more, seed=2)], dim=1)
    return generated(model, told, cache, **asked | {"attention_mask": torch.ones_like(told)})  # an answer may hold PAD


def one_process(model_type: str) -> tuple[dict[str, Answer], int]:
    """The truth, and the token that ends a row."""
    model = model_for_generation(model_type, "eager")
    endless = next(replace(way, ends=False) for way in WAYS.values() if way.ends)
    eos = int(answer(model, endless, None).tokens[0, SEQ_LEN + 2])
    return {name: answer(model, way, eos) for name, way in WAYS.items()}, eos


def on_rank(group: Any, model_type: str, eos: int) -> dict[str, Answer | str]:
    """What came of each way on this rank, or why it was refused."""
    model, answers = model_for_generation(model_type, "cpflex"), {}
    for name, way in WAYS.items():
        try:
            room = way.new * 2 + way.more if way.more else way.new
            cache = prefill(model, way.tokens, group, max_new_tokens=room, attention_mask=way.attention_mask)
            answers[name] = answer(model, way, eos, cache)
        except (NotImplementedError, ValueError) as refusal:
            answers[name] = f"{type(refusal).__name__}: {refusal}"
    return answers


# -- the table


def outcome_of(model_type: str, ranks: Mapping[int, Any], of_one: tuple[dict[str, Answer], int]) -> dict[str, Any]:
    """What came out for a type: a row of the table."""
    truth, eos = of_one
    row: dict[str, Any] = {"outcome": "equal", "worst": {}}
    for world_size, processes in ranks.items():
        outcomes = processes.outcomes(on_rank, model_type, eos, timeout=180)
        if failed := [outcome.error for outcome in outcomes if outcome.error is not None]:
            return {"outcome": "fails", "why": f"{type(failed[0]).__name__}: {' '.join(str(failed[0]).split())[:160]}"}
        found = [outcome.result for outcome in outcomes]
        refused = {name: said for name, said in found[0].items() if isinstance(said, str)}
        if any(answers[name] != said for answers in found for name, said in refused.items()):
            return {"outcome": "differs", "why": "ranks refuse different things"}
        if len(refused) == len(WAYS):
            return {"outcome": "refused", "why": _reason(refused.popitem()[1], model_type)}
        if refused:
            row["refused"] = {name: _reason(said, model_type) for name, said in refused.items()}
        worst = [off(answers[name], truth[name]) for answers in found for name in WAYS.keys() - refused.keys()]
        if not max(worst) <= TOLERANCE:
            return {"outcome": "differs", "why": f"tokens or logits on {world_size} ranks: {max(worst)}"}
        row["worst"][f"{world_size} ranks"] = float(f"{max(worst):.0e}")
    return row


def off(found: Answer, truth: Answer) -> float:
    """The largest error of logits, of the largest of them; infinite where tokens are others."""
    if not torch.equal(found.tokens, truth.tokens):
        return math.inf
    return float((found.logits - truth.logits).abs().max() / truth.logits.abs().max())


def _reason(said: str, model_type: str) -> str:
    """Of a refusal, without the type of the model and what to do about it."""
    reason = said.partition(": ")[2].removeprefix(f"{model_type}: ").removeprefix(f"{model_type} with ")
    reason = reason.removeprefix("not supported with the cache of prefill: ")
    return re.split(r";| - | is not supported", reason)[0]


def recorded() -> dict[str, Any]:
    """By release of transformers, the oldest first."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def write(rows: Mapping[str, Any]) -> None:
    """Rows of the installed release, beside those that are known."""
    release, known = version("transformers"), recorded()
    types = dict(sorted((known.get(release, {"types": {}})["types"] | rows).items()))
    known[release] = {"day": f"{datetime.date.today()}", "torch": version("torch"), "types": types}
    known = dict(sorted(known.items(), key=lambda item: [int(n) for n in item[0].split(".")]))
    tables = []
    for release, table in known.items():
        lines = ",\n".join(f"   {json.dumps(name)}: {json.dumps(row)}" for name, row in table["types"].items())
        about = "".join(f'  "{name}": "{table[name]}",\n' for name in ("day", "torch"))
        tables.append(f' "{release}": {{\n{about}  "types": {{\n{lines}\n  }}\n }}')
    RECORD.write_text("{\n" + ",\n".join(tables) + "\n}\n")


def run(types: list[str], world_sizes: list[int], is_written: bool) -> None:
    """Each on so many gloo processes."""
    from processes import RankProcesses

    ranks = {world_size: RankProcesses(world_size) for world_size in world_sizes}
    for index, model_type in enumerate(types):
        row = outcome_of(model_type, ranks, one_process(model_type))
        print(f"{index + 1:3}/{len(types)} {model_type:24} {row}", flush=True)
        if is_written:
            write({model_type: row})
    for processes in ranks.values():
        processes.close()


def main() -> None:
    import transformers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="model types; the others stay as they were")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    run(options.only or sorted(VERIFIED & set(model_types())), options.ranks, options.write)
    if options.write:
        from support_matrix import DOCUMENT, support_matrix

        DOCUMENT.write_text(support_matrix())


if __name__ == "__main__":
    main()
