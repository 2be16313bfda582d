"""Numbers of numpy and torch are numbers wherever a caller gives them; truth values are no counts."""

import numpy as np
import pytest
import torch

import spd_lens as spd
from spd_lens.analysis.sweeps.grid import Grid
from spd_lens.errors import plain, whole
from spd_lens.study.config import StudyConfig
from tests.helpers import EXAMPLES, refused

QUIET = {"progress": False}


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)], ids=repr)
def test_whole_numbers(value):
    assert whole("n", value) == 3 and type(whole("n", value)) is int


@pytest.mark.parametrize(
    "value",
    [True, np.bool_(True), torch.tensor(True), 3.0, np.float32(3), "3", None, [3], np.array([3]), 0, np.int8(-1)],
)
def test_what_is_no_count(value):
    with refused("rounds is", "whole number of at least 1"):
        whole("rounds", value)


def test_numbers_inside_of_lists_and_mappings():
    given = {np.str_("a"): [np.int64(1), (np.float64(0.5), None)], "b": np.array([1, 2]), "c": "text"}
    assert repr(plain(given)) == "{'a': [1, (0.5, None)], 'b': [1, 2], 'c': 'text'}"


def test_the_whole_job_with_numpy_numbers_is_the_job_with_pythons(tiny_pair, tmp_path):
    """And everything that is written holds plain numbers."""

    def job(folder, integer, real):
        moments = spd.extract(
            tiny_pair, EXAMPLES, layers=integer(3), shards=integer(2), batch_tokens=integer(64), engine="twin", **QUIET
        )
        subspace = moments.subspace(real(0.5))
        subspace.save(folder / "subspace.safetensors")
        subspace.truncate(integer(2)).random_like(integer(7)).save(folder / "random.safetensors")
        corpus = spd.generate(
            tiny_pair, ["7 * 3", spd.Example("Tom", id=integer(5))], subspace={"0": None, integer(5): subspace},
            strength=real(0.5), max_new_tokens=integer(4), temperature=real(0.5), top_p=real(0.75), top_k=integer(9),
            seed=integer(3), batch_size=integer(2), samples_per_prompt=integer(2), path=folder / "corpus.jsonl",
            **QUIET,
        )  # fmt: skip
        adapter = spd.finetune(
            tiny_pair, corpus, rank=integer(2), alpha=integer(4), dropout=real(0.25), lr=real(0.0625), seed=integer(1),
            weight_decay=real(0.5), epochs=integer(1), batch_size=integer(2), gradient_accumulation=integer(1),
            save_steps=integer(1), **QUIET,
        )  # fmt: skip
        result = spd.evaluate(
            tiny_pair, "synthetic-math", integer(3), subspace, strength=real(0.5), seed=integer(2),
            path=folder / "e.jsonl", max_new_tokens=integer(4), batch_size=integer(2), **QUIET,
        )  # fmt: skip
        result.save(folder / "eval.json")
        with spd.projected(tiny_pair.lens, subspace, real(0.5)):
            torch.save(tiny_pair.check_logits(tiny_pair.lens), folder / "logits.pt")
        spd.fold_to(tiny_pair.hf, subspace, folder / "folded", real(0.5))
        subspace.to_lora(tiny_pair.hf, folder / "lora", strength=real(0.5))
        assert [record.id for record in corpus] == ["0", "0", "5", "5"]
        left_out = ("training.json",)  # seconds
        files = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        assert adapter == folder / "adapter"
        return {path: content for path, content in files.items() if path.name not in left_out}

    folders = [tmp_path / name for name in ("python", "numpy")]
    for folder in folders:
        folder.mkdir()
    found = [job(folders[0], int, float), job(folders[1], np.int64, np.float32)]
    same_but_order = "adapter_config.json"  # PEFT writes a set
    assert found[0].keys() == found[1].keys()
    assert [p for p in found[0] if found[0][p] != found[1][p] and p.name != same_but_order] == []
    # the same call again, with the other kind of number, continues
    again = spd.generate(
        tiny_pair, ["7 * 3", spd.Example("Tom", id="5")], subspace=None, path=folders[0] / "new.jsonl",
        max_new_tokens=4, **QUIET,
    )  # fmt: skip
    other = spd.generate(
        tiny_pair, ["7 * 3", spd.Example("Tom", id=np.int64(5))], path=folders[0] / "new.jsonl",
        max_new_tokens=np.int64(4), **QUIET,
    )  # fmt: skip
    assert again.records == other.records


