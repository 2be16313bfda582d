"""Tokenizers that add tokens behind a text, have none to pad with, or know tokens that the model has no row for."""

import copy
import json
import shutil

import pytest
import torch
from tokenizers import processors

import spd_lens as spd
from spd_lens.errors import TooLong
from spd_lens.evaluation.teacher_forced import ForcedBatch, teacher_forced
from spd_lens.models.pair import ModelPair
from spd_lens.models.prompts import PromptFormat
from spd_lens.models.tokenizer import load_tokenizer, text_ids, tokenised
from spd_lens.runs.model_check import check_model
from spd_lens.subspaces.policy import Policy
from tests.conftest import BACKENDS, CHAT_TEMPLATE, SPECIALS, build_llama, build_tokenizer
from tests.helpers import EXAMPLES, refused

QUIET = {"progress": False}


def adding(around, chat=False):
    """A tokenizer that puts special tokens around a text, as `add_bos_token` and `add_eos_token` make it."""
    tokenizer = build_tokenizer(chat=chat, bos=False)
    ids = [(token, id) for id, token in enumerate(SPECIALS)]
    tokenizer.backend_tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(single=around, special_tokens=ids)]
    )
    return tokenizer


BEHIND = {
    "<|bos|> $A <|eos|>": "<|bos|> $A",
    "$A <|eos|>": "$A",
    "<|bos|> <|start|> $A <|end|> <|eos|>": "<|bos|> <|start|> $A",
}
"""What is added, and what of it a text gets that goes on."""


@pytest.mark.parametrize("around", BEHIND)
@pytest.mark.parametrize("text", ["7 * 3", "", "\n", "ends itself<|eos|>", "<|eos|>", "<|bos|><|eos|>", " été 😀"])
def test_a_text_that_goes_on_has_nothing_behind_it(around, text):
    found, wanted = (tokenised(adding(kind), text) for kind in (around, BEHIND[around]))
    assert found == wanted
    assert found.ids == adding(BEHIND[around])(text)["input_ids"]
    assert tokenised(adding(around), text, specials=False).ids == adding("$A")(text)["input_ids"]


@pytest.mark.parametrize("around", BEHIND)
@pytest.mark.parametrize("chat", [False, True])
def test_an_eos_that_the_tokenizer_adds_is_neither_in_a_prompt_nor_scored(around, chat, tmp_path):
    """Everything is what it is with a tokenizer that does not add it, to the bit."""

    def job(kind):
        pair = ModelPair(build_llama(tokenizer := adding(kind, chat)), tokenizer, name="same")
        encoded = [pair.encode(example, loss) for example in EXAMPLES for loss in ("aligned", "full")]
        targets = ForcedBatch.of(encoded, pair).target.tolist()
        forced = teacher_forced(pair, EXAMPLES, [Policy("base")], **QUIET)["base"]
        moments = spd.extract(pair, EXAMPLES, layers=3, engine="twin", **QUIET)
        corpus = spd.generate(pair, ["7 * 3", "Tom has 12"], max_new_tokens=5, **QUIET)
        return pair, encoded, targets, forced, moments.gradient, corpus.records

    (pair, encoded, targets, forced, gradient, records), plain = job(around), job(BEHIND[around])
    assert pair.tokenizer.eos_token_id not in targets
    assert all(record.prompt_ids[-1] != pair.tokenizer.eos_token_id for record in records)
    assert (encoded, targets, forced, records) == (plain[1], plain[2], plain[3], plain[5])
    assert all(torch.equal(gradient[site], plain[4][site]) for site in gradient)


def without(*names):
    tokenizer = build_tokenizer(chat=False)
    for name in names:
        setattr(tokenizer, name, None)
    return tokenizer


def beyond(name):
    """The model has no row for the token of that name."""
    tokenizer = build_tokenizer(chat=False)
    tokenizer.add_special_tokens({name: "<|new|>"})
    return tokenizer


PADS = {
    "no pad": lambda: without("pad_token"),
    "no pad, no eos": lambda: without("pad_token", "eos_token"),
    "pad beyond": lambda: beyond("pad_token"),
    "eos beyond, no pad": lambda: [tokenizer := beyond("eos_token"), setattr(tokenizer, "pad_token", None)][0],
}


@pytest.fixture(scope="module")
def ordinary():
    tokenizer = build_tokenizer(chat=False)
    return build_llama(tokenizer), results(ModelPair(build_llama(tokenizer), tokenizer, name="same"))


def results(pair):
    """What every stage makes of rows of unequal length."""
    engines = ("lens", "twin")
    moments = [spd.extract(pair, EXAMPLES, layers=3, engine=engine, **QUIET) for engine in engines]
    corpus = spd.generate(pair, ["7 * 3", "Tom has 12 apples and more"], max_new_tokens=5, temperature=0.0, **QUIET)
    forced = teacher_forced(pair, EXAMPLES, [Policy("base")], **QUIET)["base"]
    scores = spd.evaluate(pair, "synthetic-math", 3, max_new_tokens=4, **QUIET)
    return moments, [record.completion_ids for record in corpus], forced, [item.completion for item in scores.items]


