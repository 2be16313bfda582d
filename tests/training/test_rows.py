"""What training sees of a corpus: cut, padded and tokenised again, and what is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from spd_lens.files import read_json
from spd_lens.generation.corpus import Corpus, Record
from spd_lens.generation.generate import generate
from spd_lens.models.load import load
from spd_lens.models.pair import ModelPair
from spd_lens.runs.config import SPDConfig
from spd_lens.runs.pipeline import run
from spd_lens.settings import TrainingSettings
from spd_lens.training.finetune import finetune
from spd_lens.training.length_groups import passes
from spd_lens.training.rows import LazyRows, collated, corpus_rows, retokenised, scored_padding, token_rows
from tests.conftest import N_CTX, build_llama, build_tokenizer
from tests.helpers import refused
from tests.models.zoo import build_twin

LONG = Record("long", "p", "c", (0, 5, 6, 7), (8, 9, 10, 11, 1), "eos")
SHORT = Record("short", "p", "c", (0, 5), (7, 1), "eos")
PADDED = {"max_length": 6, "loss_on_padding": True}


def test_the_corpus_own_ids_cut_and_padded():
    rows = token_rows([LONG, SHORT], "all", max_length=6)
    assert [row["input_ids"] for row in rows] == [[0, 5, 6, 7, 8, 9], [0, 5, 7, 1]]
    assert [row["labels"] for row in rows] == [[-100, 5, 6, 7, 8, 9], [-100, 5, 7, 1]]
    batch = collated(token_rows([LONG, SHORT], "all", max_length=6, pad_id=1), pad_id=3)
    assert batch["input_ids"].tolist() == [[0, 5, 6, 7, 8, 9], [0, 5, 7, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 5, 6, 7, 8, 9], [-100, 5, 7, 1, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 1, 0, 0]]
    rows = token_rows([LONG, SHORT], "completion", max_length=6, pad_id=1)
    assert [row["labels"] for row in rows] == [[-100] * 4 + [8, 9], [-100] * 2 + [7, 1, 1, 1]]
    # cut within the prompt: nothing but the prompt is there, and the lengths agree
    rows = token_rows([LONG], "completion", max_length=3, pad_id=1)
    assert rows == [{"input_ids": [0, 5, 6], "labels": [-100] * 3, "attention_mask": [1] * 3}]


def test_padding_that_is_scored_stays_in_its_pass_and_other_padding_goes():
    batch = collated(token_rows([LONG, SHORT, SHORT], "all", max_length=100, pad_id=1), pad_id=1)
    found = passes(batch)
    assert [part["input_ids"].shape for part in found] == [(3, 100)]
    assert sum(int((part["labels"] != -100).sum()) for part in found) == 3 * 99


def test_a_character_that_begins_in_the_prompt_is_whole_in_the_text():
    tokenizer = build_tokenizer(chat=False)
    apple = tokenizer("🍎", add_special_tokens=False)["input_ids"]
    assert len(apple) > 2
    record = Record("x", "p", "c", (0, 5, *apple[:2]), (*apple[2:], 7, 1), "eos")
    [(ids, start)] = retokenised([record], tokenizer)
    text = tokenizer.decode([5, *apple, 7])
    assert ids == tokenizer(text)["input_ids"]
    assert start == len(tokenizer(text[: text.index("🍎")])["input_ids"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_on_padding": True}, ["loss_on_padding", "max_length"]),
        ({"warmup_epochs": 3.5}, ["warmup_epochs", "3.5", "2 epochs"]),
        ({"warmup_epochs": -1}, ["warmup_epochs", "-1", "at least 0"]),
        ({"warmup_epochs": float("nan")}, ["warmup_epochs", "nan"]),
        ({"warmup_epochs": float("inf")}, ["warmup_epochs", "inf"]),
        ({"warmup_epochs": True}, ["warmup_epochs", "a number"]),
        ({"max_length": 1}, ["max_length", "1", "at least 2"]),
        ({"max_length": 8.5}, ["max_length", "8.5", "whole number"]),
        ({"early_stop": "yes"}, ["early_stop", "'yes'", "True or False"]),
        ({"retokenise": 1}, ["retokenise", "1", "True or False"]),
        ({"loss_on_padding": None}, ["loss_on_padding", "None", "True or False"]),
        ({"max_length": N_CTX + 1, "loss_on_padding": True}, [f"max_length = {N_CTX + 1}", f"{N_CTX}", "lower"]),
        ({"max_length": 3, "loss_on": "completion"}, ["'long'", "max_length", "loss_on='all'"]),
    ],
)
def test_what_cannot_be_trained_so_is_refused_and_nothing_is_written(tiny_pair, tmp_path, options, words):
    with refused(*words):
        finetune(tiny_pair, Corpus([LONG, SHORT]), out=tmp_path / "out", epochs=2, progress=False, **options)
    assert not list(tmp_path.iterdir())


def test_padding_that_the_tokenizer_does_not_have_is_refused(tiny_pair):
    for pad, words in ((None, ["has none"]), ("<|extra|>", ["token 400", "embedding"])):
        tokenizer = build_tokenizer(chat=False)
        if pad is None:
            tokenizer.pad_token = None
        else:
            tokenizer.add_special_tokens({"pad_token": pad})
        pair = ModelPair(tiny_pair.hf, tokenizer, name="tiny")
        settings = TrainingSettings(max_length=9, loss_on_padding=True)
        with refused("padding token", "tiny", *words, "pad_token"):
            scored_padding(pair, settings)
        assert scored_padding(pair, TrainingSettings(max_length=9)) is None
    assert scored_padding(tiny_pair, settings) == tiny_pair.tokenizer.pad_token_id


def test_padding_that_ends_no_completion_is_said(tiny_pair, caplog):
    tokenizer = build_tokenizer(chat=False)
    pair = ModelPair(tiny_pair.hf, tokenizer, name="tiny")
    settings = TrainingSettings(max_length=9, loss_on_padding=True)
    for pad, said in ((tokenizer.pad_token, tokenizer.pad_token != tokenizer.eos_token), (tokenizer.eos_token, False)):
        tokenizer.pad_token = pad
        caplog.clear()
        corpus_rows(pair, [SHORT], settings)
        assert (f"the padding token {pad} of tiny ends no completion ({tokenizer.eos_token} do)" in caplog.text) == said
        corpus_rows(pair, [SHORT], TrainingSettings(max_length=9))
        assert caplog.text.count("ends no completion") == said
    tokenizer.pad_token = "<|pad|>" if tokenizer.pad_token == "<|pad|>" else tokenizer.convert_ids_to_tokens(5)
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, None)
    caplog.clear()
    corpus_rows(pair, [SHORT], settings)
    assert "ends no completion" in caplog.text


def test_a_text_that_grows_beyond_the_context_when_it_is_tokenised_again_is_refused(tiny_pair):
    tokenizer = build_tokenizer(chat=False)
    tokenizer.add_tokens([" apples and more apples"])
    [added] = tokenizer.convert_tokens_to_ids([" apples and more apples"])
    pair = ModelPair(build_llama(tokenizer), tokenizer, name="tiny")
    # two of the added token's text make, without it, another number of tokens: the tokenizer here is another one
    corpus = Corpus([Record("x", "p", "c", (0, 5), (added,) * 60, "length")])
    assert len(corpus_rows(pair, corpus, TrainingSettings(retokenise=True))[0]["input_ids"]) <= 62
    pair.tokenizer = build_tokenizer(chat=False)
    pair.tokenizer.decode = tokenizer.decode
    with refused("'x'", "tokenised again", f"context {N_CTX}", "max_length"):
        corpus_rows(pair, corpus, TrainingSettings(retokenise=True))
    assert len(corpus_rows(pair, corpus, TrainingSettings(retokenise=True, max_length=99))[0]["input_ids"]) == 99


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gpt_neox", "qwen2_moe", "bloom", "opt"])
def test_other_architectures_train_on_padding_with_transformers_own_loss(tmp_path, name):
    """Absolute positions, windows, alibi: what a mask does there is the model's affair."""
    twin = build_twin(name)
    for module in twin.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):  # OPT's own
            module.dropout = 0.0
    tokenizer = build_tokenizer(chat=False)
    pair = ModelPair(twin, tokenizer, name=name)
    corpus = Corpus([LONG, SHORT, Record("c", "p", "c", (0, 5, 6), tuple(range(7, 25)), "length")])
    settings = TrainingSettings(max_length=30, loss_on_padding=True)
    batch = collated(corpus_rows(pair, corpus, settings), pair.pad_id)
    with torch.no_grad():
        logits = twin(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    labels = batch["labels"][:, 1:]
    expected = -logits[:, :-1].log_softmax(-1).gather(2, labels[..., None]).mean().item()
    out = finetune(pair, corpus, out=tmp_path / "out", settings=settings, dropout=0.0, epochs=1, progress=False)
    [entry] = read_json(out / "training.json")["log"]
    assert entry["loss"] == pytest.approx(expected, rel=1e-4)


def test_recomputed_and_accumulated_padding_changes_nothing(tiny_pair, tmp_path):
    corpus = Corpus([LONG, SHORT, LONG, SHORT])
    for record, id in zip(corpus.records, "abcd", strict=True):
        object.__setattr__(record, "id", id)
    options = {"lr": 1e-3, "epochs": 2, "dropout": 0.0, "max_length": 20, "loss_on_padding": True, "progress": False}
    made = {
        name: finetune(tiny_pair, corpus, out=tmp_path / name, **options, **more)
        for name, more in {
            "whole": {"batch_size": 4, "gradient_checkpointing": False},
            "recomputed": {"batch_size": 4, "gradient_checkpointing": True},
            "accumulated": {"batch_size": 1, "gradient_accumulation": 4},
        }.items()
    }
    weights = {name: load_file(out / "adapter_model.safetensors") for name, out in made.items()}
    assert all(torch.equal(weights["whole"][key], value) for key, value in weights["recomputed"].items())
    losses = {name: [e["loss"] for e in read_json(out / "training.json")["log"]] for name, out in made.items()}
    assert losses["accumulated"] == pytest.approx(losses["whole"], rel=1e-5)


def test_in_bfloat16_padding_is_trained_on_too(tiny_llama_dir, tmp_path):
    """Attention is computed another way there, which must mind the mask as well."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        pair = load(str(tiny_llama_dir), dtype=dtype, device="cpu")
        out = finetune(
            pair, Corpus([LONG, SHORT]), out=tmp_path / dtype, epochs=1, max_length=30, loss_on_padding=True,
            dropout=0.0, progress=False,
        )  # fmt: skip
        losses[dtype] = read_json(out / "training.json")["log"][0]["loss"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=2e-2)


def test_a_whole_run_with_every_setting(tiny_settings, tmp_path):
    protocol = {
        "retokenise": True, "max_length": 64, "loss_on_padding": True, "warmup_epochs": 0.5, "early_stop": True,
        "max_prompt_tokens": 20, "policies": ["base", "spd"],
    }  # fmt: skip
    config = SPDConfig.make(tiny_settings | protocol)
    done = run(config, tmp_path / "run", progress=False)
    assert max(record.n_prompt_tokens for record in done.corpus) == 20
    noted = read_json(tmp_path / "run" / "adapter" / "training.json")
    assert {name: noted["settings"][name] for name in ("retokenise", "max_length", "early_stop")} == {
        "retokenise": True, "max_length": 64, "early_stop": True,
    }  # fmt: skip
    assert noted["n_scored_tokens"] == 63 * len(done.corpus)
    with refused("loss_on_padding", "max_length"):
        run(SPDConfig.make(tiny_settings | {"loss_on_padding": True}), tmp_path / "other", progress=False)
    assert not (tmp_path / "other").exists()


def test_a_length_that_leaves_nothing_of_a_completion_is_refused_before_any_is_written(tiny_settings, tmp_path):
    settings = tiny_settings | {"loss_on": "completion", "max_length": 20}
    with refused("training prompt", "tokens", "max_length = 20", "max_prompt_tokens"):
        run(SPDConfig.make(settings), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    done = run(SPDConfig.make(settings | {"max_prompt_tokens": 12, "epochs": 1}), tmp_path / "run", progress=False)
    assert read_json(done.adapter / "training.json")["n_scored_tokens"] <= 8 * len(done.corpus)


@pytest.mark.parametrize("how", [{}, {"retokenise": True, "max_length": 24}])
def test_a_streamed_corpus_trains_the_same_bits(tiny_pair, tiny_prompts, tmp_path, monkeypatch, how):
    options = {"lr": 1e-3, "epochs": 2, "batch_size": 4, "progress": False, **how}
    path = tmp_path / "corpus.jsonl"
    generate(tiny_pair, tiny_prompts, max_new_tokens=24, temperature=3.0, top_p=1.0, seed=9, progress=False, path=path)
    held = finetune(tiny_pair, Corpus.load(path), out=tmp_path / "held", **options)
    monkeypatch.setattr("spd_lens.generation.corpus.STREAMED_FROM", 0)
    streamed = Corpus.load(path)
    assert isinstance(corpus_rows(tiny_pair, streamed, TrainingSettings(retokenise="retokenise" in how)), LazyRows)
    out = finetune(tiny_pair, streamed, out=tmp_path / "streamed", **options)
    ours, theirs = (load_file(place / "adapter_model.safetensors") for place in (out, held))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (read_json(place / "training.json") for place in (out, held))
    assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
