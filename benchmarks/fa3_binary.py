"""FlashAttention-3's published kernels for sm_90, read from the library in the wheel of fa3-fwd."""

from __future__ import annotations

import functools
import re
import zipfile
from importlib.util import find_spec
from pathlib import Path

import sass

CONSUMERS = {64: 3, 128: 2}
"""Warpgroups of 64 queries that compute; one more copies."""
FLAGS = {
    (64, "full"): "000000001100",
    (64, "causal"): "100000011100",
    (64, "causal+softcap"): "101000011100",
    (128, "full"): "000000011100",
    (128, "causal"): "100000011100",
    (128, "causal+softcap"): "101000011100",
}
"""Causal, local, softcap, variable lengths and so on, as they stand in the name of a kernel: the plain ones."""


def code(library: Path, head_dim: int, mods: str) -> sass.Code | None:
    """None where there is no plain kernel of the mods."""
    if (head_dim, mods) not in FLAGS:
        return None
    found = [x for x in functions(library) if re.search(pattern(head_dim, mods), x)]
    assert len(found) == 1, f"{library} has {len(found)} kernels of D {head_dim}, {mods}; another version's names?"
    return sass.code_of(library, found[0])


def pattern(head_dim: int, mods: str) -> str:
    """Of mangled names: two stages, no cluster, bf16; among those with values of 128 dims, not one of 192 for keys."""
    no_cluster = "CollectiveMainloopFwdSm90ILi2EN4cute5tupleIJNS5_1CILi1EEES8_S8_EEE"
    tile = "(?:(?!EEELi).)*" if head_dim == 64 else "(?:(?!EEELi|ILi192E).)*"
    flags = "".join(f"Lb{flag}E" for flag in FLAGS[head_dim, mods])
    return rf"{no_cluster}NS6_IJ{tile}EEELi{head_dim}ENS_10bfloat16_tEfNS_4arch4Sm90E{flags}E"


@functools.cache
def functions(library: Path) -> list[str]:
    return re.findall(r"Function (\S+):", sass.cuobjdump("-res-usage", str(library)))


def library_of(path: Path | None, cache: Path) -> Path | None:
    """The library that is given, or in a wheel, or of what is installed."""
    if path is None:
        spec = find_spec("fa3_fwd")
        found = [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.glob("*.so"))
        return found[0] if found else None
    if path.suffix != ".whl":
        return path
    with zipfile.ZipFile(path) as wheel:
        (name,) = (x for x in wheel.namelist() if x.endswith(".so"))
        if not (cache / path.stem / name).exists():
            wheel.extract(name, cache / path.stem)
    return cache / path.stem / name
