"""The command line: ``python -m cpflex explain ...`` shows the plan of any rank of any job, without a process group;
``python -m cpflex doctor`` what this machine has, and whether it works.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce
from operator import and_
from pathlib import Path

from torch import Tensor

import cpflex
from cpflex.masks import MaskFn, MaskMod
from cpflex.ring.schedule import ScheduleFn
from cpflex.seeing.documents import draw_documents
from cpflex.sharding.layout import LayoutFn
from cpflex.topology import DEVICES, TOPOLOGIES, Device, Heads, Machine, Topology
from cpflex.trees import Tree

LAYOUTS: dict[str, LayoutFn] = {
    "balanced": cpflex.balanced,
    "zigzag": cpflex.zigzag,
    "striped": cpflex.striped,
    "contiguous": cpflex.contiguous,
}
SCHEDULES: dict[str, ScheduleFn] = {"auto": cpflex.auto, "direct": cpflex.direct, "ring": cpflex.ring}

LINKS = {"intra_gb_per_s": ("nvlink", "intra", "pcie"), "inter_gb_per_s": ("ib", "inter", "nic", "eth", "roce")}
"""Names of links, by the field of a `Topology` that they set."""

TERMS = """\
  causal            keys up to the query
  full              all keys
  window:W          the W latest keys, the query's own included; hides no future key: add causal
  window:L:R        keys from L before the query to R after it
  doc:FILE          keys of the same document; FILE holds the documents' lengths, separated by white space
  docs, docs:SEED   keys of the same document, of lengths drawn as those of pre-training data are spread
  prefix:N          causal, and the first N keys
  tree:FILE         keys before the query on its path in a tree; FILE holds each segment's parent, a row from 0 on or
                    -1 for a root, and its length. Windows beside it count along the paths
  module:function   a mask_mod (b, h, q_idx, kv_idx) -> bool Tensor that can be imported"""

EXPLAIN = f"""\
A mask is one or more terms with commas in between; a key is visible where all of them agree:

{TERMS}

Numbers may be written as 64k or 1m (powers of 1024). Layers of several kinds share one layout: name each kind
and repeat --mask.

examples:
  python -m cpflex explain --mask causal --seq-len 64k --ranks 8
  python -m cpflex explain --mask causal,window:4096,doc:lengths.txt --seq-len 1m --ranks 64 --plot plan.png
  python -m cpflex explain --mask full=causal,doc:lengths.txt --mask sliding=causal,window:1k,doc:lengths.txt \\
      --weights full=8,sliding=40 --seq-len 256k --ranks 32 --rank 5 --layout zigzag --schedule direct"""

SIMULATE = f"""\
A model, not a measurement: docs/scale.md says of what. Masks are terms as in explain:

{TERMS}

