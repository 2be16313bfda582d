"""What is shipped: the wheel's contents, the declared dependencies, the constraints, and what may lie in the tree."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
LANES = {"constraints.txt": "hooked", "constraints-bridge.txt": "bridge"}


def requirements(*lists: list[str]) -> list[Requirement]:
    """The requirements of these lists, without the project's references to its own extras."""
    parsed = [Requirement(line) for lines in lists for line in lines]
    return [requirement for requirement in parsed if canonicalize_name(requirement.name) != PROJECT["name"]]


def tracked_files() -> list[Path]:
    """The files of the checkout that git tracks and that exist."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout: which files are tracked is unknown")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in a wheel built from a copy of the tree, so that no build output is left in it."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("spd_lens", "analysis"):
        shutil.copytree(ROOT / folder, source / folder, ignore=unwanted)
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", built, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = built.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_wheel_holds_every_module_and_nothing_at_the_top_but_spd_lens(wheel_names: set[str]) -> None:
    library = {str(path.relative_to(ROOT)) for path in (ROOT / "spd_lens").rglob("*.py")}
    analysis = {f"spd_lens/{path.relative_to(ROOT)}" for path in (ROOT / "analysis").rglob("*.py")}
    assert "spd_lens/analysis/__init__.py" in analysis
    assert {name for name in wheel_names if name.endswith(".py")} == library | analysis
    assert {name.split("/")[0] for name in wheel_names if ".dist-info/" not in name} == {"spd_lens"}


def test_wheel_holds_every_file_that_a_module_reads(wheel_names: set[str]) -> None:
    folders = {"spd_lens": ROOT / "spd_lens", "spd_lens/analysis": ROOT / "analysis"}
    data = {
        f"{package}/{path.relative_to(folder)}"
        for package, folder in folders.items()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert {"spd_lens/templates/base.html", "spd_lens/analysis/templates/dashboard.js"} <= data
    assert data <= wheel_names


def test_wheel_holds_the_marker_for_type_checkers_the_licence_and_the_command(wheel_names: set[str]) -> None:
    assert "spd_lens/py.typed" in wheel_names
    assert any(name.endswith("licenses/LICENSE") for name in wheel_names)
    assert any(name.endswith("entry_points.txt") for name in wheel_names)


def test_analysis_is_importable_only_under_spd_lens(tmp_path: Path) -> None:
    code = "import importlib.util, spd_lens.analysis; assert importlib.util.find_spec('analysis') is None"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("requirement", requirements(PROJECT["dependencies"], *EXTRAS.values()), ids=str)
def test_dependency_has_a_lower_and_an_upper_bound(requirement: Requirement) -> None:
    operators = {specifier.operator for specifier in requirement.specifier}
    assert {">=", "<"} <= operators, f"{requirement} needs a lower bound (>=) and an upper bound (<)"


HOLES = {
    "filelock": "3.20.3", "jinja2": "3.1.6", "torch": "2.10", "tqdm": "4.66.3", "transformers": "5.3", "ray": "2.52",
    "setuptools": "78.1.1", "vllm": "0.14.1", "werkzeug": "3.0.6",
}  # fmt: skip
"""The first releases without holes that are known; pyproject.toml names them."""


@pytest.mark.parametrize("name", HOLES)
def test_no_release_with_a_known_hole_is_allowed(name: str) -> None:
    found = [r for r in requirements(PROJECT["dependencies"], *EXTRAS.values()) if r.name == name]
    floors = [Version(one.version) for r in found for one in r.specifier if one.operator == ">="]
    assert floors and min(floors) >= Version(HOLES[name])


def test_every_import_of_the_library_is_a_declared_dependency() -> None:
    declared = {canonicalize_name(r.name) for r in requirements(PROJECT["dependencies"], *EXTRAS.values())}
    distributions = packages_distributions()
    missing: dict[str, str] = {}
    for path in [*(ROOT / "spd_lens").rglob("*.py"), *(ROOT / "analysis").rglob("*.py")]:
        for module in imported_modules(path) - sys.stdlib_module_names - {"spd_lens"}:
            owners = {canonicalize_name(name) for name in distributions.get(module, [module])}
            if not owners & declared:
                missing[module] = str(path.relative_to(ROOT))
    assert not missing, f"imported, but no dependency in pyproject.toml: {missing}"


def imported_modules(path: Path) -> set[str]:
    """The top-level names of all absolute imports in a file, those inside functions included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def pins(name: str) -> dict[str, Version]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(package): Version(version) for package, version in (line.split("==") for line in lines)}


@pytest.mark.parametrize(("name", "lane"), LANES.items())
def test_constraints_pin_what_pyproject_allows(name: str, lane: str) -> None:
    pinned = pins(name)
    extras = {extra: lines for extra, lines in EXTRAS.items() if extra != "hooked" or lane == "hooked"}
    needed = requirements(PROJECT["dependencies"], extras["test"])
    assert not [str(r) for r in needed if canonicalize_name(r.name) not in pinned], f"not pinned in {name}"
    outside = [
        f"{r.name} {pinned[canonicalize_name(r.name)]} is outside {r}"
        for r in requirements(PROJECT["dependencies"], *extras.values())
        if canonicalize_name(r.name) in pinned and pinned[canonicalize_name(r.name)] not in r.specifier
    ]
    assert not outside, f"{name}: {outside}"


def test_the_lanes_differ_in_the_generation_of_transformer_lens() -> None:
    generations = {lane: pins(name)["transformer-lens"].major for name, lane in LANES.items()}
    assert generations == {"hooked": 3, "bridge": 4}


FORBIDDEN = re.compile(
    "|".join(
        [
            r"(?<![\w.~$}-])/" + r"(?:work|farm|root|home/\w+|Users/\w+)/",  # paths of a machine
            r"\b(?:test\.)?pypi" + r"\.(?:org|python\.org)",
            r"files\." + r"pythonhosted",
            r"download\." + r"pytorch",
            r"registry\." + r"npmjs",
            r"https?://[a-z.-]*" + r"debian\.org",
        ]
    )
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("open('" + "/wor" + "k/main/x')", True),
        ("see https://py" + "pi.org/project/x", True),
        ("--index-url https://down" + "load.pytorch.org/whl/cpu", True),
        ("the/work/of others", False),
        ("PyPI wheel, pytorch.org/docs", False),
    ],
)
def test_the_pattern_for_machine_paths_and_registries(text: str, found: bool) -> None:
    assert bool(FORBIDDEN.search(text)) is found


def test_no_file_names_a_machine_path_or_a_package_registry() -> None:
    hits = []
    for path in tracked_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        hits += [f"{path.relative_to(ROOT)}: {match.group()}" for match in FORBIDDEN.finditer(text)]
    assert not hits, "\n".join(hits)


def test_no_tracked_file_is_larger_than_a_megabyte() -> None:
    large = {str(path.relative_to(ROOT)): path.stat().st_size for path in tracked_files()}
    assert not {name: size for name, size in large.items() if size > 1_000_000}
