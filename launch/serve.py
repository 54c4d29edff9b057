"""Answer prompts with a model of transformers whose keys and values lie on all ranks.

    python launch/serve.py --model hf:DIRECTORY --prompts prompts.txt           starts its ranks: one per GPU, or 2
    torchrun --standalone --nproc-per-node 2 launch/serve.py --model hf:...     the same; without --prompts from stdin

A prompt is a line. It is sharded like training and computed once; its keys stay where they were computed, in pages, and
`model.generate` of transformers goes on from there. New tokens are written to stdout as they come; progress, tokens/s
and how much of the pages is used go to stderr. With --check each answer is compared with that of one rank alone.
"""

from __future__ import annotations

import argparse
import codecs
import gc
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

import ranks
from cpflex.integrations.transformers import prefill
from hf import config_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

MODEL_HELP = """a causal language model of transformers: hf:CONFIG.json with random weights, whose tokens are bytes, or
hf:DIRECTORY, or the name of a model on this machine, with its own weights and tokenizer"""


def main() -> None:
    options = parse_options(sys.argv[1:])
    if ranks.started():
        with ranks.joined(options.device) as (group, device), torch.inference_mode():
            serve(options, group, device)
            gc.collect()  # a cache and its layers know each other, and the group: see `ranks.joined`
    else:
        ranks.start(__file__, sys.argv[1:], device_type=options.device)


def serve(options: argparse.Namespace, group: dist.ProcessGroup, device: torch.device) -> None:
    torch.manual_seed(options.seed)  # of random weights
    model, text = load(options.model, DTYPES[options.dtype], device)
    is_first = group.rank() == 0
    say(f"{type(model).__name__} on {group.size()} ranks; a prompt is a line", is_first)
    for number, prompt in enumerate(prompts(options.prompts, group), 1):
        tokens = torch.tensor([text.tokens(prompt)], device=device)
        if tokens.shape[1] < 2:
            say(f"[{number}] left out: a prompt must have at least 2 tokens; got {tokens.shape[1]}", is_first)
            continue
        began = time.perf_counter()
        cache = prefill(model, tokens, group, max_new_tokens=options.max_new_tokens)
        progress = Progress(f"[{number}]", tokens.shape[1], options.max_new_tokens, cache.pages, began, is_first)
        stream = Stream(text.decoder(), progress) if is_first else None
        answer = generated(model, tokens, options, streamer=stream, **{cache.keyword: cache})
        if options.check and is_first:
            say(f"[{number}] {compared(model, tokens, answer, options)}", is_first)


def generated(model: Any, tokens: Tensor, options: argparse.Namespace, **arguments: Any) -> Tensor:
    """The tokens that follow, int64 [n]; ranks sample alike, from equal generators."""
    sampling = {"do_sample": True, "temperature": options.temperature} if options.temperature else {"do_sample": False}
    torch.manual_seed(options.seed)
    arguments |= {"attention_mask": torch.ones_like(tokens), "max_new_tokens": options.max_new_tokens}
    return model.generate(tokens, **sampling, **arguments)[0, tokens.shape[1] :]


def compared(model: Any, tokens: Tensor, answer: Tensor, options: argparse.Namespace) -> str:
    """The same by transformers' own attention and cache, on this rank alone."""
    model.set_attn_implementation("sdpa")
    alone = generated(model, tokens, options)
    model.set_attn_implementation("cpflex")
    if torch.equal(answer, alone):
        return f"one rank alone gives the same {len(alone)} tokens"
    same = int((answer[: len(alone)] == alone[: len(answer)]).long().cumprod(0).sum())
    raise SystemExit(f"one rank alone gives another token after {same} of {len(answer)}")


def prompts(file: Path | None, group: dist.ProcessGroup) -> Iterator[str]:
    """The lines of a file or of stdin, as they come, without empty ones; the first rank reads for all."""
    with open(file) if file else open(sys.stdin.fileno(), closefd=False) as source:
        while True:
            line = [source.readline() if group.rank() == 0 else ""]
            dist.broadcast_object_list(line, src=0, group=group)
            if not line[0]:
                return
            if prompt := line[0].strip():
                yield prompt


# -- the model and its text


def load(name: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, Text]:
    """A model in evaluation, the same on all ranks, and what makes text of its tokens."""
    how = {"attn_implementation": "cpflex", "dtype": dtype}
    if not Path(name).is_file():
        model = AutoModelForCausalLM.from_pretrained(name, **how)
        return nn.Module.to(model, device).eval(), Text(AutoTokenizer.from_pretrained(name))  # pyright: ignore
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name), **how)
    model.generation_config.eos_token_id = None  # any byte may be told
    model.generation_config.pad_token_id = 0
    return nn.Module.to(model, device).eval(), Text(None)


