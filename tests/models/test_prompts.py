"""Spans in characters to positions of tokens, on a tokenizer whose every merge is known."""

import json
from dataclasses import replace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from spd_lens.examples import Example
from spd_lens.models.prompts import PromptFormat
from tests.conftest import CHAT_TEMPLATE, SPECIALS, build_tokenizer
from tests.helpers import EXAMPLES, refused

BOS = 0


def known_tokenizer(*, bos=True, trim_offsets=True, chat=False, added=("42", " 42", "\n\n", "ab")):
    """Bytes, and the tokens `42`, ` 42`, `\\n\\n` and `ab`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = {" ": "Ġ", "\n": "Ċ"}
    words = ["".join(symbols.get(c, c) for c in word) for word in added]
    vocab = {token: i for i, token in enumerate([*SPECIALS, *alphabet, *words])}
    merges = [pair for pair in (("4", "2"), ("Ġ", "42"), ("Ċ", "Ċ"), ("a", "b")) if "".join(pair) in vocab]
    core = Tokenizer(models.BPE(vocab, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    steps = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if bos:
        steps.append(processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", BOS)]))
    core.post_processor = processors.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        extra_special_tokens=["<|start|>", "<|end|>"],
        clean_up_tokenization_spaces=False,
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def scored(tokenizer, prompt, completion, *spans, loss="aligned"):
    """The encoding and the text of each scored token."""
    encoded = PromptFormat.choose(tokenizer).encode(Example(prompt, completion, spans), loss)
    return encoded, [tokenizer.decode([encoded.ids[t]]) for t in encoded.scored]


def test_a_token_that_overlaps_a_span_counts():
    tokenizer = known_tokenizer()
    encoded, texts = scored(tokenizer, "q", "x=42.", (2, 4))
    assert texts == ["42"]
    # <bos> q \n x = 42 .
    assert encoded.scored == [5]
    assert encoded.completion_start == 3
    assert len(encoded.ids) == 7


@pytest.mark.parametrize("span", [(2, 3), (3, 4), (2, 4)])
def test_half_a_token_is_the_whole_token(span):
    assert scored(known_tokenizer(), "q", "x=42.", span)[1] == ["42"]


def test_neighbours_of_a_span_do_not_count():
    assert scored(known_tokenizer(), "q", "x=42.", (1, 2))[1] == ["="]
    assert scored(known_tokenizer(), "q", "x=42.", (4, 5))[1] == ["."]
    assert scored(known_tokenizer(), "q", "x=42.", (1, 5))[1] == ["=", "42", "."]


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_a_token_with_a_leading_space_counts_for_the_number_after_it(trim_offsets):
    tokenizer = known_tokenizer(trim_offsets=trim_offsets)
    assert scored(tokenizer, "q", "x = 42.", (4, 6))[1] == [" 42"]
    assert scored(tokenizer, "q", "x = 42.", (5, 6))[1] == [" 42"]


def test_several_spans_are_one_set_in_order():
    _, texts = scored(known_tokenizer(), "q", "42 is 42!", (8, 9), (0, 2), (1, 2))
    assert texts == ["42", "!"]


@pytest.mark.parametrize(("text", "n_bytes"), [("é", 2), ("€", 3), ("😀", 4)])
def test_every_byte_of_a_character_counts(text, n_bytes):
    tokenizer = known_tokenizer()
    completion = f"a{text}b"
    encoded, _ = scored(tokenizer, "q", completion, (1, 2))
    assert len(encoded.scored) == n_bytes
    assert tokenizer.decode([encoded.ids[t] for t in encoded.scored]) == text
    assert scored(tokenizer, "q", completion, (2, 3))[1] == ["b"], "characters are counted, not bytes"
    assert scored(tokenizer, f"{text}{text}", completion, (2, 3))[1] == ["b"], "in the prompt as well"


def test_prompt_and_completion_are_tokenised_as_one():
    """The raw format ends the prompt with a line break, which merges with one that begins the completion."""
    tokenizer = known_tokenizer()
    encoded, texts = scored(tokenizer, "q", "\nx", (0, 1))
    assert [tokenizer.decode([i]) for i in encoded.ids[1:]] == ["q", "\n\n", "x"]
    assert texts == ["\n\n"]
    assert encoded.completion_start == 2
    alone = PromptFormat.choose(tokenizer).prompt_ids("q")
    assert encoded.ids[: len(alone)] != alone
    assert scored(tokenizer, "q", "\nx", (1, 2))[1] == ["x"]


def test_the_full_loss_scores_every_token_of_the_completion_and_none_of_the_prompt():
    encoded, texts = scored(known_tokenizer(), "42 q", "x=42.", loss="full")
    assert texts == ["x", "=", "42", "."]
    assert encoded.scored[0] == encoded.completion_start
    assert encoded.scored[-1] == len(encoded.ids) - 1
    assert scored(known_tokenizer(), "42 q", "x=42.", (0, 1), loss="full")[1] == texts, "whatever the spans"


def test_bos_is_there_once_and_never_scored():
    for tokenizer, chat in ((known_tokenizer(), False), (known_tokenizer(chat=True), True)):
        form = PromptFormat.choose(tokenizer)
        assert form.chat is chat
        encoded = form.encode(Example("q", "x"), "full")
        assert encoded.ids.count(BOS) == 1
        assert encoded.ids[0] == BOS
        assert form.prompt_ids("q").count(BOS) == 1
        assert 0 not in encoded.scored


def test_what_nothing_predicts_is_not_scored():
    tokenizer = known_tokenizer(bos=False)
    form = PromptFormat.choose(tokenizer)
    # without BOS and with an empty prompt the text begins with "\n", which merges with the completion's own
    encoded = form.encode(Example("", "\nx", [(0, 2)]))
    assert [tokenizer.decode([i]) for i in encoded.ids] == ["\n\n", "x"]
    assert encoded.scored == [1]
    assert encoded.completion_start == 1
    with refused("'lonely'", "no token that the model predicts"):
        form.encode(Example("", "\nx", [(0, 1)], "lonely"))
    with_bos = PromptFormat.choose(known_tokenizer()).encode(Example("", "\nx", [(0, 1)]))
    assert with_bos.scored == [1], "after BOS the same token is predicted"


def test_the_chat_format_is_the_template_with_one_user_turn():
    tokenizer = known_tokenizer(chat=True)
    form = PromptFormat.choose(tokenizer)
    text = "<|bos|><|start|>user\nq<|end|>\n<|start|>assistant\n"
    assert form.text("q") == text
    assert form.name == "chat"
    encoded = form.encode(Example("q", "x=42.", [(2, 4)]))
    assert tokenizer.decode(encoded.ids) == f"{text}x=42."
    assert [tokenizer.decode([encoded.ids[t]]) for t in encoded.scored] == ["42"]
    assert form.prompt_ids("q") == encoded.ids[: encoded.completion_start]


def test_a_system_message_goes_first():
    form = PromptFormat.choose(known_tokenizer(chat=True), system="Be brief.")
    assert form.text("q").startswith("<|bos|><|start|>system\nBe brief.<|end|>\n<|start|>user\nq")
    encoded = form.encode(Example("q", "x=42.", [(2, 4)]))
    assert form.tokenizer.decode([encoded.ids[t] for t in encoded.scored]) == "42"


def test_raw_and_chat_can_be_chosen():
    tokenizer = known_tokenizer(chat=True)
    raw = PromptFormat.choose(tokenizer, "raw")
    assert raw.name == "raw"
    assert raw.text("q") == "q\n"
    assert PromptFormat.choose(tokenizer, "chat").chat
    with refused("'html'", "raw"):
        PromptFormat.choose(tokenizer, "html")
    with refused("no chat template", "raw"):
        PromptFormat.choose(known_tokenizer(), "chat")


def test_generation_starts_from_the_tokens_that_scoring_begins_with(any_tiny_pair):
    for example in EXAMPLES:
        if example.id == "code" and not any_tiny_pair.format.chat:
            continue  # its first line is indented, and the indent merges with the prompt's line break
        encoded = any_tiny_pair.encode(example, "full")
        assert any_tiny_pair.prompt_ids(example) == encoded.ids[: encoded.completion_start]


@pytest.mark.parametrize("bos", [True, False])
def test_scored_tokens_hold_the_spans_characters_on_a_trained_tokenizer(bos):
    tokenizer = build_tokenizer(chat=False, bos=bos)
    for example in EXAMPLES:
        for start, end in example.spans:
            encoded, _ = scored(tokenizer, example.prompt, example.completion, (start, end))
            text = tokenizer.decode([encoded.ids[t] for t in encoded.scored])
            assert text.strip() == example.completion[start:end].strip()


@pytest.mark.parametrize("span", [(0, 0), (3, 2), (-1, 2), (4, 6)])
def test_spans_outside_the_completion(span):
    with refused(f"span {span}", "'mine'", "5 characters"):
        Example("q", "x=42.", [span], "mine")


def test_a_span_without_a_token():
    # a tokenizer that drops what it does not know leaves characters without a token
    core = Tokenizer(models.WordLevel({"q": 0, "x": 1}, unk_token="q"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    form = PromptFormat.choose(PreTrainedTokenizerFast(tokenizer_object=core, pad_token="q", eos_token="q"))
    assert form.encode(Example("q", "x  x", [(3, 4)])).scored == [2]
    with refused("span (1, 3)", "'gap'", "covers no token"):
        form.encode(Example("q", "x  x", [(1, 3)], "gap"))


def test_examples_without_span_or_completion():
    form = PromptFormat.choose(known_tokenizer())
    with refused("'bare'", "no correctness span", "loss='full'"):
        form.encode(Example("q", "x", id="bare"))
    with refused("'open'", "no completion"):
        form.encode(Example("q", id="open"), "full")
    with refused("'half'", "aligned"):
        form.encode(Example("q", "x"), "half")


def test_half_a_character_is_refused():
    """JSON can spell a lone surrogate, which no tokenizer reads."""
    with refused("'torn'", "half a character"):
        PromptFormat.choose(known_tokenizer()).encode(Example("q", json.loads('"\\ud83d"'), [(0, 1)], "torn"))


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False
        chat_template = None

    with refused("Slow", "fast tokenizer"):
        PromptFormat.choose(Slow())


@pytest.mark.parametrize("loss", ["aligned", "full"])
@pytest.mark.parametrize("max_tokens", [2, 4, 6, 7, 8, 100])
def test_a_cut_keeps_the_first_tokens_and_what_is_scored_among_them(loss, max_tokens):
    form = PromptFormat.choose(known_tokenizer())
    example = Example("q", "x=42.", [(0, 1), (2, 4)], "cut")  # <bos> q \n x = 42 .
    uncut = form.encode(example, loss)
    expected = [t for t in uncut.scored if t < max_tokens]
    if not expected:
        with refused("'cut'", "no scored token among its first 2 tokens", "token 3"):
            form.encode(example, loss, max_tokens)
        return
    found = form.encode(example, loss, max_tokens)
    assert found.ids == uncut.ids[:max_tokens]
    assert found.scored == expected
    assert found.completion_start == 3


@pytest.mark.parametrize("loss", ["aligned", "full"])
def test_marked_tokens_are_those_that_hold_a_marked_character(any_tiny_pair, loss):
    completion = "He has 48/2 = 24 and 24.\n#### 24"
    marks = {"results": [(14, 16)], "copies": [(21, 23), (30, 32)], "blank": [(16, 17)]}
    example = Example("How many?", completion, [(30, 32)], "m", marks=marks)
    form = any_tiny_pair.format
    encoded, text = form.encode(example, loss), form.text(example.prompt)
    offsets = form.tokenizer(text + completion, add_special_tokens=form.specials, return_offsets_mapping=True)[
        "offset_mapping"
    ]
    for kind, spans in marks.items():
        characters = {len(text) + at for low, high in spans for at in range(low, high)}
        wanted = tuple(t for t, (low, high) in enumerate(offsets) if characters & set(range(low, high)))
        assert encoded.marked[kind] == wanted != ()
    assert encoded == form.encode(replace(example, marks={}), loss)
    n = encoded.marked["copies"][0] + 1
    cut = form.encode(example, "full", n)
    assert cut.marked["copies"] == encoded.marked["copies"][:1] and max(map(max, cut.marked.values())) < n
    assert "results" not in form.encode(example, "full", encoded.marked["results"][0]).marked


def test_the_first_token_is_never_marked():
    form = PromptFormat.choose(known_tokenizer(), "verbatim", add_special_tokens=False)
    encoded = form.encode(Example("", "x=42.", [(2, 4)], marks={"results": [(0, 1)], "copies": [(0, 4)]}))
    assert encoded.marked == {"copies": (1, 2)}


def test_a_cut_takes_texts_that_are_far_beyond_the_context(tiny_pair):
    long = Example("q", "21 " * 30_000, [(0, 2)], "long")
    with refused("'long'", "context"):
        tiny_pair.encode(long)
    found = tiny_pair.encode(long, max_tokens=16)
    assert len(found.ids) == 16
    assert found.ids == tiny_pair.encode(Example("q", "21 " * 30, [(0, 2)])).ids[:16]
    with refused("max_tokens", "at least 2"):
        tiny_pair.encode(long, max_tokens=1)
    with refused("'long'", "context"):
        tiny_pair.encode(long, max_tokens=1000)
