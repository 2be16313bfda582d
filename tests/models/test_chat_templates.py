"""Chat templates with a will of their own: thinking models, templates that refuse a system message, broken ones."""

import shutil

import pytest

import spd_lens as spd
from spd_lens.analysis.common.subject import Subject
from spd_lens.examples import Example
from spd_lens.generation.jobs import stop_tokens
from spd_lens.models.pair import ModelPair
from spd_lens.models.prompts import PromptFormat
from spd_lens.runs.rounds import merged
from tests.conftest import CHAT_TEMPLATE, build_qwen2, build_tokenizer
from tests.helpers import EXAMPLES, make_adapter, refused

THINKING = """
{%- for message in messages %}
    {%- if message.role == 'assistant' and loop.last %}
        {{- '<|start|>assistant\n<think>\n' + (message.reasoning_content or '').strip('\n') + '\n</think>\n\n' }}
        {{- message.content.lstrip('\n') + '<|end|>\n' }}
    {%- else %}
        {{- '<|start|>' + message.role + '\n' + message.content + '<|end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
"""What Qwen3's template does, with this tokenizer's names for the ends of a turn."""

NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + CHAT_TEMPLATE.removeprefix("{{ bos_token }}")
)
"""As Gemma's."""


def tokenizer_of(template):
    tokenizer = build_tokenizer(chat=False, bos=False)
    tokenizer.chat_template = template
    return tokenizer


def texts(form, example):
    """The scored tokens as text."""
    encoded = form.encode(example)
    return form.tokenizer.decode([encoded.ids[t] for t in encoded.scored]).strip()


# thinking


TURN = "<|start|>user\nq<|end|>\n<|start|>assistant\n"
PROMPTS = {None: TURN, True: TURN, False: f"{TURN}<think>\n\n</think>\n\n"}


@pytest.mark.parametrize("thinking", PROMPTS)
def test_spans_stand_behind_the_prompt_that_the_switch_makes(thinking):
    form = PromptFormat.choose(tokenizer_of(THINKING), enable_thinking=thinking)
    assert form.text("q") == PROMPTS[thinking]
    assert form.settings == {"prompt_format": "chat", "system": None, "enable_thinking": thinking}
    for example in EXAMPLES:
        joint = form.joint(example)
        assert joint.text == PROMPTS[thinking].replace("\nq<", f"\n{example.prompt}<") + example.completion
        for start, end in example.spans:
            one = Example(example.prompt, example.completion, [(start, end)])
            assert texts(form, one) == example.completion[start:end].strip()
        encoded = form.encode(example, "full")
        if example.id != "code":  # whose first line is indented, and the indent merges with the prompt's line break
            assert form.prompt_ids(example.prompt) == encoded.ids[: encoded.completion_start]


@pytest.mark.parametrize("name", ["auto", "raw"])
def test_a_switch_that_raw_prompts_do_not_have(name):
    tokenizer = tokenizer_of(THINKING if name == "raw" else None)
    for thinking in (True, False):
        with refused(f"enable_thinking={thinking}", "raw prompts", "leave it out", "'chat'"):
            PromptFormat.choose(tokenizer, name, enable_thinking=thinking)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, f"{{# enable_thinking #}}{CHAT_TEMPLATE}"], ids=["none", "named"])
def test_a_switch_that_the_template_takes_no_notice_of(template):
    for thinking in (True, False):
        with refused("takes no enable_thinking", f"leave enable_thinking={thinking} out"):
            PromptFormat.choose(tokenizer_of(template), enable_thinking=thinking)


@pytest.fixture
def thinking_pair():
    tokenizer = tokenizer_of(THINKING)
    return lambda thinking: ModelPair(build_qwen2(tokenizer), tokenizer, name="thinker", enable_thinking=thinking)


@pytest.mark.parametrize("thinking", PROMPTS)
def test_the_end_of_a_turn_is_found_behind_thoughts(thinking_pair, thinking):
    pair = thinking_pair(thinking)
    assert pair.tokenizer.convert_tokens_to_ids("<|end|>") in stop_tokens(pair)


def test_completions_begin_behind_the_closed_block_and_the_corpus_says_so(thinking_pair, tmp_path):
    options = {"max_new_tokens": 4, "progress": False}
    path = tmp_path / "c.jsonl"
    corpus = spd.generate(thinking_pair(False), ["q"], path=path, **options)
    assert thinking_pair(None).tokenizer.decode(corpus[0].prompt_ids) == PROMPTS[False]
    assert corpus.settings["enable_thinking"] is False
    with refused("c.jsonl", "enable_thinking", "false", "true"):
        spd.generate(thinking_pair(True), ["q"], path=path, **options)


