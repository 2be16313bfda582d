"""Prompts as they are, spans in prompts, tokens inside spans only: against the tokenizer's own offsets."""

import json
from dataclasses import replace

import pytest
import torch
from tokenizers import processors

import spd_lens as spd
from spd_lens.errors import Guardrail
from spd_lens.evaluation.teacher_forced import teacher_forced
from spd_lens.generation import recorded_settings
from spd_lens.models.pair import ModelPair
from spd_lens.models.prompts import Encoded, PromptFormat
from spd_lens.runs.loading import decided_by
from spd_lens.runs.model_check import check_model
from spd_lens.subspaces.controls import shuffled_answers
from spd_lens.subspaces.policy import Policy
from tests.conftest import BACKENDS, build_llama, build_tokenizer
from tests.helpers import EXAMPLES, norms_in_full_precision, reference_rows, refused, relative_error
from tests.models.test_prompts import BOS, known_tokenizer

EIFFEL = spd.Example("The Eiffel Tower is in", " Paris", spans=[(1, 6)])
STRIPPING = "<|start|>{{ messages[0]['content'] | trim }}<|end|>assistant:"
REWRITING = "<|start|>{{ messages[0]['content'] | replace('e', 'E') | replace('E', 'e') | replace('#', '') }}<|end|>"
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def verbatim(tiny_llama_dir):
    return spd.load(str(tiny_llama_dir), dtype="float32", device="cpu", prompt_format="verbatim")


def tokenised(tokenizer, text, specials=True):
    found = tokenizer(text, add_special_tokens=specials, return_offsets_mapping=True)
    return found["input_ids"], found["offset_mapping"]


def scored_by_hand(example, tokenizer, rule, specials=True):
    """Positions whose characters are partly, or all, in one of the example's spans: character by character."""
    ids, offsets = tokenised(tokenizer, example.prompt + example.completion, specials)
    n = len(example.prompt)
    spans = [*example.prompt_spans, *((low + n, high + n) for low, high in example.spans)]
    many = any if rule == "overlap" else all
    return ids, [
        t
        for t, (low, high) in enumerate(offsets)
        if high > low and t and any(many(start <= at < end for at in range(low, high)) for start, end in spans)
    ]


# --- the text as it is


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_transformerlens_users_text_has_the_tokens_that_transformerlens_gives_it(tiny_llama_dir, backend):
    pair = spd.load(str(tiny_llama_dir), dtype="float32", device="cpu", backend=backend, prompt_format="verbatim")
    encoded = pair.encode(EIFFEL)
    assert encoded.ids == pair.lens.to_tokens("The Eiffel Tower is in Paris")[0].tolist()
    assert encoded.ids == pair.tokenizer("The Eiffel Tower is in Paris")["input_ids"]
    assert "".join(pair.tokenizer.decode([encoded.ids[t]]) for t in encoded.scored).strip() == "Paris"
    assert pair.prompt_ids(EIFFEL) == pair.lens.to_tokens("The Eiffel Tower is in")[0].tolist()
    moments = spd.extract(pair, [EIFFEL], **QUIET)
    assert moments.n_tokens.sum() == len(encoded.ids) and moments.n_scored.sum() == len(encoded.scored)


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_the_tokenizer_adds_no_bos_there_is_none(tiny_qwen2_dir, backend):
    pair = spd.load(str(tiny_qwen2_dir), dtype="float32", device="cpu", backend=backend, prompt_format="verbatim")
    ids = pair.encode(EIFFEL).ids
    assert ids == pair.lens.to_tokens("The Eiffel Tower is in Paris", prepend_bos=False)[0].tolist()
    assert ids == pair.tokenizer("The Eiffel Tower is in Paris")["input_ids"] and pair.tokenizer.bos_token_id not in ids


def test_moments_of_verbatim_text_are_those_of_plain_autograd(verbatim):
    examples = [EIFFEL, replace(EIFFEL, prompt_spans=[(4, 10), (11, 16)]), spd.Example("7*", "3=21", [(2, 4)], "sum")]
    by_hand = [scored_by_hand(example, verbatim.tokenizer, "overlap") for example in examples]
    encoded = [Encoded(ids, 1, scored) for ids, scored in by_hand]
    sites = verbatim.sites("all")
    gradients, _, losses = reference_rows(verbatim.hf, encoded, sites)
    for engine in ("twin", "lens"):
        moments = spd.extract(verbatim, examples, layers="all", engine=engine, **QUIET)
        for site in sites:
            g = gradients[site]
            assert relative_error(moments.gradient[site].sum(0), g.T @ g) < 1e-4, site
        assert moments.loss_sum.sum().item() == pytest.approx(sum(losses), rel=1e-5)