@pytest.mark.parametrize("kind", PADS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_row_will_do_as_padding(kind, backend, ordinary, tmp_path):
    hf, (moments, completions, forced, scored) = ordinary
    tokenizer = PADS[kind]()
    before = (tokenizer.pad_token, tokenizer.eos_token, len(tokenizer))
    pair = ModelPair(copy.deepcopy(hf), tokenizer, name="same", backend=backend)
    assert 0 <= pair.pad_id < pair.hf.get_input_embeddings().weight.shape[0]
    found = results(pair)
    for one, other in zip(found[0], moments, strict=True):
        for site in one.sites:
            torch.testing.assert_close(one.gradient[site], other.gradient[site], rtol=1e-4, atol=1e-7)
    if "eos" not in kind:  # else nothing ends a completion
        assert found[1:] == ([*completions], forced, scored)
    assert [item.aligned_loss for item in found[2]] == pytest.approx([item.aligned_loss for item in forced], rel=1e-5)
    assert all(check.passed is not False for check in check_model(pair)), check_model(pair)
    corpus = spd.generate(pair, ["7 * 3", "Tom has 12 apples and more"], max_new_tokens=5, **QUIET)
    assert spd.finetune(pair, corpus, out=tmp_path / "adapter", epochs=1, batch_size=2, **QUIET).is_dir()
    assert before == (tokenizer.pad_token, tokenizer.eos_token, len(tokenizer)), "the user's tokenizer is as it was"


def test_a_token_beyond_the_embedding_is_named_before_anything_is_run(ordinary):
    tokenizer = beyond("pad_token")
    pair = ModelPair(copy.deepcopy(ordinary[0]), tokenizer)
    words = ("<|new|>", str(tokenizer.pad_token_id), f"{tokenizer.pad_token_id} rows", "not resized")
    example = spd.Example("x<|new|>", "7", [(0, 1)], "mine")
    for call in (
        lambda: spd.generate(pair, [example], **QUIET),
        lambda: spd.extract(pair, [example], **QUIET),
        lambda: teacher_forced(pair, [example], [Policy("base")], **QUIET),
    ):
        with refused("'mine'", *words):
            call()


def test_a_bos_beyond_the_embedding_is_refused_when_loaded():
    tokenizer = build_tokenizer(chat=False)
    hf = build_llama(tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    with refused("'<s>'", str(tokenizer.bos_token_id), "rows"):
        ModelPair(hf, tokenizer)


class Counting:
    """A tokenizer that counts what it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.characters = tokenizer, 0

    def __call__(self, text, **options):
        self.characters += len(text)
        return self.tokenizer(text, **options)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


@pytest.mark.parametrize("text", ["word ", "a", "1 ", "😀", "\n"])
def test_megabytes_are_not_tokenised_to_their_end(tiny_pair, text):
    tokenizer = Counting(tiny_pair.tokenizer)
    with pytest.raises(TooLong, match="characters, of which the first .* tokens, more than the context of 256"):
        tokenised(tokenizer, text * 5_000_000, most=256)
    assert tokenizer.characters < 100_000
    assert tokenised(tokenizer, text * 100, most=256).ids == text_ids(tiny_pair.tokenizer, text * 100)


@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_of_megabytes_is_refused_by_name(chat):
    tokenizer = build_tokenizer(chat=chat)
    pair = ModelPair(build_llama(tokenizer), tokenizer)
    huge = spd.Example("seven times three " * 500_000, "21", [(0, 2)], "huge")
    for call in (
        lambda: spd.generate(pair, [huge], **QUIET),
        lambda: spd.extract(pair, [huge], **QUIET),
        lambda: spd.extract(pair, [spd.Example("q", "21 " * 3_000_000, [(0, 2)], "huge")], **QUIET),
    ):
        with refused("characters", "more than the context of 256 tokens", "shorten it or leave it out"):
            call()
    assert PromptFormat.choose(tokenizer).prompt_ids("7 * 3") == pair.prompt_ids(spd.Example("7 * 3"))


def test_a_text_that_fits_is_tokenised_however_many_characters_a_token_has(tiny_pair):
    """Sixteen characters a token are not the most that there are."""
    tokenizer = build_tokenizer(chat=False)
    tokenizer.add_tokens(["x" * 100])
    text = "x" * 20_000
    assert len(tokenised(tokenizer, text, most=256).ids) == 201


def test_half_a_character_in_a_prompt(tiny_pair):
    for prompt in ("\ud83d", "Hi \udc00 there"):
        with refused("half a character", "prompt"):
            spd.generate(tiny_pair, [prompt], **QUIET)
    assert CHAT_TEMPLATE  # chat prompts go the same way
    pair = ModelPair(build_llama(tokenizer := build_tokenizer(chat=True)), tokenizer)
    with refused("half a character"):
        spd.generate(pair, ["\ud83d"], **QUIET)


def test_a_tokenizer_that_would_take_all_memory_is_refused_before_it_reads(tiny_llama_dir, tmp_path):
    shutil.copytree(tiny_llama_dir, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    replace = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    for normaliser in (
        {"type": "Sequence", "normalizers": [replace] * 3},
        {"type": "Prepend", "prepend": "a" * 10**7},
        {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [replace]}, replace]},
    ):
        path.write_text(json.dumps(content | {"normalizer": normaliser}))
        with refused(tmp_path, "all memory"):
            load_tokenizer(str(tmp_path))
    ordinary = [{"type": "Prepend", "prepend": "_"}, {"type": "Replace", "pattern": {"String": " "}, "content": "__"}]
    path.write_text(json.dumps(content | {"normalizer": {"type": "Sequence", "normalizers": ordinary}}))
    load_tokenizer(str(tmp_path))


def test_a_longest_text_that_is_no_number(tiny_llama_dir, tmp_path):
    shutil.copytree(tiny_llama_dir, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": "x"}))
    with refused(tmp_path, "model_max_length = 'x'"):
        load_tokenizer(str(tmp_path))