def test_a_merged_pair_makes_the_same_prompts(thinking_pair, tmp_path):
    pair = thinking_pair(False)
    assert merged(pair, make_adapter(pair.hf, tmp_path / "adapter")).format.settings == pair.format.settings


@pytest.fixture
def thinking_dir(tiny_qwen2_dir, tmp_path):
    shutil.copytree(tiny_qwen2_dir, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(THINKING)
    return tmp_path / "model"


def config_of(tiny_settings, model, **changes):
    sizes = {"n_calibration": 2, "n_train": 2, "n_eval": 2, "n_random": 0, "n_compared": 1, "policies": ["base"]}
    return spd.SPDConfig.make({**tiny_settings, **sizes, "engine": "twin", "epochs": 1, "model": str(model), **changes})


def test_a_run_asks_as_its_settings_say_and_an_analysis_too(thinking_dir, tiny_settings, tmp_path):
    config = config_of(tiny_settings, thinking_dir, enable_thinking=False, system="Be brief.")
    run = spd.run(config, tmp_path / "run", progress=False)
    prompts = [run.corpus.records[0].prompt_ids, Subject(run.path).pair.prompt_ids(Example("q"))]
    for ids in prompts:
        text = Subject(run.path).pair.tokenizer.decode(ids)
        assert text.startswith("<|start|>system\nBe brief.<|end|>\n<|start|>user\n")
        assert text.endswith("<|start|>assistant\n<think>\n\n</think>\n\n")
    again = spd.Run.open(run.path).config
    assert (again.enable_thinking, again.system) == (False, "Be brief.")
    assert run.result("synthetic-math", "base").settings["enable_thinking"] is False


def test_a_pair_that_is_loaded_decides(thinking_dir, tiny_settings, tmp_path):
    pair = spd.load(str(thinking_dir), dtype="float32", device="cpu", system="Be brief.", enable_thinking=True)
    run = spd.run(config_of(tiny_settings, "any"), tmp_path / "run", progress=False, pair=pair)
    assert (run.config.enable_thinking, run.config.system) == (True, "Be brief.")


# system messages


def test_a_system_message_that_raw_prompts_do_not_have():
    with refused("system='Be brief.'", "raw prompts", "leave it out"):
        PromptFormat.choose(tokenizer_of(CHAT_TEMPLATE), "raw", system="Be brief.")
    with refused("system='Be brief.'", "enable_thinking=True", "raw prompts"):
        PromptFormat.choose(tokenizer_of(None), system="Be brief.", enable_thinking=True)


def test_a_template_that_refuses_a_system_message():
    tokenizer = tokenizer_of(NO_SYSTEM)
    assert PromptFormat.choose(tokenizer).text("q").endswith("<|start|>assistant\n")
    with refused("takes no system message", "System role not supported", "system='Be brief.'"):
        PromptFormat.choose(tokenizer, system="Be brief.")
    with refused("System role not supported"):
        ModelPair(build_qwen2(tokenizer), tokenizer, system="Be brief.")


def test_a_template_that_drops_a_system_message():
    template = "{% for m in messages if m.role != 'system' %}<|start|>{{ m.content }}<|end|>{% endfor %}"
    with refused("takes no system message", "the same prompts", "system='Be brief.'"):
        PromptFormat.choose(tokenizer_of(template), system="Be brief.")


def test_the_templates_own_system_message_may_be_given():
    template = "{% if messages[0].role != 'system' %}<|start|>system\nBe good.<|end|>\n{% endif %}" + CHAT_TEMPLATE
    plain, given = (PromptFormat.choose(tokenizer_of(template), system=system) for system in (None, "Be good."))
    assert plain.text("q").replace("<|bos|>", "") == given.text("q").replace("<|bos|>", "")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{{ messages[0].content + 3 }}", "str"),
        ("{{ nowhere.at_all }}", "nowhere"),
        ("{% for %}", "Expected"),
    ],
)
def test_a_template_that_makes_no_prompt(template, reason):
    tokenizer = tokenizer_of(template)
    with refused("makes no prompt", reason, "'raw'"):
        PromptFormat.choose(tokenizer)
    assert PromptFormat.choose(tokenizer, "raw").text("q") == "q\n"
