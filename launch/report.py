"""What a run tells: a line of JSON per step, a progress bar, a summary and a plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from cpflex import Plan
from data import Sample

LOG_FILE = "log.jsonl"

NUM_LINES = 10
"""Lines that a run leaves in the terminal, besides the moving bar."""


@dataclass(frozen=True)
class Told:
    """What a job tells of its steps. A record is a dataclass with at least ``step``, ``seconds``, ``tokens_per_s`` and,
    by mask kind, ``imbalance`` and ``kv_moved``.
    """

    record_type: type
    curve: Callable[[Any], float]
    """Of a record, the number that is plotted."""
    curve_name: str
    one_line: Callable[[Any], str]
    plot_file: str


@dataclass(frozen=True)
class StepRecord:
    """One step of training on text, as logged."""

    step: int  # from 1
    loss: float  # nats per byte
    grad_norm: float
    lr: float
    seconds: float
    tokens_per_s: float
    num_documents: int
    layout: str
    imbalance: dict[str, float]  # by mask kind: work of the busiest rank / mean
    kv_moved: dict[str, float]  # by mask kind: K/V rows received by the first rank / in an all-gather


def step_record(
    step: int, loss: float, grad_norm: float, lr: float, seconds: float, sample: Sample, plan: Plan
) -> StepRecord:
    return StepRecord(
        step=step,
        loss=loss,
        grad_norm=grad_norm,
        lr=lr,
        seconds=seconds,
        tokens_per_s=plan.seq_len / seconds,
        num_documents=len(sample.cu_seqlens) - 1,
        layout=plan.layout.name,
        **balance_of(plan),
    )


def balance_of(plan: Plan) -> dict[str, Any]:
    """``imbalance`` and ``kv_moved`` of a record, by mask kind."""
    stats = {kind: plan[kind].stats for kind in plan.kinds}
    return {
        "imbalance": {kind: figures["imbalance"] for kind, figures in stats.items()},
        "kv_moved": {
            kind: max(figures["recv_tokens"]) / max(1, figures["all_gather_tokens"]) for kind, figures in stats.items()
        },
    }


def one_line(record: StepRecord) -> str:
    return f"loss {record.loss:.3f}  {record.tokens_per_s:,.0f} tokens/s  {balance_line(record)}"


def balance_line(record: Any) -> str:
    imbalance = "/".join(f"{value:.2f}" for value in record.imbalance.values())
    kv_moved = "/".join(f"{value:.0%}" for value in record.kv_moved.values())
    return f"imbalance {imbalance}  K/V {kv_moved}"


TEXT = Told(StepRecord, lambda record: record.loss, "loss, nats per byte", one_line, "loss.png")


class Report:
    """Shows and logs the steps of a run, on one rank; the others are silent.

    Args:
        directory: of the log and the plot.
        start: steps done before, whose lines of the log stay.
        num_steps: of the whole run.
        told: what it tells of each step.
    """

    def __init__(self, directory: Path, start: int, num_steps: int, *, is_silent: bool, told: Told = TEXT) -> None:
        self.directory = directory
        self.told = told
        self.num_steps = num_steps
        self.is_silent = is_silent
        self.console = Console(quiet=is_silent)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            expand=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=num_steps, completed=start)
        self._num_done = 0
        if not is_silent:
            directory.mkdir(parents=True, exist_ok=True)
            log = directory / LOG_FILE
            # steps that a killed run did after its last checkpoint are done again
            write_log(log, [record for record in read_log(log, told) if record.step <= start])

    def __enter__(self) -> Report:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def step(self, record: Any) -> None:
        if self.is_silent:
            return
        with (self.directory / LOG_FILE).open("a") as log:
            log.write(as_line(record))
        line = self.told.one_line(record)
        self._bar.update(self._task, advance=1, description=line)
        if self._num_done == 0:
            kinds = " / ".join(record.imbalance)
            self.console.print(f"imbalance, and K/V moved against an all-gather, are those of {kinds} layers")
        if self._num_done == 0 or record.step % max(1, self.num_steps // NUM_LINES) == 0:
            self.console.print(f"step {record.step:4}  {line}", highlight=False, soft_wrap=True)
        self._num_done += 1

    def finish(self) -> None:
        """Summary and plot of the whole run, earlier parts included."""
        if self.is_silent:
            return
        if not (records := read_log(self.directory / LOG_FILE, self.told)):
            return
        plot(records, self.told, self.directory / self.told.plot_file)
        self.console.print(summary(records, self.told, self._num_done, self.directory))


def summary(records: Sequence[Any], told: Told, num_new: int, directory: Path) -> Table:
    table = Table(title="summary", show_header=False)
    seconds = sum(record.seconds for record in records)
    curve = [told.curve(record) for record in records]
    recent = curve[-NUM_LINES:]
    table.add_row("steps", f"{len(records)}, {num_new} of them now")
    table.add_row(told.curve_name, f"{curve[0]:.3f} -> {mean(recent):.3f} (mean of the last {len(recent)})")
    table.add_row("time in steps", f"{seconds:.1f} s, {mean(record.tokens_per_s for record in records):,.0f} tokens/s")
    for kind in records[0].imbalance:
        imbalance, moved = (mean(r.imbalance[kind] for r in records), mean(r.kv_moved[kind] for r in records))
        table.add_row(f"{kind} layers", f"imbalance {imbalance:.3f}, K/V moved {moved:.0%} of an all-gather")
    table.add_row("log, plot", f"{directory / LOG_FILE}, {directory / told.plot_file}")
    return table


def plot(records: Sequence[Any], told: Told, path: Path) -> None:
    from matplotlib.figure import Figure  # slow to import, and only the end of a run needs it

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([record.step for record in records], [told.curve(record) for record in records])
    axes.set(xlabel="step", ylabel=told.curve_name)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def read_log(path: Path, told: Told = TEXT) -> list[Any]:
    """The steps of a log; a last line that was cut off by a kill is not one."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [told.record_type(**json.loads(line)) for line in lines if line.endswith("\n")]


def write_log(path: Path, records: Sequence[Any]) -> None:
    """Replace a log, all at once."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("".join(as_line(record) for record in records))
    unfinished.rename(path)


def as_line(record: Any) -> str:
    return json.dumps(asdict(record)) + "\n"
