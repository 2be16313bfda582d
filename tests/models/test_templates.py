"""Chat templates that take parts, show nothing, end turns in their own ways, never end, or ask for the date."""

import datetime
import json
import shutil
import time

import pytest

import spd_lens as spd
from spd_lens.analysis.common.subject import Subject
from spd_lens.generation.corpus import Header, settings_path
from spd_lens.generation.jobs import stop_tokens
from spd_lens.models import prompts, templates
from spd_lens.models.pair import ModelPair
from spd_lens.models.prompts import PromptFormat
from spd_lens.models.templates import render
from spd_lens.runs.model_check import check_model
from spd_lens.runs.rounds import merged
from tests.conftest import CHAT_TEMPLATE, build_qwen2, build_tokenizer
from tests.helpers import EXAMPLES, make_adapter, refused

QUIET = {"progress": False}

LINES = (
    "{% for message in messages %}{{ message['role'].capitalize() }}"
    "{% if message['content'][0]['type'] == 'image' %}:"
    "{% else %}: {% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}<image>{% endif %}{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""As SmolVLM's."""
FIRST_PART = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m['content'][0]['text'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
BOTH = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text | upper }}{% endfor %}{% endif %}<|end|>\n{% endfor %}"
)
SYSTEM_AS_TEXT = (
    "{% if messages[0].role == 'system' %}[{{ messages[0].content }}]{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}<|end|>{% endfor %}"
)
SYSTEM_AS_PARTS = (
    "{% if messages[0].role == 'system' %}[{{ messages[0].content[0].text }}]"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{{ m.content | string }}<|end|>{% endfor %}"
)


def tokenizer_of(template, chat=False):
    tokenizer = build_tokenizer(chat=chat, bos=False)
    tokenizer.chat_template = template
    return tokenizer


def pair_of(template, **options):
    tokenizer = tokenizer_of(template)
    return ModelPair(build_qwen2(tokenizer), tokenizer, name="tiny", **options)


# what the user writes


@pytest.mark.parametrize(
    ("template", "system", "text"),
    [
        (LINES, None, "User: 2 + 2?<|end|>\nAssistant:"),
        (LINES, "Be brief.", "System: Be brief.<|end|>\nUser: 2 + 2?<|end|>\nAssistant:"),
        (FIRST_PART, None, "<|start|>user\n2 + 2?<|end|>\n<|start|>assistant\n"),
        (
            FIRST_PART,
            "Be brief.",
            "<|start|>system\nBe brief.<|end|>\n<|start|>user\n2 + 2?<|end|>\n<|start|>assistant\n",
        ),
        (BOTH, None, "<|start|>user\n2 + 2?<|end|>\n"),
        (SYSTEM_AS_TEXT, "Be brief.", "[Be brief.]2 + 2?<|end|>"),
        (SYSTEM_AS_TEXT, None, "2 + 2?<|end|>"),
        (SYSTEM_AS_PARTS, "Be brief.", "[Be brief.]2 + 2?<|end|>"),
        (CHAT_TEMPLATE, None, "<|bos|><|start|>user\n2 + 2?<|end|>\n<|start|>assistant\n"),
    ],
)
def test_content_is_given_as_the_template_takes_it(template, system, text):
    assert PromptFormat.choose(tokenizer_of(template), system=system).text("2 + 2?") == text


def test_prompts_in_parts_are_answered_one_by_one():
    pair = pair_of(LINES)
    corpus = spd.generate(pair, ["7 * 3", "Tom has 12"], max_new_tokens=4, temperature=0.0, **QUIET)
    assert corpus[0].prompt_ids != corpus[1].prompt_ids
    assert pair.tokenizer.decode(corpus[0].prompt_ids) == "User: 7 * 3<|end|>\nAssistant:"
    assert stop_tokens(pair) == (1, 4)
    assert all(check.passed is not False for check in check_model(pair))
    for example in EXAMPLES:
        scored = pair.encode(example)
        assert pair.tokenizer.decode(scored.ids).startswith(f"User: {example.prompt}")