def test_what_the_tokenizer_adds_can_be_left_out(tiny_llama_dir):
    tokenizer = known_tokenizer()
    for name, text in (("raw", "q\n42"), ("verbatim", "q42")):
        with_bos = PromptFormat.choose(tokenizer, name)
        without = PromptFormat.choose(tokenizer, name, add_special_tokens=False)
        example = spd.Example("q", "42", [(0, 2)])
        assert with_bos.joint(example).text == without.joint(example).text == text
        assert with_bos.encode(example).ids == [BOS, *without.encode(example).ids]
        assert without.encode(example).ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert without.prompt_ids("q") == tokenizer(without.text("q"), add_special_tokens=False)["input_ids"]
    lonely = spd.Example("", "42", [(0, 2)], "lonely")
    assert PromptFormat.choose(tokenizer, "verbatim").encode(lonely).scored == [1]
    with refused("'lonely'", "no token that the model predicts", "add_special_tokens"):
        PromptFormat.choose(tokenizer, "verbatim", add_special_tokens=False).encode(lonely)
    pair = spd.load(
        str(tiny_llama_dir), dtype="float32", device="cpu", prompt_format="verbatim", add_special_tokens=False
    )
    with refused("is empty", "no token to continue from"):
        pair.prompt_ids(spd.Example(""))


def test_what_the_tokenizer_puts_behind_a_text_is_left_out():
    tokenizer = known_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|eos|>", special_tokens=[("<|bos|>", BOS), ("<|eos|>", 1)]
    )
    form = PromptFormat.choose(tokenizer, "verbatim")
    example = spd.Example("q", "42", [(0, 2)])
    assert tokenizer("q42")["input_ids"] == [*form.encode(example).ids, 1]
    assert form.encode(example, "full").scored == [2]
    assert form.prompt_ids("q") == form.encode(example).ids[:2]


@pytest.mark.parametrize("name", ["auto", "chat"])
def test_a_chat_template_brings_its_own_special_tokens(name):
    with refused("add_special_tokens=False would do nothing", "'raw' or 'verbatim'"):
        PromptFormat.choose(known_tokenizer(chat=True), name, add_special_tokens=False)


def test_what_is_no_form_or_rule():
    tokenizer = known_tokenizer(chat=True)
    with refused("'as is'", "verbatim"):
        PromptFormat.choose(tokenizer, "as is")
    with refused("'within'", "'inside'"):
        PromptFormat.choose(tokenizer, span_rule="within")
    with refused("add_special_tokens", "'no'"):
        PromptFormat.choose(tokenizer, "raw", add_special_tokens="no")
    with refused("verbatim prompts", "system='x'"):
        PromptFormat.choose(tokenizer, "verbatim", system="x")


def test_settings_are_recorded_where_they_are_not_at_their_defaults(verbatim, tiny_llama_dir):
    tokenizer = known_tokenizer()
    form = PromptFormat.choose(tokenizer)
    assert form.settings == {"prompt_format": "raw", "system": None, "enable_thinking": None}
    form = PromptFormat.choose(tokenizer, "verbatim", add_special_tokens=False, span_rule="inside")
    new = {"add_special_tokens": False, "span_rule": "inside"}
    assert form.settings == {"prompt_format": "verbatim", "system": None, "enable_thinking": None, **new}
    pair = ModelPair(verbatim.hf, verbatim.tokenizer, **form.settings)
    assert pair.format.settings == form.settings
    whole = [spd.Example("7*3=", "21", [(0, 2)])]
    written = {"loss": "aligned", "dtype": "float32", "prompt_format": "verbatim"}
    assert spd.extract(pair, whole, **QUIET).settings == {**written, **new}
    assert spd.extract(verbatim, [EIFFEL], **QUIET).settings == written
    assert {key: decided_by(pair, "auto")[key] for key in ("prompt_format", *new)} == {
        "prompt_format": "verbatim",
        **new,
    }
    raw = spd.load(str(tiny_llama_dir), dtype="float32", device="cpu")
    assert "prompt_format" not in decided_by(raw, "auto")
    assert decided_by(raw, "verbatim")["prompt_format"] == "raw"
    assert all(check.passed is not False for check in check_model(pair)), check_model(pair)