examples:
  python -m cpflex simulate --mask causal,docs --seq-len 1m --ranks 64
  python -m cpflex simulate --mask causal --seq-len 256k --ranks 64 --gpus-per-node 8 --links nvlink:370,ib:47 \\
      --tflops 500 --plot timeline.png
  python -m cpflex simulate --mask full=causal,docs --mask sliding=causal,docs,window:1k --weights full=1,sliding=5 \\
      --seq-len 1m --ranks 64 --topology h100-ethernet --heads 64,8,64"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m cpflex", description=cpflex.__doc__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    explain = commands.add_parser(
        "explain",
        help="show the plan of a mask: layout, work and K/V traffic per rank, schedule, tiles, memory, warnings",
        description="Show the plan of one rank: layout, work and K/V traffic, schedule, tiles, memory, warnings.",
        usage="python -m cpflex explain --mask [NAME=]TERM,... --seq-len S --ranks P [options]",
        epilog=EXPLAIN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_explain_arguments(explain)
    explain.set_defaults(run=_explain, parser=explain)
    simulate = commands.add_parser(
        "simulate",
        help="predict what a layer takes on a machine: every schedule, and other libraries, side by side",
        description="Predict the time of one attention layer, forward and backward, by a model of links and kernels.",
        usage="python -m cpflex simulate --mask [NAME=]TERM,... --seq-len S --ranks P [options]",
        epilog=SIMULATE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_simulate_arguments(simulate)
    simulate.set_defaults(run=_simulate, parser=simulate)
    doctor = commands.add_parser(
        "doctor",
        help="versions, GPUs and links of this machine, the backend chosen on it, and a test of a few seconds",
        description="Show what this machine has for cpflex, and test it: on all its GPUs with NCCL, else two gloo "
        "processes. Exits with status 1 if the test fails.",
    )
    doctor.set_defaults(run=_doctor, parser=doctor)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (argparse.ArgumentTypeError, ValueError, OSError, ImportError, cpflex.UnsupportedMod) as error:
        args.parser.error(str(error))


def _add_explain_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--mask", action="append", required=True, metavar="[NAME=]TERM,...", help="a mask kind; may be repeated")
    add("--seq-len", type=_size, required=True, metavar="S", help="tokens of the whole sequence")
    add("--ranks", type=_size, required=True, metavar="P", help="ranks that share the sequence")
    add("--weights", default="", metavar="NAME=N,...", help="layers of each kind (default: 1 each)")
    add("--rank", type=int, default=0, metavar="R", help="the rank to look from (default: 0)")
    add("--layout", choices=LAYOUTS, default="balanced", help="who holds which tokens (default: balanced)")
    add("--schedule", choices=SCHEDULES, default="auto", help="how K/V travel (default: auto)")
    add("--batch-size", type=_size, metavar="B", help="needed when a mask depends on b")
    add("--num-heads", type=_size, metavar="H", help="needed when a mask depends on h")
    add("--plot", metavar="FILE", help="also draw it: .png, .svg or .pdf (needs the extra cpflex[viz])")


def _explain(args: argparse.Namespace) -> None:
    plan = cpflex.make_plan(
        _masks(args.mask, args.seq_len),
        args.seq_len,
        rank=args.rank,
        world_size=args.ranks,
        weights=_weights(args.weights),
        batch_size=args.batch_size,
        num_heads=args.num_heads,
        layout=LAYOUTS[args.layout],
        schedule=SCHEDULES[args.schedule],
    )
    print(plan.explain())
    if args.plot:
        plan.plot(args.plot)
        print(f"\nwrote {args.plot}")


def _add_simulate_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--mask", action="append", required=True, metavar="[NAME=]TERM,...", help="a mask kind; may be repeated")
    add("--seq-len", type=_size, required=True, metavar="S", help="tokens of the whole sequence")
    add("--ranks", type=_size, required=True, metavar="P", help="ranks that share the sequence")
    add("--weights", default="", metavar="NAME=N,...", help="layers of each kind (default: 1 each)")
    known = ", ".join(TOPOLOGIES)
    add("--topology", default="h100-ib", metavar="NAME", help=f"{known}, or a file of Topology.save (default: h100-ib)")
    add("--gpus-per-node", type=int, metavar="G", help="ranks on one node (default: the topology's)")
    add("--links", default="", metavar="nvlink:370,ib:47", help="10^9 bytes a second inside a node, and of one NIC")
    add("--device", default="h100", metavar="NAME", help=f"{', '.join(DEVICES)} (default: h100)")
    add("--tflops", type=float, metavar="T", help="10^12 operations a second of the kernels (default: the device's)")
    add("--heads", default="32,8,128", metavar="Q,KV,DIM", help="query heads, key heads, head dim (default: 32,8,128)")
    add("--layout", choices=LAYOUTS, default="balanced", help="who holds which tokens (default: balanced)")
    add("--batch-size", type=_size, metavar="B", help="needed when a mask depends on b")
    add("--num-heads", type=_size, metavar="H", help="needed when a mask depends on h")
    add("--all", action="store_true", help="show every schedule, not only the best ones")
    add("--plot", metavar="FILE", help="also draw the timeline of the best: .png, .svg or .pdf (needs cpflex[viz])")


def _simulate(args: argparse.Namespace) -> None:
    from cpflex.seeing.simulate import Workload, say_on, simulate, table

    masks, machine = _masks(args.mask, args.seq_len), _machine(args)
    documents = {
        kind: lengths for kind, spec in zip(masks, args.mask, strict=True) for lengths in _packed(spec, args.seq_len)
    }
    workload = Workload(masks, args.seq_len, _weights(args.weights), documents, args.batch_size, args.num_heads)
    outcome = simulate(workload, args.ranks, machine, LAYOUTS[args.layout], say_on(sys.stderr))
    print(table(workload, args.ranks, machine, outcome, everything=args.all))
    if args.plot:
        from cpflex.seeing.timeline import plot_timeline

        best = outcome.best(ours=True)
        plot_timeline(best, f"{args.seq_len:,} tokens on {args.ranks} ranks   ·   {best.name}", args.plot)
        print(f"\nwrote {args.plot}")


def _machine(args: argparse.Namespace) -> Machine:
    is_file = args.topology not in TOPOLOGIES and Path(args.topology).is_file()
    topology = Topology.load(args.topology) if is_file else Topology.named(args.topology)
    device = Device.named(args.device)
    links = [re.fullmatch(r"(\w+):(\d+(?:\.\d+)?)", part.strip()) for part in args.links.split(",") if part]
    rates: dict[str, float] = {}
    for link in links:
        fields = [field for field, names in LINKS.items() if link and link[1] in names]
        if link is None or not fields:
            names = ", ".join(itertools.chain(*LINKS.values()))
            raise ValueError(f"--links must look like nvlink:370,ib:47, of {names}; got {args.links!r}")
        rates[fields[0]] = float(link[2])
    gpus = min(args.gpus_per_node or topology.gpus_per_node, args.ranks)
    topology = replace(topology, gpus_per_node=gpus, **rates)
    heads = re.fullmatch(r"(\d+),(\d+),(\d+)", args.heads)
    if heads is None:
        raise ValueError(f"--heads must look like 32,8,128; got {args.heads!r}")
    return Machine(topology, replace(device, tflops=args.tflops or device.tflops), Heads(*map(int, heads.groups())))


def _packed(spec: str, seq_len: int) -> Iterator[list[int]]:
    """Lengths of the documents of a mask that rings over zigzag layouts can compute, none for one dense sequence."""
    terms = sorted(term.strip() for term in spec.split("=")[-1].split(","))
    if terms == ["causal"]:
        yield []
    elif len(terms) == 2 and terms[0] == "causal" and re.match(r"docs?\b", terms[1]):
        name, *values = terms[1].split(":")
        cu_seqlens = _cu_seqlens(Path(values[0]), seq_len) if name == "doc" else _drawn(values, seq_len)
        yield [end - start for start, end in itertools.pairwise(cu_seqlens)]


def _drawn(values: Sequence[str], seq_len: int) -> list[int]:
    """Documents' ends, drawn."""
    return draw_documents(seq_len, _size(values[0]) if values else 0)


def _doctor(args: argparse.Namespace) -> None:
    from cpflex.seeing.doctor import examine

    if not examine():
        raise SystemExit(1)


def _masks(specs: Sequence[str], seq_len: int) -> dict[str, MaskFn]:
    """Mask kinds by name; the only one needs no name."""
    masks: dict[str, MaskFn] = {}
    for spec in specs:
        named = re.fullmatch(r"(\w+)=(.*)", spec)
        name, terms = named.groups() if named else ("mask", spec)
        if not named and len(specs) > 1:
            raise ValueError(f"several masks must each have a name, for instance --mask sliding={spec}; got {spec!r}")
        if name in masks:
            raise ValueError(f"mask kinds must have different names; got {name!r} twice")
        trees = [_tree(Path(path), seq_len) for path in re.findall(r"(?<![^,\s])tree:([^,]+)", terms)]
        depths, window = (trees[0].depths, _window(terms)) if trees else (None, None)
        masks[name] = reduce(and_, [_mask(term, seq_len, depths, window) for term in terms.split(",")])
    return masks


def _weights(spec: str) -> dict[str, float] | None:
    """full=8,sliding=40"""
    found = [re.fullmatch(r"(\w+)=(\d+(?:\.\d+)?)", part.strip()) for part in spec.split(",")] if spec else []
    if not all(found):
        raise ValueError(f"--weights must look like full=8,sliding=40; got {spec!r}")
    return {match[1]: float(match[2]) for match in found if match} or None


def _window(terms: str) -> int | None:
    """The narrowest one-sided window of several terms, if any."""
    return min(
        (_size(window) for window in re.findall(r"(?<![^,\s])window:([^,:\s]+)\s*(?![^,])", terms)), default=None
    )


def _mask(term: str, seq_len: int, depths: Tensor | None, window: int | None) -> MaskMod:
    """The mask of one term; windows count by ``depths``, and trees are told the ``window``."""
    name, *values = term.strip().split(":")
    match name, values:
        case "causal", []:
            return cpflex.causal()
        case "full", []:
            return cpflex.full()
        case "window", [_] | [_, _]:
            return cpflex.sliding_window(*map(_size, values), positions=depths)
        case "doc", [path]:
            return cpflex.document(cu_seqlens=_cu_seqlens(Path(path), seq_len))
        case "tree", [path]:
            return cpflex.tree(_tree(Path(path), seq_len), window=window)
        case "docs", [] | [_]:
            return cpflex.document(cu_seqlens=_drawn(values, seq_len))
        case "prefix", [length]:
            return cpflex.prefix_lm(_size(length))
        case _, [function] if function.isidentifier():
            return _imported(name, function)
    raise ValueError(f"unknown mask term {term!r}; the terms are\n\n{TERMS}")


def _imported(module: str, function: str) -> MaskMod:
    try:
        found: MaskFn | None = getattr(importlib.import_module(module), function, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # something that the module itself imports
        text = f"unknown mask term '{module}:{function}', and there is no module {module!r}; the terms are"
        raise ValueError(f"{text}\n\n{TERMS}") from error
    if not callable(found):
        raise ValueError(f"mask term '{module}:{function}' must name a mask_mod; got {found!r} from that module")
    return found if isinstance(found, MaskMod) else MaskMod(found, function)


def _cu_seqlens(path: Path, seq_len: int) -> list[int]:
    """Where documents start, and the end."""
    lengths = path.read_text().split()
    wrong = [length for length in lengths if not length.isdecimal() or int(length) == 0]
    if wrong:
        raise ValueError(f"{path} must hold the documents' lengths, each at least 1; got {wrong[0]!r}")
    starts = [0, *itertools.accumulate(map(int, lengths))]
    if starts[-1] != seq_len:
        raise ValueError(f"the lengths in {path} must sum to the sequence's {seq_len} tokens; got {starts[-1]}")
    return starts


def _tree(path: Path, seq_len: int) -> Tree:
    rows = [re.fullmatch(r"\s*(-?\d+)\s+(\d+)\s*", line) for line in path.read_text().splitlines()]
    if not rows or not all(rows):
        raise ValueError(f"{path} must hold a parent and a length of each segment, one segment a line")
    parents, lengths = zip(*(map(int, row.groups()) for row in rows if row), strict=True)
    return Tree(parents, lengths, seq_len=seq_len)


def _size(text: str) -> int:
    """64k -> 65536."""
    found = re.fullmatch(r"(\d+)([kmg]?)", text.lower())
    if not found:
        raise argparse.ArgumentTypeError(f"a size must be a number, or one such as 64k or 1m; got {text!r}")
    return int(found[1]) << {"": 0, "k": 10, "m": 20, "g": 30}[found[2]]


if __name__ == "__main__":
    main()
