"""The house: imports go downward, the simple case loads little, and public names are documented."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import cpflex
from patience import patience

ROOT = Path(cpflex.__file__).parent
LONGEST_FILE = 550
"""Lines. A kernel file may be longer."""

FLOORS = (
    {"integrations", "__main__"},
    {"__init__"},
    {"seeing"},
    {"attention", "recurrent", "testing", "trees"},
    {"planning", "paging"},
    {"ring"},
    {"kernels", "sharding", "loss", "masks_from"},
    {"mods", "tile_mask", "links", "masks", "topology", "version"},
)
"""The rooms from the top. A room knows those on the floors below it, and no neighbour on its own."""

REACHES_UP = {("planning.plan", "seeing.explain"), ("paging.decode_plan", "seeing.explain_steps")}
"""Inside a function, when it is called: `Plan.explain` and `Plan.plot`, `DecodePlan.explain`."""

MUST_NOT_KNOW = {
    "sharding.layout": {"masks", "mods", "links", "tile_mask"},
    "sharding.shard": {"masks", "mods", "tile_mask"},
    "sharding.balance": {"links", "masks", "mods"},
    "ring.transport": {"kernels", "mods", "masks", "tile_mask", "handles"},
    "ring.agreement": {"kernels", "mods", "sharding", "tile_mask"},
    "ring.schedule": {"kernels", "links", "mods", "masks"},
    "ring.two_level": {"kernels", "links", "mods", "masks", "tile_mask"},
    "ring.forward": {"mods", "sharding", "links", "tile_mask", "ring.schedule"},
    "ring.backward": {"mods", "sharding", "links", "tile_mask", "ring.schedule"},
    "kernels.reference": {"kernels.forward", "kernels.backward"},
    "kernels": {"links", "masks"},
    "paging.pages": {"kernels", "ring", "paging.decode_plan"},
    "paging.tables": {"kernels", "links", "ring"},
    "paging.travel": {"paging", "kernels", "links", "ring", "masks", "mods"},
    "paging.traffic": {"kernels", "links", "ring", "masks"},
    "paging.divided": {"links", "masks", "mods", "ring"},
    "paging.decode": {"links", "masks", "mods", "ring"},
    "loss": {"masks", "mods", "tile_mask"},
    "planning.plan": {"planning.make", "masks", "planning.needs", "planning.squares", "planning.tables"},
    "seeing.explain": {"attention", "links"},
    "trees.tree": {"planning", "ring", "kernels", "sharding", "links"},
    "testing": {"planning", "ring", "kernels", "sharding"},
    "integrations": {"ring", "kernels", "mods", "tile_mask", "sharding", "seeing"},
}
"""Transport knows no attention, layouts no masks, the loops neither masks nor layouts."""


@cache
def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1]) if len(parts) > 1 and parts[-1] == "__init__" else ".".join(parts)
        found[name] = path
    return found


def imports(name: str, later: bool = False) -> set[str]:
    """Modules of the package that a module imports when it is loaded, or also ``later``, inside functions; not those for
    type checking.
    """
    found: set[str] = set()
    pending: list[ast.AST] = list(ast.parse(modules()[name].read_text()).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not later:
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            found.update(_module(alias.name, None) for alias in node.names if alias.name.split(".")[0] == "cpflex")
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "cpflex":
            found.update(_module(node.module, alias.name) for alias in node.names)
        pending.extend(ast.iter_child_nodes(node))
    return found - {name}


def _module(dotted: str, member: str | None) -> str:
    """The module that an import statement loads, without the name of the package."""
    inside = ".".join(dotted.split(".")[1:])
    for candidate in (".".join(filter(None, (inside, member))) if member else inside, inside or "__init__"):
        if candidate in modules():
            return candidate
    raise AssertionError(f"no module {dotted} {member}")


def room(name: str) -> str:
    return name.split(".")[0]


def floor(name: str) -> int:
    """0 is the top."""
    (found,) = [number for number, rooms in enumerate(FLOORS) if room(name) in rooms]
    return found


def test_every_room_has_one_floor():
    assert sorted(set(map(room, modules()))) == sorted(name for rooms in FLOORS for name in rooms)


@pytest.mark.parametrize("name", modules())
def test_imports_go_downward_only(name: str):
    up = {other for other in imports(name, later=True) if room(other) != room(name) and floor(other) <= floor(name)}
    assert {(name, other) for other in up} <= REACHES_UP
    assert not up & imports(name), f"{name} reaches up when it is loaded, to {sorted(up)}"


def test_what_may_reach_up_does():
    assert all(other in imports(name, later=True) - imports(name) for name, other in REACHES_UP)


@pytest.mark.parametrize("name", MUST_NOT_KNOW)
def test_no_file_knows_what_is_not_its_business(name: str):
    inside = [module for module in modules() if module == name or module.startswith(f"{name}.")]
    known = set.union(*(imports(module) for module in inside))
    assert not {other for other in known if other in MUST_NOT_KNOW[name] or room(other) in MUST_NOT_KNOW[name]}


def test_no_two_files_import_each_other():
    packages = {name for name in modules() if modules()[name].name == "__init__.py"}
    graph = {name: imports(name) for name in modules() if name not in packages}
    list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("name", [name for name in modules() if room(name) != "kernels"])
def test_no_file_is_too_long_to_read(name: str):
    assert len(modules()[name].read_text().splitlines()) <= LONGEST_FILE


@pytest.mark.parametrize("name", modules())
def test_every_file_says_what_it_is(name: str):
    assert ast.get_docstring(ast.parse(modules()[name].read_text())), f"{name} has no docstring"


@pytest.mark.parametrize("name", modules())
def test_the_library_reads_no_environment_and_never_swallows_errors(name: str):
    text = modules()[name].read_text()
    assert "os.environ" not in text
    assert "getenv" not in text
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{name}:{node.lineno}: a bare except"


def loaded_by(code: str) -> set[str]:
    said = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        timeout=patience(120),
    )
    return {name.split(".")[0] for name in said.stdout.split()}


def test_importing_the_library_loads_neither_triton_nor_plots_nor_models():
    alone = loaded_by("import torch, torch.distributed.tensor, torch.nn.attention.flex_attention")
    added = loaded_by("import cpflex") - alone
    assert not added & {"triton", "matplotlib", "transformers", "torchtitan", "rich", "pandas", "scipy"}


def test_the_public_names_are_those_that_are_documented():
    assert cpflex.__all__ == sorted(cpflex.__all__)
    for name in cpflex.__all__:
        thing = getattr(cpflex, name)
        assert inspect.getdoc(thing), f"cpflex.{name} has no docstring"
    public = {name for name in vars(cpflex) if not name.startswith("_") and not inspect.ismodule(getattr(cpflex, name))}
    assert public == set(cpflex.__all__)


def test_the_design_names_what_is_public():
    promised = "causal full sliding_window document prefix_lm make_plan Plan flex_attention score_mod"
    promised += " contiguous zigzag striped balanced ring direct auto"
    assert set(promised.split()) <= set(cpflex.__all__)


@pytest.mark.parametrize("name", [name for name in cpflex.__all__ if inspect.isclass(getattr(cpflex, name))])
def test_every_public_method_has_a_docstring(name: str):
    kind = getattr(cpflex, name)
    if issubclass(kind, Exception):
        return
    for member, value in vars(kind).items():
        if not member.startswith("_") and inspect.isfunction(value):
            assert inspect.getdoc(value), f"{name}.{member} has no docstring"


def test_flex_attention_has_the_signature_of_torchs():
    from torch.nn.attention.flex_attention import flex_attention

    torchs, ours = (inspect.signature(fn).parameters for fn in (flex_attention, cpflex.flex_attention))
    assert list(ours) == list(torchs)
    for name, parameter in torchs.items():
        assert (ours[name].default, ours[name].kind) == (parameter.default, parameter.kind), name


def test_the_package_is_typed():
    assert (ROOT / "py.typed").exists()
