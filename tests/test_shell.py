"""`spd-lens` from scripts: JSON, logs, completion, examples, and what a file gets where a terminal gets a bar."""

from __future__ import annotations

import io
import json
import logging
import shlex

import pytest
import typer

from spd_lens.cli.commands import app
from spd_lens.cli.examples import EXAMPLES
from spd_lens.output.progress import progress_bar
from spd_lens.subspaces.projection import fold_to
from spd_lens.subspaces.subspace import Subspace


def test_every_command_has_examples_that_can_be_pasted():
    commands = typer.main.get_command(app).commands
    assert set(EXAMPLES) == set(commands)
    for name, lines in EXAMPLES.items():
        for line in lines:
            program, told, *words = shlex.split(line)
            assert (program, told) == ("spd-lens", name)
            commands[name].make_context(name, words)  # raises what a user would read


def test_examples_stand_under_help(call):
    code, out, _ = call("verify", "--help")
    assert code == 0 and EXAMPLES["verify"][0] in out


def test_json_of_a_run(call, finished_run):
    path = finished_run.path
    code, out, _ = call("grade", path, "--json")
    grades = json.loads(out)
    assert code == 0 and grades and all(set(one) == {"of", "grade", "reasons"} and one["reasons"] for one in grades)
    code, out, _ = call("verify", path, "--json")
    assert code == 0 and json.loads(out)["damaged"] == [] and json.loads(out)["n_files"] > 5
    code, out, _ = call("compare", path, path, "--json")
    found = json.loads(out)
    assert code == 0 and found
    assert all(one["difference"]["value"] == 0 and one["verdict"] for one in found)


def test_json_of_damage(call, finished_run, copied):
    file = copied / "summary.md"
    file.write_text(file.read_text() + "one line more\n")
    code, out, err = call("verify", copied, "--json")
    assert code == 2 and "summary.md" in json.loads(out)["damaged"][0] and "are not what was written" in err


@pytest.fixture
def copied(finished_run, tmp_path):
    import shutil

    return shutil.copytree(finished_run.path, tmp_path / "copied")


def test_json_of_a_projection_in_weights(call, finished_run, tiny_pair, tmp_path):
    subspace = Subspace.load(finished_run.path / "subspace.safetensors")
    folded = fold_to(tiny_pair.hf, subspace.random_like(0), tmp_path / "folded", tokenizer=tiny_pair.tokenizer)
    code, out, _ = call("detect", folded, "--json")
    found = json.loads(out)
    ranks = {str(site): list(ranks) for site, ranks in subspace.ranks.items()}
    assert code == 0 and {site: one["ranks"] for site, one in found["projections"].items()} == ranks
    code, out, _ = call("detect", tiny_pair.name, "--json")
    assert code == 0 and json.loads(out)["projections"] == {}


def test_the_log_goes_to_a_file_too(call, finished_run, tmp_path):
    log = logging.getLogger("spd_lens")
    before = list(log.handlers), list(logging.getLogger("py.warnings").handlers)
    file = tmp_path / "log.txt"
    try:
        assert call("--log-file", file, "run", "--show-config")[0] == 0
        log.warning("a \x1b[31mred\u202e line")
        last = file.read_text().splitlines()[-1]
        assert last.endswith("WARNING spd_lens: a \\u001b[31mred\\u202e line")
    finally:
        for name, handlers in zip(("spd_lens", "py.warnings"), before, strict=True):
            logging.getLogger(name).handlers = handlers
    code, _, err = call("--log-file", tmp_path / "none" / "log.txt", "grade", finished_run.path)
    assert code == 2 and "choose another --log-file" in err


def test_version(call):
    code, out, _ = call("--version")
    assert code == 0 and out.strip().count(".") == 2


def test_completion_for_shells(call, monkeypatch):
    code, out, _ = call("--show-completion", "bash")
    assert code == 0 and "COMPLETE" in out


class _Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("shown", "file", "drawn"), [(True, _Terminal, True), (True, io.StringIO, False), (False, _Terminal, False)]
)
def test_a_bar_is_drawn_on_a_terminal_alone(shown, file, drawn):
    stream = file()
    with progress_bar(shown, total=3, file=stream) as bar:
        bar.update(3)
    assert ("3/3" in stream.getvalue()) is drawn