@pytest.mark.parametrize(
    "layers", [np.int64(3), np.array([1, 3]), [np.int32(3)], (1, np.int64(3)), torch.tensor(3), iter([1, 3]), "1,3"]
)
def test_layers(tiny_pair, layers):
    assert {site.layer for site in tiny_pair.sites(layers)} in ({3}, {1, 3})


@pytest.mark.parametrize("layers", [True, np.bool_(True), [True], 1.0, np.float32(1), [None], np.array([1.5])])
def test_what_is_no_layer(tiny_pair, layers):
    with refused("does not exist", "blocks 0 to 3"):
        tiny_pair.sites(layers)


CALLS = {
    "shards": lambda pair, n: spd.extract(pair, EXAMPLES, shards=n, **QUIET),
    "batch_tokens": lambda pair, n: spd.extract(pair, EXAMPLES, batch_tokens=n, **QUIET),
    "max_new_tokens": lambda pair, n: spd.generate(pair, ["q"], max_new_tokens=n, **QUIET),
    "samples_per_prompt": lambda pair, n: spd.generate(pair, ["q"], samples_per_prompt=n, **QUIET),
    "batch_size": lambda pair, n: spd.generate(pair, ["q"], batch_size=n, **QUIET),
    "top_k": lambda pair, n: spd.generate(pair, ["q"], top_k=n, **QUIET),
    "seed": lambda pair, n: spd.generate(pair, ["q"], seed=n, **QUIET),
    "n": lambda pair, n: spd.evaluate(pair, "synthetic-math", n, **QUIET),
    "max_new_tokens of synthetic-math": lambda pair, n: spd.tasks.get("synthetic-math", max_new_tokens=n),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("value", [True, np.bool_(True), 2.5, "2"], ids=repr)
def test_counts_in_public_calls(tiny_pair, name, value):
    with refused(f"{name} is {value!r}".replace("np.True_", "True"), "a whole number"):
        CALLS[name](tiny_pair, value)


def test_settings_with_numpy_numbers():
    config = spd.SPDConfig(
        layers=np.int64(3), rank=np.float32(0.5), n_eval=np.int64(8), seed=np.int64(1), lr=np.float32(0.5),
        task_options={"max_new_tokens": np.int64(9)},
    )  # fmt: skip
    assert (config.layers, config.rank, config.n_eval, config.seed, config.lr) == ([3], 0.5, 8, 1, 0.5)
    assert spd.SPDConfig(layers=np.array([3, 1]), n_eval={"gsm8k": np.int64(3)}).n_eval == {"gsm8k": 3}
    assert "max_new_tokens: 9" in config.to_yaml()
    assert StudyConfig(seeds=np.arange(2), n_forced=np.int64(3)).seeds == [0, 1]
    assert Grid(ranks=[np.float32(0.5), np.int64(2)]).ranks == [0.5, 2]


@pytest.mark.parametrize(
    "settings",
    [{"n_train": True}, {"lr": True}, {"top_k": False}, {"rank": True}, {"n_eval": np.bool_(True)}, {"layers": True},
     {"layers": [True]}, {"n_eval": {"gsm8k": True}}],
    ids=str,
)  # fmt: skip
def test_truth_values_are_no_settings_in_numbers(settings):
    with refused(f"setting {next(iter(settings))}", "True" if "top_k" not in settings else "False"):
        spd.SPDConfig.make(settings)


def test_truth_values_are_no_seeds():
    with refused("setting seeds", "True"):
        StudyConfig.make({"seeds": [True]})
    assert spd.SPDConfig(center=True, enable_thinking=False).center is True
