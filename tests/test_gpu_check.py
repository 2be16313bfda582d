"""`make gpu-check`: every stage runs on a tiny model on the CPU; a difference, an error and a missing GPU are told."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import typer

from tests.helpers import refused

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts" / "gpu_check.py")
gpu_check = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = gpu_check  # dataclasses look their module up
SPEC.loader.exec_module(gpu_check)
SMALL = {"device": "cpu", "n": 2, "new_tokens": 4}


@pytest.fixture
def page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"above\n{gpu_check.BEGIN}\nold\n{gpu_check.END}\nbelow\n")
    return page


def test_every_stage_passes_on_the_cpu_and_stands_in_the_page(tiny_llama_dir, page, capsys):
    gpu_check.main(str(tiny_llama_dir), **SMALL, out=page)
    text = page.read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    verdicts = {row[0]: row[3] for row in rows[2:]}
    told = dict.fromkeys(("check", "extraction", "generation", "evaluation", "training"), "passed")
    assert verdicts == told | {"benchmarks": "–", "peak memory": "–"}
    assert text.startswith("above\n") and text.endswith("below\n") and "old" not in text
    assert "the tokens of plain generation" in text and "4 steps" in text
    assert "training: passed" in capsys.readouterr().out


def test_what_differs_and_what_breaks_fail_and_the_rest_goes_on(tiny_llama_dir, page, monkeypatch):
    def other(trial, pair):
        return [[0] * trial.new_tokens for _ in gpu_check._jobs(trial, pair)]

    def broken(trial):
        raise ZeroDivisionError("no kernel")

    monkeypatch.setattr(gpu_check, "_one_by_one", other)
    monkeypatch.setattr(gpu_check, "LIMITS", dict.fromkeys(gpu_check.LIMITS, 0.0))
    monkeypatch.setitem(gpu_check.STAGES, "check", broken)
    with pytest.raises(typer.Exit) as stop:
        gpu_check.main(str(tiny_llama_dir), **SMALL, only="check,extraction,generation,peak memory", out=page)
    assert stop.value.exit_code == 1
    lines = [line for line in page.read_text().splitlines() if line.startswith("|")][2:]
    assert [line.endswith("| FAILED |") for line in lines] == [True, True, True, False]
    assert "ZeroDivisionError: no kernel" in lines[0] and "NOT the tokens" in lines[2]


def test_mistakes_are_one_sentence(page, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with refused("no CUDA GPU", "--device cpu"):
        gpu_check.main("any")
    with refused("unknown stage 'speed'", "peak memory"):
        gpu_check.main("any", **SMALL, only="check,speed")
    page.write_text("no place")
    with refused(page, "no place for the table"):
        gpu_check.main("any", **SMALL, out=page)


def test_the_page_has_a_place_for_the_table():
    text = (ROOT / "docs" / "gpu.md").read_text()
    assert text.index(gpu_check.BEGIN) < text.index(gpu_check.END)