# --- which tokens a span means


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("rule", ["overlap", "inside"])
def test_every_span_of_a_text_means_the_tokens_that_its_characters_say(rule, bos):
    tokenizer = build_tokenizer(chat=False, bos=bos)
    form = PromptFormat.choose(tokenizer, "verbatim", span_rule=rule)
    prompt, completion = "Tom has 12", " apples, é😀 42."
    n_none = 0
    for start in range(len(completion)):
        for end in range(start + 1, len(completion) + 1):
            example = spd.Example(prompt, completion, [(start, end)], "one", prompt_spans=[(0, len(prompt))])
            alone = replace(example, prompt_spans=())
            ids, wanted = scored_by_hand(alone, tokenizer, rule)
            if not wanted:
                n_none += 1
                with refused("no token lies inside the span", str((start, end)), "'one'", "span_rule='overlap'"):
                    form.encode(alone)
                continue
            found = form.encode(alone)
            assert (found.ids, found.scored) == (ids, wanted)
            assert form.encode(example).scored == scored_by_hand(example, tokenizer, rule)[1]
    assert (n_none > 0) == (rule == "inside")


def test_the_blank_in_a_numbers_token_is_outside_of_its_span():
    tokenizer = known_tokenizer(trim_offsets=False)
    example = spd.Example("q", "x = 42.", [(4, 6)], "blank")
    assert len(PromptFormat.choose(tokenizer, "verbatim").encode(example).scored) == 1
    inside = PromptFormat.choose(tokenizer, "verbatim", span_rule="inside")
    with refused("(4, 6)", "'blank'", "token 5 ' 42'", "span_rule='overlap'", "move the span"):
        inside.encode(example)
    assert inside.encode(replace(example, spans=[(3, 6)])).scored == [5]
    assert inside.encode(replace(example, spans=[(2, 6)])).scored == [4, 5]
    # a tokenizer that trims its offsets says that the blank is not in the token
    trimmed = PromptFormat.choose(known_tokenizer(trim_offsets=True), "verbatim", span_rule="inside")
    assert trimmed.encode(example).scored == [5]


def test_the_full_loss_does_not_look_at_the_rule():
    tokenizer = known_tokenizer(added=("42", "ab"))
    for rule in ("overlap", "inside"):
        form = PromptFormat.choose(tokenizer, "verbatim", span_rule=rule)
        encoded = form.encode(spd.Example("xa", "b42", [(0, 1)]), "full")
        assert (encoded.scored, encoded.completion_start) == ([2, 3], 2), "the shared token is the completion's"
        assert encoded.shared == "ab"


# --- spans in prompts


@pytest.mark.parametrize("name", ["raw", "verbatim", "chat"])
def test_spans_of_prompts_are_scored_beside_those_of_completions(name):
    tokenizer = known_tokenizer(chat=True)
    form = PromptFormat.choose(tokenizer, name)
    example = spd.Example("what is 42?", "x=42.", [(2, 4)], prompt_spans=[(8, 10), (0, 1)])
    encoded = form.encode(example)
    assert [tokenizer.decode([encoded.ids[t]]) for t in encoded.scored] == ["w", " 42", "42"]
    plain = form.encode(replace(example, prompt_spans=()))
    assert (encoded.ids, encoded.completion_start) == (plain.ids, plain.completion_start)
    assert (
        form.encode(example, "full").scored == form.encode(plain_example := replace(example, spans=()), "full").scored
    )
    assert [tokenizer.decode([encoded.ids[t]]) for t in form.encode(plain_example).scored] == ["w", " 42"]
    assert example.measurable and plain_example.measurable
    assert not replace(example, spans=(), prompt_spans=()).measurable
    assert not spd.Example("42", prompt_spans=[(0, 1)]).measurable


@pytest.mark.parametrize("prompt", ["assistant", "user", "  so 42\n\n", "s", "<|start|>user\n42", "42  "])
@pytest.mark.parametrize("template", [None, STRIPPING], ids=["plain", "stripping"])
def test_the_prompt_is_found_in_the_template(prompt, template):
    tokenizer = known_tokenizer(chat=True)
    if template is not None:
        tokenizer.chat_template = template
    form = PromptFormat.choose(tokenizer)
    for at, character in enumerate(prompt):
        example = spd.Example(prompt, "x", prompt_spans=[(at, at + 1)])
        if template is not None and (at < len(prompt) - len(prompt.lstrip()) or at >= len(prompt.rstrip())):
            with refused("white space that the chat template leaves out"):
                form.encode(example)
            continue
        ((_, _, low, high),) = form.places(example, joint := form.joint(example))
        assert joint.text[low:high] == character
        # of all places in the text, the one that is in the prompt
        n_before = joint.text[:low].count("<|start|>") - prompt[:at].count("<|start|>")
        assert n_before == 1 and "assistant:" not in joint.text[:low].replace(prompt.strip(), "")