@pytest.mark.parametrize(
    "template",
    [
        "Hello!",
        "",
        "{% for m in messages %}<|start|>{{ m.role }}<|end|>{% endfor %}",
        "{% for m in messages %}{{ m.content[:40] }}<|end|>{% endfor %}",
        "{% for m in messages %}{{ m.content.split('\n')[0] }}<|end|>{% endfor %}",
        "{% for m in messages %}{{ m.content | upper }}<|end|>{% endfor %}",
        "{% for m in messages %}{{ m.text }}<|end|>{% endfor %}",
        "{% for m in messages if m.role != 'user' %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{% for part in m.content if part.type == 'image' %}{{ part.text }}"
        "{% endfor %}x{% endfor %}",
    ],
)
def test_a_template_that_does_not_show_what_the_user_writes(template):
    tokenizer = tokenizer_of(template)
    # an empty template counts as none
    with refused("chat template", "raw", "does not show" if template else "no chat template"):
        PromptFormat.choose(tokenizer, "chat")
    assert PromptFormat.choose(tokenizer, "raw").text("q") == "q\n"


def test_a_template_that_fails_at_one_prompt():
    pair = pair_of("{{ raise_exception('no sevens') if messages[0].content == '7' }}" + CHAT_TEMPLATE)
    with refused("'7'", "no sevens"):
        spd.generate(pair, ["6", "7"], max_new_tokens=4, **QUIET)


def test_a_template_with_half_a_character():
    with refused("half a character"):
        pair_of("{{ '\\ud83d' }}" + CHAT_TEMPLATE).prompt_ids(spd.Example("q"))


# ends of turns

END, EOS, BOS, START = "<|end|>", "<|eos|>", "<|bos|>", "<|start|>"
ONE_QUESTION = (
    "{% if messages|length != 1 %}{{ raise_exception('one question') }}{% endif %}{{ messages[0].content }}\nA:"
)
USER_ONLY = (
    "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('Only user') }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)


def turns(end):
    return "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}" + end + "{% endfor %}"


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (ONE_QUESTION, []),
        (USER_ONLY, []),
        # answers that are dropped, or changed beyond recognition
        ("<|bos|>{% for m in messages if m.role == 'user' %}{{ m.content }}<|end|>{% endfor %}", []),
        ("<|start|>{% for m in messages %}{{ m.content if m.role == 'user' else '...' }}<|end|>{% endfor %}", []),
        (turns(END), [END]),
        (turns("\n<|end|>\n"), [END]),
        (turns(" <|end|>"), [END]),
        (turns("<|end|><|pad|>"), [END]),
        (turns("<|end|><|eos|>"), [END]),
        (turns(""), []),
        (turns("\n"), []),
        (turns("</turn>\n"), []),
        (turns("\n### End\n"), []),
        (turns(EOS), []),
        # behind the answer stands what opens a turn, or what stands within one
        (turns(START), []),
        (turns("{{ bos_token }}"), []),
        ("{% for m in messages %}<|end|>{{ m.role }}: {{ m.content }}<|end|>{% endfor %}", []),
        ("{% for m in messages %}{{ m.role }}: <|end|>{{ m.content }}<|end|>{% endfor %}", []),
        ("{% for m in messages %}{{ m.role }}<|end|>: {{ m.content }}<|end|>{% endfor %}", []),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|end|>{% endif %}A", []),
        # only where another turn follows
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}{% if not loop.last %}<|end|>{% endif %}"
        "{% endfor %}", [END]),
        # the assistant's alone; trimmed; with thoughts; in parts; behind a system message of the template's own
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '<|end|>' if m.role == 'assistant' }}"
        "{% endfor %}", [END]),
        ("{% for m in messages %}<|start|>{{ m.content | trim }}<|end|>{% endfor %}", [END]),
        ("{% for m in messages %}{{ m.role }}{% if m.role == 'assistant' %}<think>\n\n</think>\n"
        "{% endif %}{{ m.content.strip() }}<|end|>{% endfor %}", [END]),
        (LINES, [END]),
        (FIRST_PART, [END]),
        ("<|start|>system\nYou are kind.<|end|>\n" + turns(END), [END]),
        ("{{ messages[0].content }}<|pad|>{% if messages|length > 1 %}{{ messages[1].content }}<|end|>"
        "{% endif %}", [END]),
    ],
)  # fmt: skip
def test_a_stop_token_is_one_that_the_template_ends_turns_with(template, ends):
    pair = pair_of(template)
    wanted = sorted(pair.tokenizer.convert_tokens_to_ids(token) for token in {EOS, *ends})
    assert stop_tokens(pair) == tuple(wanted)


