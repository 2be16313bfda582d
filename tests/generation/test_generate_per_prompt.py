"""Each prompt under the subspace that was chosen for it: as if that one had been given alone."""

from __future__ import annotations

import pytest
import torch

from spd_lens.errors import SPDError
from spd_lens.examples import Example
from spd_lens.generation.corpus import Corpus
from spd_lens.generation.engines.twin import TwinEngine
from spd_lens.generation.generate import generate
from spd_lens.generation.slots import Slots
from spd_lens.subspaces.subspace import Subspace
from tests.helpers import assert_same_bits, refused

OPTIONS = {"max_new_tokens": 12, "temperature": 1.2, "top_p": 0.9, "progress": False}


@pytest.fixture
def prompts(tiny_prompts):
    return [Example(text, id=f"p{i}") for i, text in enumerate(tiny_prompts)]


def subspaces(pair):
    template = torch.eye(8, dtype=torch.float64)[:, :3].expand(2, -1, -1).clone()
    sites = pair.sites("last_mid")
    plain = Subspace(dict.fromkeys(sites, template), dict.fromkeys(sites, (3, 3)))
    return plain.random_like(0), plain.random_like(1)


@pytest.fixture
def choice(any_tiny_pair):
    first, second = subspaces(any_tiny_pair)
    return {"p0": first, "p1": None, "p2": second, "p3": first, "p4": None, "p5": second}


@pytest.mark.parametrize("options", [{}, {"batch_size": 2, "samples_per_prompt": 2}, {"strength": 0.5}])
def test_every_completion_is_that_of_its_subspace_alone(any_tiny_pair, prompts, choice, options, state_of):
    state = state_of(any_tiny_pair.hf)
    mixed = generate(any_tiny_pair, prompts, subspace=choice, **OPTIONS, **options)
    assert_same_bits(any_tiny_pair.hf, state)
    samples = options.get("samples_per_prompt", 1)
    assert [r.key for r in mixed] == [(p.id, s) for p in prompts for s in range(samples)]
    alone = {
        key: generate(any_tiny_pair, prompts, subspace=found, **OPTIONS, **options)
        for key, found in {"first": choice["p0"], "second": choice["p2"], "none": None}.items()
    }
    for i, name in enumerate(["first", "none", "second", "first", "none", "second"]):
        for place in range(samples * i, samples * (i + 1)):
            assert mixed[place] == alone[name][place]
            assert all(mixed[place] != other[place] for key, other in alone.items() if key != name)


def test_a_function_of_the_example_and_the_lens_do_the_same(any_tiny_pair, prompts, choice):
    mapped = generate(any_tiny_pair, prompts, subspace=choice, **OPTIONS)
    asked = []

    def choose(example):
        asked.append(example)
        return choice[example.id]

    assert generate(any_tiny_pair, prompts, subspace=choose, samples_per_prompt=2, **OPTIONS)[::2] == mapped.records
    assert asked == prompts  # once each, whatever the samples
    assert generate(any_tiny_pair, prompts, subspace=choice, engine="lens", **OPTIONS).records == mapped.records


def test_the_settings_say_which(tiny_pair, prompts, choice):
    first, second = subspaces(tiny_pair)
    choice = {**choice, "p0": first, "p3": first, "p2": second, "p5": second}
    settings = generate(tiny_pair, prompts, subspace=choice, **OPTIONS).settings
    digests = [first.digest(), None, second.digest()]
    assert settings["subspace"] == dict(zip(choice, digests * 2, strict=True))
    assert settings["strength"] == 1.0
    nothing = generate(tiny_pair, prompts, subspace=lambda example: None, **OPTIONS)
    assert set(nothing.settings["subspace"].values()) == {None} and nothing.settings["strength"] is None
    assert nothing.records == generate(tiny_pair, prompts, **OPTIONS).records


def test_equal_subspaces_are_one_group(tiny_pair, prompts, monkeypatch):
    """Folding costs time, so objects with the same numbers share it."""
    opened = []
    under = TwinEngine.under

    def counted(engine, policy):
        opened.append(policy)
        return under(engine, policy)

    monkeypatch.setattr(TwinEngine, "under", counted)
    generate(tiny_pair, prompts, subspace=lambda example: subspaces(tiny_pair)[0], **OPTIONS)
    assert len(opened) == 1
    generate(tiny_pair, prompts, subspace=lambda e: subspaces(tiny_pair)[len(e.prompt) % 2], **OPTIONS)
    assert len(opened) == 3


def test_an_interrupted_corpus_is_continued(any_tiny_pair, prompts, choice, tmp_path, monkeypatch):
    options = {**OPTIONS, "subspace": choice, "batch_size": 1}
    whole = generate(any_tiny_pair, prompts, **options)
    path = tmp_path / "corpus.jsonl"
    admit, left = Slots._admit, iter(range(3))

    def until_killed(slots, jobs, first):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return admit(slots, jobs, first)

    with monkeypatch.context() as patch:
        patch.setattr(Slots, "_admit", until_killed)
        with pytest.raises(KeyboardInterrupt):
            generate(any_tiny_pair, prompts, path=path, **options)
    part = Corpus.load(path)
    assert len(part) == 3 and not part.complete
    with refused("subspace", "another path"):
        generate(any_tiny_pair, prompts, path=path, **{**options, "subspace": {**choice, "p1": choice["p0"]}})
    with refused("subspace"):
        generate(any_tiny_pair, prompts, path=path, **{**options, "subspace": choice["p0"]})
    assert generate(any_tiny_pair, prompts, path=path, **options).records == whole.records
    assert Corpus.load(path).settings == whole.settings


@pytest.mark.parametrize(
    ("subspace", "words"),
    [
        ({"p0": None}, ["p1", "None for none"]),
        (lambda example: "spd", ["p0", "'spd'", "Subspace or None"]),
    ],
)
def test_a_choice_that_is_none_is_refused(tiny_pair, prompts, subspace, words, tmp_path):
    with refused(*words):
        generate(tiny_pair, prompts, subspace=subspace, path=tmp_path / "c.jsonl", **OPTIONS)
    assert not list(tmp_path.iterdir())


def test_a_subspace_of_another_model_is_refused_before_anything_is_written(tiny_pair, prompts, tmp_path):
    first, _ = subspaces(tiny_pair)
    site = first.sites[0]
    foreign = Subspace({site: first.bases[site][:1]}, {site: (3,)})
    with pytest.raises(SPDError, match="does not exist"):
        generate(
            tiny_pair, prompts, subspace=lambda e: foreign if e.id == "p5" else first, path=tmp_path / "c", **OPTIONS
        )
    assert not list(tmp_path.iterdir())
