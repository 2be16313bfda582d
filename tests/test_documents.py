"""What README, docs/ and notebooks name is there: imports, modules, files, links, commands and their flags."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import typer

from spd_lens.analysis.index import ANALYSES
from spd_lens.cli.commands import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
NOTEBOOKS = {
    f"notebooks/{path.name}": "\n".join(
        "".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
    )
    for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
}
TEXTS = DOCUMENTS | NOTEBOOKS
FLAG = r"(--[a-z][\w-]*)"
EXAMPLES = ("NAME", "span-lengths")
"""Names in the place of which a reader has others."""


def _all(pattern: str, texts: dict[str, str] = TEXTS) -> list[tuple[str, str]]:
    """(document, match) of a pattern, each once."""
    return list(dict.fromkeys((name, found) for name, text in texts.items() for found in re.findall(pattern, text)))


IMPORT = r"(?m)^ *(from spd_lens[\w.]* import (?:\([^)]+\)|[^(\n]+)|import spd_lens.*)$"


@pytest.mark.parametrize(("document", "line"), _all(IMPORT))
def test_import_lines_work(document: str, line: str) -> None:
    exec(line, {})


def test_dotted_names_are_modules_or_in_one() -> None:
    names = _all(r"`(spd_lens(?:\.\w+)+)\b") + _all(r"python -m (spd_lens[\w.]*\w)")
    names += [(document, name.replace("spd.", "spd_lens.", 1)) for document, name in _all(r"`(spd(?:\.\w+)+)\b")]
    gone = []
    for document, name in names:
        if name.endswith(EXAMPLES):
            continue
        try:
            resolve_name(name)
        except (ImportError, AttributeError):
            gone.append((document, name))
    assert len(names) > 10
    assert not gone


def test_files_that_are_named_exist() -> None:
    paths = _all(r"`((?:spd_lens|analysis|tests|docs|benchmarks|scripts|notebooks)/[\w./-]*)`")
    real = [(document, path) for document, path in paths if not set(EXAMPLES) & set(path.split("/"))]
    assert len(real) > 10
    assert not [(name, path) for name, path in real if not any((ROOT / f"{path}{end}").exists() for end in ("", ".py"))]


def _anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"(?m)^#+ (.+)$", text)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere() -> None:
    lost = []
    for document, link in _all(r"\]\((?!https?:)([^)\s]+)\)", DOCUMENTS):
        file, _, anchor = link.partition("#")
        target = ((ROOT / document).parent / file).resolve() if file else ROOT / document
        if not target.exists() or (anchor and anchor not in _anchors(target.read_text(encoding="utf-8"))):
            lost.append((document, link))
    assert not lost


def _options(arguments: list[str]) -> set[str] | None:
    """The flags of a command, or None where there is no such command."""
    commands: Any = typer.main.get_command(app)
    name = arguments[0] if arguments else ""
    if name == "analyze" and len(arguments) > 1 and not arguments[1].startswith("-"):
        if (found := ANALYSES.get(arguments[1].replace("-", "_"))) is None:
            return None
        single = typer.Typer()
        single.command()(importlib.import_module(found.module, package="spd_lens.analysis").main)
        command = typer.main.get_command(single)
    elif (command := commands.commands.get(name)) is None:
        return None
    options = [option for option in command.params if option.param_type_name == "option"]
    return {flag for option in options for flag in [*option.opts, *option.secondary_opts]} | {"--help"}


def _commands() -> Iterator[tuple[str, str]]:
    """(document, command) of every `spd-lens ...`, in a block of code or in a sentence."""
    for document, text in TEXTS.items():
        for found in re.findall(r"(?m)`(spd-lens [^`]+)`|^ *(?:\$ )?(spd-lens [^\n`]*)$", text):
            yield document, " ".join("".join(found).split())


def test_commands_and_their_flags_exist() -> None:
    wrong = []
    for document, line in dict.fromkeys(_commands()):
        words = shlex.split(line.replace("…", ""), comments=True)[1:]
        if not words or words[0].startswith("-") or words[1:2] and words[1] in EXAMPLES:
            continue
        options = _options(words)
        flags = [word.partition("=")[0] for word in words if re.fullmatch(FLAG + "(=.*)?", word)]
        if options is None or not options.issuperset(flags):
            wrong.append((document, line))
    assert not wrong


def test_targets_of_make_exist() -> None:
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8")))
    named = _all(r"(?m)(?:`|^)make ([a-z-]+)")
    assert named and not [(document, target) for document, target in named if target not in targets]


def test_what_the_changelog_says_has_moved_is_there() -> None:
    moved = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition("### Moved")[2].partition("### Fixed")[0]
    now = [
        cell for row in re.findall(r"(?m)^\| `.+ \| (.+) \|$", moved) for cell in re.findall(r"`(spd_lens[\w.]+)`", row)
    ]
    assert len(now) > 10
    for name in now:
        resolve_name(name)
