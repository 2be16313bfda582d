"""The scripts that hold engines against each other: what they say where all agree, and where one does not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from spd_lens.generation.generate import generate
from spd_lens.subspaces.subspace import Subspace
from tests.completions_server import NEEDS_OPENAI, serving

PROMPTS = ("Tom", "7 *", "A baker sells 7 loaves")


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts")


@pytest.fixture(scope="module")
def subspace(tiny_pair, tmp_path_factory):
    """A file of random half-rank projections."""
    template = torch.eye(8, dtype=torch.float64)[:, :4].expand(2, -1, -1).clone()
    sites = tiny_pair.sites("last_mid")
    path = tmp_path_factory.mktemp("subspace") / "random.safetensors"
    return Subspace(dict.fromkeys(sites, template), dict.fromkeys(sites, (4, 4))).random_like(0).save(path)


def cells_of(text):
    """The cells of a Markdown table's rows, without those of its head."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_a_row_of_the_table_of_engines(tiny_llama_dir, tiny_pair, subspace, tmp_path, capsys):
    import engine_table

    sizes = ["--model", str(tiny_llama_dir), "--prompts", "4", "--tokens", "6"]
    args = engine_table.parsed([str(subspace), "twin", *sizes])
    lens = engine_table.make(args, "lens", tmp_path / "lens.jsonl", tiny_pair)
    engine_table.row(args, "twin", tiny_pair, tmp_path, lens)
    name, seconds, rate, same, resumed = capsys.readouterr().out.strip(" |\n").split(" | ")
    assert (name, same) == ("twin", "4 of 4") and float(seconds) > 0 and float(rate) > 0
    assert resumed.startswith("yes, from ") and resumed.endswith(" of 4")


@NEEDS_OPENAI
def test_a_server_that_toggles_is_compared_name_by_name(tiny_llama_dir, tiny_pair, subspace, monkeypatch, capsys):
    import toggle

    asked = ["tiny", f"math={subspace}", "--tokens", "6", "--prompt", PROMPTS[0]]
    with serving({"tiny": tiny_llama_dir, "math": tiny_llama_dir}) as served:  # which has no projection at all
        monkeypatch.setattr(sys, "argv", ["toggle.py", served.url, str(tiny_llama_dir), *asked])
        assert toggle.main() == 1
    base, math = cells_of(capsys.readouterr().out)
    expected = generate(tiny_pair, PROMPTS[:1], temperature=0.0, max_new_tokens=6, progress=False)[0]
    assert base[:2] == ["tiny", "6 of 6"] and base[2] == " ".join(expected.completion.split())
    assert math[0] == "math" and math[1] != "6 of 6"


def test_tokens_of_a_second_engine_are_taken_one_by_one(tiny_pair):
    import second_engine

    model = second_engine.NextLogits(tiny_pair.hf)

    def engine(inputs):
        with torch.no_grad():
            return [model(torch.from_numpy(inputs[0])).numpy()]

    for record in generate(tiny_pair, PROMPTS, temperature=0.0, max_new_tokens=6, progress=False):
        assert second_engine.completed(engine, record) == record.completion_ids
        assert second_engine.completed(lambda inputs: [-engine(inputs)[0]], record) != record.completion_ids