class Text:
    """Text as tokens, by a tokenizer or as bytes."""

    def __init__(self, tokenizer: Any | None) -> None:
        self.tokenizer = tokenizer

    def tokens(self, text: str) -> list[int]:
        return list(text.encode()) if self.tokenizer is None else self.tokenizer(text)["input_ids"]

    def decoder(self) -> Callable[[int, bool], str]:
        """Of a stream of tokens: what each adds to the text, whole characters only; and whether it is the last."""
        if self.tokenizer is None:
            of_bytes = codecs.getincrementaldecoder("utf-8")("replace")
            return lambda token, is_last: of_bytes.decode(bytes([token % 256]), is_last)
        tokens: list[int] = []
        told = ""

        def decoded(token: int, is_last: bool) -> str:
            nonlocal told
            tokens.append(token)
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)  # type: ignore[union-attr]
            if text.endswith("\N{REPLACEMENT CHARACTER}") and not is_last:
                return ""  # the rest of the character is in the next token
            new, told = text[len(told) :], text
            return new

        return decoded


# -- what it tells


def say(text: str, is_first: bool, end: str = "\n") -> None:
    if is_first:
        print(text, end=end, file=sys.stderr, flush=True)


class Stream(BaseStreamer):
    """What `generate` gives new tokens to; it begins with the prompt. Each is told when the next one is there."""

    def __init__(self, decoder: Callable[[int, bool], str], progress: Progress) -> None:
        self.decoder, self.progress = decoder, progress
        self.last: int | None = None
        self.has_begun = False

    def put(self, value: Tensor) -> None:
        if not self.has_begun:
            self.has_begun = True
            self.progress.begin()
            return
        self._tell(is_last=False)
        self.last = int(value)
        self.progress.step()

    def end(self) -> None:
        self._tell(is_last=True)
        print(flush=True)
        self.progress.finish()

    def _tell(self, *, is_last: bool) -> None:
        if self.last is not None:
            print(self.decoder(self.last, is_last), end="", flush=True)


class Progress:
    """How far an answer is: a line that is renewed at each token, if stderr is a terminal on which nothing else is
    written, and one at the end.
    """

    def __init__(self, name: str, num_given: int, num_asked: int, pages: Any, began: float, is_first: bool) -> None:
        self.name, self.num_given, self.num_asked, self.pages, self.is_first = (
            name,
            num_given,
            num_asked,
            pages,
            is_first,
        )
        self.prefilled = time.perf_counter()
        self.prefill_seconds = self.prefilled - began
        self.num_new = 0
        self.renews = sys.stderr.isatty() and not sys.stdout.isatty()

    def begin(self) -> None:
        self.prefilled = time.perf_counter()

    def step(self) -> None:
        self.num_new += 1
        if self.renews:
            say(f"\r{self.line()}", self.is_first, end="")

    def finish(self) -> None:
        say(f"\r{self.line()}" if self.renews else self.line(), self.is_first)

    def line(self) -> str:
        seconds = max(1e-9, time.perf_counter() - self.prefilled)
        used = "/".join(str(self.pages.num_pages - free) for free in self.pages.num_free)
        return (
            f"{self.name} prompt of {self.num_given} tokens in {self.prefill_seconds:.2f} s, {self.num_new} of "
            f"{self.num_asked} new ones at {self.num_new / seconds:.1f} tokens/s; pages used by rank: {used} of "
            f"{self.pages.num_pages} with {self.pages.page_size} tokens"
        )


# -- options


def parse_options(arguments: list[str]) -> argparse.Namespace:
    """What is wrong with them is told before any rank is started."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, metavar="hf:NAME", help=MODEL_HELP)
    add("--prompts", type=Path, help="a file of prompts, one a line; stdin if None")
    add("--max-new-tokens", type=int, default=64, help="of an answer")
    add("--temperature", type=float, default=0.0, help="of sampling; 0 is greedy")
    add("--seed", type=int, default=0, help="of sampling, and of random weights")
    add("--dtype", choices=DTYPES, default="fp32", help="of weights, keys and values")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add(
        "--check",
        action="store_true",
        help="compare each answer with that of one rank alone, by transformers' own cache",
    )
    options = parser.parse_args(arguments)
    prefix, _, options.model = options.model.partition(":")
    if prefix != "hf" or not options.model:
        parser.error("--model must be hf:CONFIG.json or hf:DIRECTORY")
    if options.max_new_tokens < 1:
        parser.error(f"--max-new-tokens must be at least 1; got {options.max_new_tokens}")
    if options.temperature < 0:
        parser.error(f"--temperature must be at least 0; got {options.temperature}")
    if options.prompts and not options.prompts.is_file():
        parser.error(f"there is no file {options.prompts}")
    try:
        config_of(options.model, of_bytes=Path(options.model).is_file())  # other models have a tokenizer
    except (ValueError, NotImplementedError) as problem:
        parser.error(str(problem))
    return options


if __name__ == "__main__":
    main()
