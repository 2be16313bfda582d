"""The floor plan of docs/architecture.md holds: imports go down, through faces, and never round in a circle."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
FLOORS = [set(line.split()) for line in ARCHITECTURE.partition("```floors\n")[2].partition("```")[0].splitlines()]
"""From the top floor to the ground floor, as docs/architecture.md has them."""


def _files() -> dict[str, Path]:
    """Every source file by its dotted name; a package's name stands for its face."""
    found = {}
    for top in ("spd_lens", "analysis", "benchmarks", "scripts"):
        for path in sorted((ROOT / top).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[f"spd_lens.{name}" if top == "analysis" else name] = path
    return found


FILES = _files()
PACKAGES = {name for name, path in FILES.items() if path.name == "__init__.py"}


def _tree(name: str) -> ast.Module:
    """A file's syntax tree; of a face that loads lazily, the stub that says what it hands on."""
    path = FILES[name]
    stub = path.with_suffix(".pyi")
    return ast.parse((stub if stub.exists() else path).read_text(encoding="utf-8"))


def _handed_on(package: str) -> set[str]:
    """The names of a face that stand for something in one of its files, not for a file."""
    nodes = [node for node in ast.walk(_tree(package)) if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name for node in nodes if node.module for alias in node.names}


HANDED_ON = {package: _handed_on(package) for package in PACKAGES}


def _imported(name: str) -> Iterator[str]:
    """The files of this project that a file imports, also inside functions and for types alone."""
    package = name.split(".") if name in PACKAGES else name.split(".")[:-1]
    for node in ast.walk(_tree(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                module = f"{base}.{alias.name}"
                if module in FILES and alias.name not in HANDED_ON.get(base, ()):
                    yield module
                elif base in FILES:
                    yield base


EDGES = {name: set(_imported(name)) - {name} for name in FILES}


def _room(name: str) -> str:
    """The module or package directly in `spd_lens`, or the folder beside it, that a file belongs to."""
    parts = name.split(".")
    return parts[1] if parts[0] == "spd_lens" and len(parts) > 1 else parts[0]


ROOMS = {_room(name) for name in FILES} - {"spd_lens"}
ARROWS = sorted(
    {
        (_room(name), _room(target))
        for name, targets in EDGES.items()
        for target in targets
        if "spd_lens" not in (_room(name), _room(target)) and _room(name) != _room(target)
    }
)


def _floor(room: str) -> int:
    return next(number for number, rooms in enumerate(reversed(FLOORS), start=1) if room in rooms)


def _outside(folder: str) -> str:
    """The package whose face stands for a file to the outside: a room, or one question of the analyses."""
    parts = folder.split(".")
    return ".".join(parts[:3] if parts[:2] == ["spd_lens", "analysis"] else parts[:2])


def test_the_plan_names_every_room_once_and_has_at_most_twelve_floors() -> None:
    planned = [room for rooms in FLOORS for room in rooms]
    assert len(FLOORS) <= 12
    assert len(ROOMS | {"spd_lens"}) <= 27
    assert sorted(planned) == sorted(ROOMS)


def test_every_import_leads_to_a_lower_floor() -> None:
    upward = [(room, target) for room, target in ARROWS if _floor(target) >= _floor(room)]
    assert not upward


def test_no_file_imports_itself_by_way_of_others() -> None:
    inner = {name: targets - {"spd_lens"} for name, targets in EDGES.items() if name != "spd_lens"}
    try:
        TopologicalSorter(inner).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


@pytest.mark.parametrize("name", sorted(FILES))
def test_other_packages_are_imported_through_their_faces(name: str) -> None:
    inside = [
        target
        for target in EDGES[name]
        if target not in PACKAGES and target.count(".") > 1  # neither a face nor a module without one
        if _outside(target) in PACKAGES and _outside(target) != _outside(name)
    ]
    assert not inside


def test_no_analysis_imports_another_but_what_all_share() -> None:
    shared = {"common", "index"}
    across = [
        (name, target)
        for name, targets in EDGES.items()
        for target in targets
        if name.startswith("spd_lens.analysis.") and target.startswith("spd_lens.analysis.")
        if name.split(".")[2] != target.split(".")[2] and target.split(".")[2] not in shared
    ]
    assert not across


@pytest.mark.parametrize("package", sorted(name for name in PACKAGES if name.startswith("spd_lens")))
def test_a_face_hands_on_what_it_lists_and_holds_no_code(package: str) -> None:
    face = importlib.import_module(package)
    missing = [name for name in getattr(face, "__all__", []) if not hasattr(face, name)]
    assert not missing
    code = [node for node in _tree(package).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert not code


def test_a_face_hands_on_no_name_of_a_file_that_holds_something_else() -> None:
    """Python would not find the file under the name that it has."""
    taken = [
        (package, alias.name)
        for package in PACKAGES
        for node in ast.walk(_tree(package))
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
        if f"{package}.{alias.name}" in FILES and node.module.rpartition(".")[2] != alias.name
    ]
    assert not taken


@pytest.mark.parametrize("package", sorted(name for name in PACKAGES if FILES[name].with_suffix(".pyi").exists()))
def test_a_face_that_loads_lazily_has_no_name_of_one_of_its_files(package: str) -> None:
    """Once the file was imported, Python would take it for what was asked for."""
    if package == "spd_lens":
        names = set(importlib.import_module(package).__all__) - {"tasks", "estimators"}
    else:
        names = set(importlib.import_module(package).__all__)
    clashes = [name for name in names if f"{package}.{name}" in FILES]
    assert not clashes


def _rooms_of_the_tables() -> list[tuple[str, str]]:
    """(package, file) of the tables in docs/architecture.md: `| `package/` | `file` ..., `file` ... |`."""
    rows = re.findall(r"^\| `([\w/]+?)/?` \| (.*) \|$", ARCHITECTURE, re.MULTILINE)
    return [(package, file) for package, cell in rows for file in re.findall(r"`([a-z_0-9]+)`", cell)]


def test_the_tables_of_the_architecture_name_files_that_exist() -> None:
    named = _rooms_of_the_tables()
    gone = [
        (package, file)
        for package, file in named
        if not any((ROOT / top / package / f"{file}.py").exists() for top in ("spd_lens", "."))
    ]
    assert named
    assert not gone


def test_the_tables_of_the_architecture_leave_no_file_out() -> None:
    named = {f"{package}/{file}" for package, file in _rooms_of_the_tables()}
    there = set()
    for name, path in FILES.items():
        place = path.relative_to(ROOT)
        parts = place.with_suffix("").parts[1 if place.parts[0] == "spd_lens" else 0 :]
        room = len(parts) == 1 or parts[0] == "analysis" and len(parts) == 2
        if name.startswith("spd_lens.") and name not in PACKAGES and not room and parts[-1] != "__main__":
            there.add("/".join(parts))
    assert not {file for file in there if file not in named}