@pytest.mark.parametrize("template", [ONE_QUESTION, USER_ONLY])
def test_templates_of_one_turn_generate_and_are_evaluated(template):
    pair = pair_of(template)
    corpus = spd.generate(pair, ["7 * 3"], max_new_tokens=4, **QUIET)
    assert "7 * 3" in pair.tokenizer.decode(corpus[0].prompt_ids)
    assert len(spd.evaluate(pair, "synthetic-math", 2, max_new_tokens=4, **QUIET).items) == 2


def test_an_end_of_turn_that_is_no_special_token_is_not_in_the_completion():
    tokenizer = build_tokenizer(chat=False, bos=False)
    tokenizer.add_tokens(["[end]"])
    tokenizer.chat_template = turns("[end]\n")
    pair = ModelPair(build_qwen2(tokenizer), tokenizer)
    end = tokenizer.convert_tokens_to_ids("[end]")
    assert end in stop_tokens(pair) and end not in tokenizer.all_special_ids
    pair.hf.lm_head.weight.data[end] = 0
    pair.hf.lm_head.weight.data[end] += pair.hf.lm_head.weight.data.sum(0).sign() * 5
    corpus = spd.generate(pair, [f"{n} * 3" for n in range(12)], max_new_tokens=12, **QUIET)
    ended = [record for record in corpus if record.completion_ids[-1] == end]
    assert ended and all(record.finish_reason == "eos" and "[end]" not in record.completion for record in ended)


@pytest.mark.parametrize("own", [None, [], [1, 4]])
def test_no_end_of_sequence_at_all(own):
    tokenizer = tokenizer_of(None)
    tokenizer.eos_token = None
    pair = ModelPair(build_qwen2(tokenizer), tokenizer)
    pair.hf.generation_config.eos_token_id = own
    assert stop_tokens(pair) == tuple(own or ())
    corpus = spd.generate(pair, ["7 * 3"], max_new_tokens=5, **QUIET)
    assert own or (corpus[0].finish_reason, len(corpus[0].completion_ids)) == ("length", 5)


# bounds

ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops that write": "{% for i in range(400) %}{% for j in range(400) %}x{% endfor %}{% endfor %}",
    "loops over a text": "{% for i in messages[0].content * 9 %}{% for j in messages[0].content * 9 %}"
    "{% endfor %}{% endfor %}",
    "filters": "{% for i in messages[0].content %}{{ range(9999) | sum }}{% endfor %}",
    "a product": "{{ 'x' * 100000000 }}",
    "a product of lists": "{% set x = [1] * 10**10 %}",
    "a power": "{{ 10 ** 10000000000 }}",
    "doubling": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "adding up": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "blocks": "{% set x = 'ab' %}" + "{% set x %}{{ x }}{{ x }}{{ x }}{{ x }}{% endset %}" * 30,
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "callers": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}" + "{% call f() %}" * 40 + ""
    "{% endcall %}" * 40,
    "padding": "{{ 'a' | center(999999999) }}",
    "padding by a method": "{{ 'a'.rjust(999999999) }}",
    "a wide field": "{{ '%999999999d' | format(1) }}",
    "a field as wide as asked": "{{ '%*d' % (999999999, 1) }}",
    "a wide field by a method": "{{ '{:>999999999}'.format(1) }}",
    "a nested field": "{{ '{:{}}'.format(1, 999999999) }}",
    "replacing": "{% set x = 'a' * 9999 %}{{ x | replace('a', x) }}",
    "replacing by a method": "{% set x = 'a' * 9999 %}{{ x.replace('a', x) }}",
    "indenting": "{{ ('a\n' * 9999) | indent(99999) }}",
    "joining": "{{ range(9999) | join('x' * 99999) }}",
    "joining what is not there yet": "{{ range(9999) | map('string') | join('x' * 99999) }}",
    "digits": "{{ 1 | round(300000000, 'floor') }}",
    "bytes": "{{ (1).to_bytes(1000000000, 'big') | length }}",
    "translating": "{{ ('a' * 10000).translate({97: 'b' * 100000}) }}",
    "a list of one list": "{{ (['x' * 1000000] * 1000) | join }}",
    "a list of one list as text": "{{ (['x' * 1000000] * 1000) | string }}",
    "a list of one list written": "{{ ['x' * 1000000] * 1000 }}",
    "a list of one list beside a text": "{{ 'x' ~ (['x' * 1000000] * 1000) }}",
    "a list of one list in a format": "{{ '%s' % (['x' * 1000000] * 1000,) }}",
    "a list of one list by a method": "{{ ''.join(['x' * 1000000] * 1000) }}",
    "values of a dictionary": "{{ dict(a=['x' * 1000000] * 1000).values() | list | tojson }}",
    "macros of macros": "{% macro m(s) %}{{ s ~ s }}{% endmacro %}{{ " + "m(" * 40 + "'ab'" + ")" * 40 + " }}",
    "macros that write": "{% macro m(s) %}{% for i in range(5000) %}{{ s }}{% endfor %}{% endmacro %}"
    "{% set x = m('x' * 100000) %}",
    "macros of prose": "{% macro m() %}{% for i in range(99000) %}" + "text " * 2000 + "{% endfor %}{% endmacro %}"
    "{% set x = m() | length %}",
    "padding each": "{{ range(999) | map('center', 60000) | join }}",
    "replacing in each": "{{ range(9999) | map('string') | map('replace', '1', 'x' * 60000) | list | length }}",
    "indented JSON": "{{ messages | tojson(indent=50000000) }}",
    "JSON indented by a text": "{{ messages | tojson(indent='x' * 500000) }}",
    "a format of names": "{{ '{a:999999999}'.format_map({'a': 1}) }}",
    "a wide day": "{{ strftime_now('%999999999Y') }}",
    "many keys of a long text": "{{ dict.fromkeys(range(9000), 'x' * 900000) | tojson }}",
    "whole numbers": "{% set ns = namespace(x=10**900) %}{% for i in range(40) %}{% set ns.x = ns.x * ns.x %}"
    "{% endfor %}",
    "nested lists": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}",
    "a sum of texts": "{{ (['x' * 999] * 900) | map('list') | sum(start=[]) | length }}",
    "prose": "{{ lipsum(n=100000) }}",
    "a long template": "{# " + "x" * 1_000_001 + " #}",
    "much text": "{% for i in range(1000) %}" + "text " * 2000 + "{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("kind", ENDLESS)
