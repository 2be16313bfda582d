"""docs/interoperation.md: every block is run, with the library that it is about."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import spd_lens as spd
from spd_lens.subspaces.bases import squared_cosines
from tests.conftest import BACKENDS
from tests.helpers import EXAMPLES

PAGE = (Path(__file__).parents[1] / "docs" / "interoperation.md").read_text(encoding="utf-8")
PARTS = {part.partition("\n")[0]: part for part in PAGE.split("\n## ")[1:]}


def follow(part, names, *, between=lambda number: None):
    """Execute the blocks of a part as one module; `between` is called after each with its number."""
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", PARTS[part], re.MULTILINE | re.DOTALL)):
        exec(compile(block, f"docs/interoperation.md: {part}", "exec", dont_inherit=True), names)
        between(number)
    return names


@pytest.fixture(scope="module")
def subspace(tiny_pair):
    return spd.extract(tiny_pair, EXAMPLES, engine="twin", progress=False).subspace(3)


@pytest.fixture(autouse=True)
def _apart(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def assert_same_projectors(one, other):
    assert one.sites == other.sites and one.ranks == other.ranks
    for site in one.sites:
        torch.testing.assert_close(one.projector(site), other.projector(site), rtol=0, atol=1e-12)


@pytest.mark.skipif("hooked" in BACKENDS, reason="these tools came with TransformerLens 4.3")
def test_transformer_lens(subspace):
    found = follow("TransformerLens's own subspace tools", {"subspace": subspace})
    site, control = found["site"], found["control"]
    mine, random = subspace.blocks(site)[0], control.blocks(site)[0]
    width, rank = mine.shape
    assert float(found["overlap"].score) == pytest.approx(float(squared_cosines(mine, random).sum()))
    assert found["chance"].mean / rank == pytest.approx(rank / width)
    drawn = torch.stack([squared_cosines(mine, subspace.random_like(i).blocks(site)[0]).sum() for i in range(2000)])
    assert float(drawn.mean()) == pytest.approx(found["chance"].mean, rel=0.05)
    assert float(drawn.var()) == pytest.approx(found["chance"].variance, rel=0.15)
    assert_same_projectors(found["back"], subspace.select([site]))
    x = torch.randn(5, width, dtype=torch.float64)
    torch.testing.assert_close(found["projected"](x), x @ subspace.projector(site)[0])
    moved = found["placebo"](x, torch.zeros_like(x))
    distances = [(y - x).norm(dim=-1) for y in (moved, found["projected"](x))]
    torch.testing.assert_close(*distances)
    assert not torch.allclose(moved, found["projected"](x))


def test_numpy(subspace):
    found = follow("NumPy", {"subspace": subspace, "Site": spd.Site, "spd": spd, "torch": torch})
    assert_same_projectors(found["from_numpy"], subspace)
    assert all(array.dtype == np.float64 for array in np.load("subspace.npz").values())


def test_corpora(tiny_pair):
    examples = [spd.Example(id=f"p{i}", prompt=text) for i, text in enumerate(("Tom", "7 *", "Sara reads"))]
    corpus = spd.generate(tiny_pair, examples, temperature=0.0, max_new_tokens=6, progress=False)

    def answer(number):
        """Stand where the server stands: the completions under their ids, last one first."""
        if number == 1:
            requests = [json.loads(line) for line in Path("requests.jsonl").read_text().splitlines()]
            assert [request["body"]["prompt"] for request in requests] == [list(r.prompt_ids) for r in corpus]
            with Path("answers.jsonl").open("w") as file:
                for request, record in reversed(list(zip(requests, corpus, strict=True))):
                    ended = "length" if record.finish_reason == "length" else "stop"
                    choice = {"text": record.completion, "finish_reason": ended, "token_ids": record.completion_ids}
                    body = {"choices": [choice]}
                    said = {"custom_id": request["custom_id"], "response": {"status_code": 200, "body": body}}
                    file.write(json.dumps(said) + "\n")

    found = follow("Corpora", {"corpus": corpus, "examples": examples, "pair": tiny_pair, "spd": spd}, between=answer)
    assert list(found["again"]) == list(corpus)
    assert sorted(found["batch"], key=lambda record: record.id) == list(corpus)