def test_a_template_that_rewrites_the_prompt():
    tokenizer = known_tokenizer(chat=True)
    tokenizer.chat_template = REWRITING
    form = PromptFormat.choose(tokenizer)
    assert form.encode(spd.Example("q 42", "x", prompt_spans=[(2, 4)])).scored
    with refused("'mine'", "rewrites the prompt", "'verbatim' or 'raw'"):
        form.encode(spd.Example("# 42", "x", id="mine", prompt_spans=[(2, 4)]))
    assert form.encode(spd.Example("# 42", "x", [(0, 1)])).scored, "which matters to spans of prompts only"


@pytest.mark.parametrize("span", [(0, 0), (3, 2), (-1, 2), (4, 6)])
def test_spans_beyond_the_prompt(span):
    with refused(f"prompt span {span}", "'mine'", "its prompt of 5 characters"):
        spd.Example("x=42.", "a long completion", [(0, 1)], "mine", prompt_spans=[span])
    with refused("prompt_spans", "[(1, 2)]"):
        spd.Example("x=42.", "q", prompt_spans=(1, 2))


def test_shuffled_answers_leave_prompts_and_their_spans_alone():
    examples = [spd.Example(f"what is {n}?", f"it is {n}", [(6, 7)], str(n), prompt_spans=[(8, 9)]) for n in range(4)]
    for old, new in zip(examples, shuffled_answers(examples, 3), strict=True):
        assert (new.prompt, new.prompt_spans) == (old.prompt, old.prompt_spans)
        assert new.completion != old.completion
    with refused("in their completions"):
        shuffled_answers([replace(example, spans=()) for example in examples], 3)


def test_losses_of_prompts_count_for_the_aligned_loss_only(verbatim):
    """Against -log p of each scored token, one item at a time in float64; the completion's measures stay the same."""
    plain = [replace(example, id=str(n)) for n, example in enumerate(EXAMPLES)]
    both = [replace(example, prompt_spans=[(0, 3), (4, 5)]) for example in plain]
    found = teacher_forced(verbatim, [*plain, *both], [Policy("base")], **QUIET)["base"]
    wide = spd.load(verbatim.name, dtype="float64", device="cpu").hf
    for example, without, within in zip(both, found[: len(both)], found[len(both) :], strict=True):
        ids, scored = scored_by_hand(example, verbatim.tokenizer, "overlap")
        with torch.no_grad(), norms_in_full_precision():
            log_p = wide(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        expected = -torch.stack([log_p[t - 1, ids[t]] for t in scored]).mean().item()
        assert within.aligned_loss == pytest.approx(expected, rel=1e-5)
        assert within.completion_loss == pytest.approx(without.completion_loss, rel=1e-6)
        assert within.aligned_loss != pytest.approx(without.aligned_loss, rel=1e-3)


# --- a token that prompt and completion share


def test_shared_tokens_are_said_once_per_extraction(verbatim, recwarn):
    tokenizer = known_tokenizer(added=("42", "ab"))
    pair = ModelPair(build_llama(tokenizer), tokenizer, prompt_format="verbatim")
    shared = [spd.Example("xa", "b42", [(1, 3)], f"e{n}") for n in range(3)]
    with pytest.warns(Guardrail, match=r"3 of 4 calibration examples .* 'ab' of example 'e0'"):
        spd.extract(pair, [spd.Example("x", "42", [(0, 2)], "fine"), *shared], engine="twin", **QUIET)
    spd.extract(verbatim, [EIFFEL], **QUIET)
    assert not [caught for caught in recwarn if caught.category is Guardrail]


# --- a run


def test_a_run_takes_own_data_as_it_is_written(tiny_settings, tmp_path):
    lines = [
        {"prompt": f"Sum: {n} + {n}\nAnswer:", "completion": f" {n + n}", "spans": [[0, len(f" {n + n}")]],
         "prompt_spans": [[0, 4]]}
        for n in range(40)
    ]  # fmt: skip
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = spd.SPDConfig.make(
        {**tiny_settings, "task": str(path), "prompt_format": "verbatim", "span_rule": "inside", "policies": ["base"]}
    )
    spd.run(config, tmp_path / "run", progress=False)
    records = [json.loads(line) for line in (tmp_path / "run" / "corpus.jsonl").read_text().splitlines()]
    tokenizer = spd.load(config.model, device="cpu").tokenizer
    assert records
    for record in records:
        text = tokenizer.decode(record["prompt_ids"], skip_special_tokens=True)
        assert text in {line["prompt"] for line in lines}
        assert record["prompt_ids"] == tokenizer(text)["input_ids"]
    assert "prompt_format: verbatim" in (tmp_path / "run" / "config.yaml").read_text()
    recorded = recorded_settings(tmp_path / "run" / "corpus.jsonl")
    assert (recorded["prompt_format"], recorded["span_rule"]) == ("verbatim", "inside")