@pytest.mark.parametrize("where", ["", "{{ messages[0].content }}"], ids=["first", "last"])
def test_a_template_that_does_not_come_to_an_end(kind, where):
    start = time.process_time()
    with refused("chat template makes no prompt", "use the prompt format 'raw'"):
        PromptFormat.choose(tokenizer_of(where + ENDLESS[kind]))
    assert time.process_time() - start < 20


def test_a_template_that_does_not_come_to_an_end_at_some_prompts():
    bomb = "{% if messages[0].content == '7' %}" + ENDLESS["macros"] + "{% endif %}"
    with refused("'7'", "more than"):
        pair_of(bomb + CHAT_TEMPLATE).prompt_ids(spd.Example("7"))


def test_work_in_a_row_is_timed(monkeypatch):
    monkeypatch.setattr(templates, "_SECONDS", 0.1)
    work = "{% set x = 'ab' * 400000 %}" + "{{ x | replace('b', 'aa') | replace('aa', 'b') | length }}" * 3000
    start = time.process_time()
    with refused("chat template makes no prompt", "takes more than 0.1 seconds"):
        PromptFormat.choose(tokenizer_of(work))
    assert time.process_time() - start < 10


EVERYTHING = (
    "{% generation %}a{% endgeneration %}{{ messages | tojson }}{{ strftime_now('%d %b %Y') }}"
    "{% set ns = namespace(n=1, last='') %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.n = ns.n + 1 %}"
    "{% continue %}{% else %}{% set (a, b) = (1, m.content) %}{{ a }}{{ b | trim }}{% endif %}{% endfor %}"
    "{{ ns.n }}"
    "{{ 'ab' * 3 }}{{ 2 ** 5 }}{{ 2.5 * 2 }}{{ 7 % 2 }}{{ '%03d|%s' % (5, 'x') }}{{ '%d' | format(7) }}"
    "{{ '{:>4}'.format('*{x}*') }}{{ 'abc'.replace('b', 'x') | replace('c', 'yy') | upper | indent(2) }}"
    "{{ messages | map(attribute='role') | join(', ') }}{{ messages | tojson(indent=2) }}"
    "{% macro f(x) %}<{{ x }}>{{ caller() if caller }}"
    "{% endmacro %}{{ f(1) }}"
    "{% call f(2) %}in{% endcall %}{% for i in range(3, 0, -1) %}{{ i }}{% endfor %}{{ eos_token }}{{ unknown }}"
    "{% set block %}{% for m in messages[::-1] %}{{ m.role }}{% else %}none{% endfor %}{% endset %}{{ block }}"
    "{% for m in messages recursive %}{{ loop.index }}{{ loop(m.more) if m.more }}{% endfor %}"
    "{% with z = 3 %}{{ z }}{% endwith %}"
    "{% if add_generation_prompt and enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, LINES, FIRST_PART, BOTH, EVERYTHING], ids=lambda t: t[:20])
@pytest.mark.parametrize("generation", [True, False])
def test_a_template_renders_as_it_does_in_transformers(template, generation):
    tokenizer = tokenizer_of(template)
    messages = [
        {"role": role, "content": [{"type": "text", "text": f" {role} {{{{x}}}} "}]} for role in ("system", "user")
    ]
    for chat in (messages, [{**message, "content": message["content"][0]["text"]} for message in messages]):
        theirs = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=generation, enable_thinking=False
        )  # fmt: skip
        assert render(tokenizer, chat, generation=generation, enable_thinking=False) == theirs


# dates

LLAMA = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}<|start|>system\nToday Date: "
    "{{ date_string }}<|end|>" + CHAT_TEMPLATE.removeprefix("{{ bos_token }}")
)
"""As Llama 3.2's."""
SMOLLM = "{%- set today = strftime_now('%d %B %Y') -%}<|start|>system\n{{ today }}<|end|>\n" + CHAT_TEMPLATE


@pytest.fixture
def day(monkeypatch):
    """Sets today's date, as the formats take it."""

    def set_to(text):
        monkeypatch.setattr(prompts, "_today", lambda: text)

    set_to("2026-03-01")
    return set_to


def shown(pair):
    return pair.format.text("q").partition("<|end|>")[0].partition("\n")[2]


@pytest.mark.parametrize(("template", "text"), [(LLAMA, "Today Date: 01 Mar 2026"), (SMOLLM, "01 March 2026")])
def test_the_day_is_that_on_which_the_format_was_chosen(template, text, day):
    pair = pair_of(template)
    day("2026-03-02")
    assert shown(pair) == text
    assert pair.format.settings["prompt_date"] == "2026-03-01"
    assert shown(pair_of(template, prompt_date="2026-03-01")) == text
    assert shown(pair_of(template, prompt_date=datetime.datetime(2026, 3, 1, 12))) == text
    assert shown(pair_of(template)) == text.replace("01", "02", 1)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, "{# strftime_now #}" + CHAT_TEMPLATE, None])
def test_prompts_without_a_date_say_nothing_of_one(template):
    pair = pair_of(template)
    assert "prompt_date" not in pair.format.settings and pair.dated("2020-01-01") is pair
    with refused("prompt_date", "2020-01-01", "leave"):
        pair_of(template, prompt_date="2020-01-01")


@pytest.mark.parametrize("value", ["yesterday", "2026-02-30", 20260301, "01.03.2026", ""])
def test_what_is_no_day(value):
    with refused("prompt_date", repr(value), "YYYY-MM-DD"):
        pair_of(LLAMA, prompt_date=value)
    with refused("setting prompt_date", "YYYY-MM-DD"):
        spd.SPDConfig.make({"prompt_date": "yesterday" if isinstance(value, int) else value})


OPTIONS = {"max_new_tokens": 3, "progress": False}


def test_a_corpus_begun_yesterday_goes_on_with_yesterdays_date(day, tmp_path):
    path = tmp_path / "c.jsonl"
    first = spd.generate(pair_of(LLAMA), ["7 * 3"], path=path, **OPTIONS)
    assert first.settings["prompt_date"] == "2026-03-01"
    day("2026-03-02")
    pair = pair_of(LLAMA)
    more = spd.generate(pair, ["7 * 3", "2 + 2"], path=path, **OPTIONS)
    assert more.records[0] == first.records[0]
    assert all("01 Mar 2026" in pair.tokenizer.decode(record.prompt_ids) for record in more)
    assert spd.Corpus.load(path).settings["prompt_date"] == "2026-03-01"
    assert shown(pair) == "Today Date: 02 Mar 2026", "the pair is as it was"
    with refused("prompt_date", "2026-03-01", "2026-03-05"):
        spd.generate(pair_of(LLAMA, prompt_date="2026-03-05"), ["7 * 3"], path=path, **OPTIONS)
    assert "02 Mar 2026" in pair.tokenizer.decode(spd.generate(pair, ["7 * 3"], **OPTIONS)[0].prompt_ids)


def test_a_corpus_of_before_dates_were_recorded(day, tmp_path):
    path = tmp_path / "c.jsonl"
    first = spd.generate(pair_of(LLAMA), ["7 * 3"], path=path, **OPTIONS)
    header = Header.read(path)
    Header({k: v for k, v in header.settings.items() if k != "prompt_date"}, header.order).write(path)
    assert spd.generate(pair_of(LLAMA), ["7 * 3"], path=path, **OPTIONS).records == first.records
    assert "prompt_date" not in json.loads(settings_path(path).read_text())["settings"]
    day("2026-03-02")
    with refused("another text for prompt '0'"):
        spd.generate(pair_of(LLAMA), ["7 * 3"], path=path, **OPTIONS)
    assert spd.generate(
        pair_of(LLAMA, prompt_date="2026-03-01"), ["7 * 3"], path=path, **OPTIONS
    ).records == first.records  # fmt: skip


def test_an_evaluation_is_of_one_day(day, tmp_path):
    path = tmp_path / "e.jsonl"
    first = spd.evaluate(pair_of(LLAMA), "synthetic-math", 2, path=path, **OPTIONS)
    day("2026-03-02")
    again = spd.evaluate(pair_of(LLAMA), "synthetic-math", 2, path=path, **OPTIONS)
    assert again == first and first.settings["prompt_date"] == "2026-03-01"
    other = spd.evaluate(pair_of(LLAMA), "synthetic-math", 2, **OPTIONS)
    assert other.settings["prompt_date"] == "2026-03-02"
    assert other.aligned_loss != first.aligned_loss, "another prompt"


def test_moments_say_the_day(day):
    moments = spd.extract(pair_of(LLAMA), EXAMPLES[:1], engine="twin", **QUIET)
    assert moments.settings["prompt_date"] == "2026-03-01"
    day("2026-03-02")
    with refused("2026-03-01", "2026-03-02"):
        moments + spd.extract(pair_of(LLAMA), EXAMPLES[1:2], engine="twin", **QUIET)


def test_a_merged_pair_is_of_the_same_day(day, tmp_path):
    pair = pair_of(LLAMA)
    adapter = make_adapter(pair.hf, tmp_path / "adapter")
    day("2026-03-02")
    assert merged(pair, adapter).format.settings == pair.format.settings


@pytest.fixture
def dated_dir(tiny_qwen2_dir, tmp_path):
    shutil.copytree(tiny_qwen2_dir, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(LLAMA)
    return tmp_path / "model"


def test_a_run_has_one_day_however_long_it_takes(dated_dir, tiny_settings, tmp_path, day):
    sizes = {"n_calibration": 2, "n_train": 2, "n_eval": 2, "n_random": 0, "n_compared": 1, "policies": ["base"]}
    config = spd.SPDConfig.make(
        {**tiny_settings, **sizes, "engine": "twin", "epochs": 1, "model": str(dated_dir)}
    )  # fmt: skip
    run = spd.run(config, tmp_path / "run", **QUIET)
    assert run.notes["prompt_date"] == "2026-03-01"
    before = {p: p.read_bytes() for p in run.path.rglob("*.json*") if p.parent.name != "run"}
    for path in (run.path / "eval", run.path / "effects"):
        shutil.rmtree(path)
    (run.path / "unprojected.jsonl").unlink()
    day("2026-03-02")
    spd.run(config, run.path, **QUIET)
    assert {p: p.read_bytes() for p in before} == before
    assert run.result("synthetic-math", "base").settings["prompt_date"] == "2026-03-01"
    assert shown(Subject(run.path).pair) == "Today Date: 01 Mar 2026"
    other = spd.load(str(dated_dir), dtype="float32", device="cpu", prompt_date="2026-03-02")
    with refused("prompt_date", "2026-03-02"):
        spd.run(config, run.path, pair=other, **QUIET)
    given = config.model_copy(update={"prompt_date": "2001-02-03"})
    assert spd.run(given, tmp_path / "given", **QUIET).corpus.settings["prompt_date"] == "2001-02-03"
