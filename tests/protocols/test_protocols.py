"""Protocols: what each of them sets, what goes over it, and what is kept, refused and said of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import yaml

import spd_lens as spd
from spd_lens.protocols import POINTS, PROTOCOLS
from spd_lens.runs.config import protocol_in_words
from spd_lens.runs.loading import make_tasks
from spd_lens.runs.run_dir import Run
from spd_lens.study.config import StudyConfig
from spd_lens.study.plan import make_plan
from spd_lens.study.shapes import read_shape
from tests.helpers import EXAMPLES, refused

ROOT = Path(__file__).parents[2]
PAPER = spd.SPDConfig.make({}).model_dump()
SPEC = importlib.util.spec_from_file_location("protocol_table", ROOT / "scripts" / "protocol_table.py")
assert SPEC is not None and SPEC.loader is not None
protocol_table = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(protocol_table)

# every number and name of the reference code, github.com/gh540-svg/hahaha, commit e249fec, as settings
REFERENCE = {
    "prompt_format": "verbatim", "add_special_tokens": True,
    "layers": "last_mid_from_0", "kinds": ["k", "v"],
    "max_calibration_tokens": 256, "span_rule": "inside", "loss": "aligned",
    "center_gradients": True, "per_head": False, "rank": 0.5, "energy": None, "center": False, "strength": 1.0,
    "n_calibration": 50, "n_train": 7473, "n_eval": {"gsm8k": 100},
    "dtype": "auto", "too_long": "drop",
    "temperature": 0.7, "top_p": 0.9, "top_k": None, "max_new_tokens": 256, "max_prompt_tokens": 384,
    "retokenise": True, "max_length": 256, "loss_on_padding": True, "loss_on": "all",
    "lr": 1e-5, "weight_decay": 0.01, "train_batch_size": 4, "warmup_epochs": 0.5, "epochs": 5, "early_stop": True,
    "method": "lora", "lora_rank": 8, "lora_alpha": 8, "lora_dropout": 0.05,
    "lora_targets": ["q_proj", "k_proj", "v_proj", "o_proj"], "seed": 42, "data_seed": 42,
}  # fmt: skip
TEST_TOKENS = {"gsm8k": 256, "svamp": 256, "mbpp": 512, "codealpaca": 256, "mmlu": 5, "bbh": 16}
N_EVAL = {"gsm8k": 100, "svamp": 100, "mbpp": 257, "codealpaca": 100, "mmlu": 200, "bbh": 300}
N_TRAIN = {"gsm8k": 7473, "mbpp": 464, "mmlu": 2000}
SUBTASKS = {
    "logical_deduction_three_objects", "date_understanding", "movie_recommendation", "boolean_expressions",
    "causal_judgement", "sports_understanding",
}  # fmt: skip


def test_the_reference_protocol_is_the_reference_code():
    config = spd.SPDConfig.make({"protocol": "reference"}).model_dump()
    assert {name: config[name] for name in REFERENCE} == REFERENCE


@pytest.mark.parametrize("task", TEST_TOKENS)
def test_the_reference_tasks_are_the_reference_codes(task):
    options = spd.protocol("reference").options(task)
    expected = {"prompt_template": "reference", "order": "file", "scoring": "reference"}
    assert options.items() >= {**expected, "max_new_tokens": TEST_TOKENS[task]}.items()
    assert set(options.get("subtasks", [])) == (SUBTASKS if task == "bbh" else set())
    assert options.get("train_source") == ("auxiliary" if task == "mmlu" else None)
    target = spd.protocol("reference").options(task, source=False)
    assert target.get("train_source") == ("dev+val" if task == "mmlu" else None)
    made = spd.protocol("reference").task_for(task, None, {}, source=False)
    shown = {name: value for name, value in options.items() if name not in ("train_source", "subtasks")}
    assert {name: getattr(made, name) for name in shown} == shown


def test_the_paper_protocol_is_the_default_and_sets_nothing():
    assert not spd.SPDConfig.make({}).differences(spd.SPDConfig.make({"protocol": "paper"}))
    paper = spd.protocol("paper")
    assert not any((paper.settings, paper.task_options, paper.source_options, paper.sizes, paper.methods))


def test_simple_self_distillation_is_as_published():
    config = spd.SPDConfig.make({"protocol": "apple-ssd"})
    assert (config.temperature, config.top_p, config.top_k, config.strength) == (1.6, 0.8, 20, 0.0)
    assert (config.lr, config.train_batch_size, config.method) == (5e-6, 32, "full")
    rest = {"protocol", *spd.protocol("apple-ssd").settings}
    assert set(config.differences(spd.SPDConfig.make({}))) == rest  # and the paper's values for the rest


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_point_has_a_source_and_every_setting_a_point(name):
    chosen = spd.protocol(name)
    assert set(chosen.sources) == set(POINTS)
    assert all(source.where for source in chosen.sources.values())
    shown = {setting for names in POINTS.values() for setting in names}
    assert set(chosen.settings) <= shown & set(spd.SPDConfig.model_fields)


def test_the_page_has_the_table_that_the_presets_make():
    page = protocol_table.DOCUMENT.read_text(encoding="utf-8")
    assert page == protocol_table.written(page)
    assert "| `paper` | `reference` |" in page and "| | `apple-ssd` |" in page
    assert all(f"\n| {point} | " in page for point in POINTS)
    # every value that a protocol sets itself is in its table
    both, other = page.partition("| | `apple-ssd` |")[::2]
    for rows, name in ((both, "reference"), (other, "apple-ssd")):
        own = {name: value for name, value in spd.protocol(name).settings.items() if value != PAPER[name]}
        assert all(f"`{name}` {protocol_table.text(value)}" in rows for name, value in own.items())


# what goes over a protocol


def test_what_is_given_goes_over_the_protocol(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("protocol: reference\nlr: 0.5\nn_train: 7\ntemperature: null\n")
    config = spd.SPDConfig.read(file, {"epochs": 2, "n_eval": 3})
    assert (config.lr, config.n_train, config.temperature, config.epochs, config.n_eval) == (0.5, 7, None, 2, 3)
    assert (config.top_p, config.n_calibration) == (0.9, 50)
    words = protocol_in_words(config)
    assert words.startswith("reference (docs/protocols.md), but for ")
    assert "epochs 2 (there 5)" in words and "n_train 7 (there 7473)" in words and "weight_decay" not in words


def test_sizes_are_those_of_the_tasks():
    config = spd.SPDConfig.make({"protocol": "reference", "task": "mbpp", "eval_tasks": "mbpp, bbh,mine/own.jsonl"})
    assert (config.n_train, config.n_calibration) == (464, 50)
    assert config.n_eval == {"mbpp": 257, "bbh": 300, "own": 100}
    other = spd.SPDConfig.make({"protocol": "reference", "task": "synthetic-math"})
    assert (other.n_train, other.n_eval) == (500, 100)  # tasks that it does not know


def test_a_written_config_says_everything(tmp_path):
    config = spd.SPDConfig.make({"protocol": "reference", "epochs": 2, "task": "mmlu"})
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert next(iter(yaml.safe_load(config.to_yaml()))) == "protocol"
    assert not spd.SPDConfig.read(tmp_path / "c.yaml").differences(config)


def test_a_file_of_another_protocol_is_refused(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(spd.SPDConfig.make({}).to_yaml())
    with refused("c.yaml", "'paper'", "'reference'", "take the line"):
        spd.SPDConfig.read(file, {"protocol": "reference"})
    assert spd.SPDConfig.read(file, {"protocol": "paper"}).protocol == "paper"
    file.write_text("settings: {protocol: paper}\n")
    with refused("c.yaml", "'paper'", "'apple-ssd'"):
        StudyConfig.read(file, overrides={"settings": {"protocol": "apple-ssd"}})


def test_an_unknown_protocol_is_refused_with_the_names():
    for make in (lambda: spd.SPDConfig.make({"protocol": "refrence"}), lambda: spd.protocol("refrence")):
        with refused("'refrence'", *PROTOCOLS):
            make()
    with refused("protocol", "['paper']"):
        spd.SPDConfig.make({"protocol": ["paper"]})


def test_a_directory_without_a_protocol_is_the_papers_and_stays_it(tmp_path):
    config = spd.SPDConfig.make({})
    settings = {name: value for name, value in yaml.safe_load(config.to_yaml()).items() if name != "protocol"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    Run.open(tmp_path, config)
    with refused("protocol: 'paper' there, 'reference' now"):
        Run.open(tmp_path, spd.SPDConfig.make({**settings, "protocol": "reference"}))


# in Python


def test_an_object_with_what_the_functions_take():
    config, chosen = spd.SPDConfig.make({"protocol": "reference"}), spd.protocol("reference")
    assert dict(chosen.extraction) == dict(config.extraction)
    assert chosen.training.by_keyword() == {**config.training.by_keyword(), "gradient_accumulation": 1}
    assert chosen.sampling.by_keyword() == {**config.sampling.by_keyword(), "samples_per_prompt": 1}
    assert chosen.load_options == {"prompt_format": "verbatim", "span_rule": "inside"}
    assert chosen.subspace_options == {"per_head": False, "rank": 0.5, "center_gradients": True}
    assert spd.protocol("paper").load_options == {}


def test_settings_say_which_protocol_they_are_from(tiny_pair):
    chosen = spd.protocol("reference")
    for settings in (chosen.extraction, chosen.sampling, chosen.training):
        assert settings.label == {"protocol": "reference"} and type(settings).given(settings, {}, "f").label
        assert settings.labelled("paper").label == type(settings)().label == {}
    moments = spd.extract(tiny_pair, EXAMPLES[:1], settings=chosen.extraction, layers="all", progress=False)
    assert moments.settings["protocol"] == "reference"
    assert "protocol" not in spd.extract(tiny_pair, EXAMPLES[:1], layers="all", progress=False).settings


def test_a_task_by_its_protocol(data_dir):
    task = spd.protocol("reference").task("gsm8k", data_dir)
    [example] = task.train(1)
    assert example.prompt.startswith("Question: ") and example.prompt.endswith("\nAnswer:")
    assert spd.protocol("reference").task("gsm8k", data_dir, scoring="final").scoring == "final"
    with refused("gsm8k takes no option 'path'"):
        spd.protocol("reference").task_for("gsm8k", None, {"path": "x"})


@pytest.fixture
def data_dir() -> Path:
    path = ROOT.parent / "shared" / "data"
    if not path.exists():
        pytest.skip("the original data files are not here")
    return path


def test_source_and_targets_are_the_protocols(data_dir):
    settings = {"protocol": "reference", "task": "gsm8k", "eval_tasks": ["gsm8k", "mmlu", "bbh"]}
    source, targets = make_tasks(
        spd.SPDConfig.make({**settings, "data_dir": data_dir, "task_options": {"max_new_tokens": 9}})
    )
    assert targets["gsm8k"] is source and (source.max_new_tokens, source.scoring) == (9, "reference")
    assert (targets["mmlu"].max_new_tokens, targets["mmlu"].scoring) == (5, "reference")
    assert set(targets["bbh"].subtasks) == SUBTASKS


def test_what_local_files_lack_is_named_with_the_protocol(data_dir):
    settings = {"protocol": "reference", "task": "mmlu", "data_dir": data_dir}
    with refused("auxiliary", "protocol 'reference' sets", "train_source = 'auxiliary'", "option"):
        make_tasks(spd.SPDConfig.make(settings))
    make_tasks(spd.SPDConfig.make({**settings, "task_options": {"train_source": "dev+val"}}))


def test_a_missing_subtask_is_named(data_dir, tmp_path):
    for file in (data_dir / "bbh").glob("*.json"):
        if file.stem != "movie_recommendation":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    task = spd.protocol("reference").task("bbh", tmp_path)
    with refused("movie_recommendation.json is missing"):
        task.test(300)


# studies


def study(**settings):
    return StudyConfig.make({"sources": ["gsm8k", "mbpp", "mmlu"], "targets": list(N_EVAL), **settings})


def test_a_study_of_the_reference_protocol():
    config = study(settings={"protocol": "reference"})
    assert config.methods == ["base", "psr-reference", "ssd-reference", "spd", "spd-random"]
    assert {source: config.cell(source, 42).n_train for source in config.sources} == N_TRAIN
    assert {config.cell(source, 42).n_calibration for source in config.sources} == {50}
    assert {target: config.n_scored(target) for target in config.targets} == N_EVAL
    assert {name: config.task(name).max_new_tokens for name in config.targets} == TEST_TOKENS
    assert config.task("mmlu").train_source == "auxiliary"
    assert StudyConfig.make(yaml.safe_load(config.to_yaml())) == config


def test_what_a_study_says_goes_over_the_protocol():
    config = study(
        methods=["base", "spd"],
        source_settings={"mbpp": {"n_train": 5}},
        settings={"protocol": "reference", "n_calibration": 4, "n_eval": 6},
        task_options={"mmlu": {"train_source": "dev+val"}},
    )
    assert config.methods == ["base", "spd"]
    assert [config.cell(name, 42).n_train for name in config.sources] == [7473, 5, 2000]
    assert {config.cell(name, 42).n_calibration for name in config.sources} == {4}
    assert config.n_scored("bbh") == 6
    assert config.task("mmlu").train_source == "dev+val"
    with refused("setting 'protocol' is the same for all sources"):
        study(source_settings={"mbpp": {"protocol": "reference"}})


def test_a_target_alone_needs_no_training_questions():
    config = StudyConfig.make({"sources": ["gsm8k"], "targets": ["mmlu"], "settings": {"protocol": "reference"}})
    assert config.task("mmlu").train_source == "dev+val"


def test_a_study_of_no_protocol_is_the_papers():
    config = study()
    assert (config.settings["protocol"], config.methods[1], config.source_settings) == ("paper", "psr", {})


def test_the_ready_made_study_is_at_full_size():
    config = StudyConfig.read(preset="reference-qwen2.5-0.5b")
    assert {source: config.cell(source, 42).n_train for source in config.sources} == N_TRAIN
    assert not config.cell("gsm8k", 42).departures
    short = StudyConfig.read(preset="reference-qwen2.5-0.5b", overrides={"settings": {"max_new_tokens": 8}})
    rows = {row.stage: row for row in make_plan(short, read_shape(config.settings["model"])).rows}
    assert len(rows) == 6
    n_prompts = sum(N_TRAIN.values()) * (len(config.methods) - 1)
    assert rows["finetune"].cost.tokens == 5 * 256 * n_prompts  # every text is padded to 256 tokens


@pytest.mark.parametrize(
    "targets", [("gsm8k", "mbpp"), "gsm8k,mbpp,", iter(["gsm8k", "mbpp"]), {"gsm8k": 1, "mbpp": 2}.keys()]
)
def test_sizes_however_the_targets_are_written(targets):
    config = spd.SPDConfig.make({"protocol": "reference", "eval_tasks": targets})
    assert (config.eval_tasks, config.n_train) == (["gsm8k", "mbpp"], 7473)
    assert config.n_eval == {"gsm8k": 100, "mbpp": 257}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"energy": 0.95}, "energy 0.95 (there not set)"),
        ({"strength": 0.5}, "strength 0.5 (there 1.0)"),
        ({"rank": 1}, "rank 1 (there 0.5)"),
        ({"loss_on": "completion"}, "loss_on completion (there all)"),
        ({"temperature": None}, "temperature not set (there 0.7)"),
        ({"n_eval": 4}, "n_eval 4 (there gsm8k=100)"),
        ({"lora_targets": ["q_proj", "v_proj"]}, "lora_targets q_proj,v_proj (there q_proj,k_proj,v_proj,o_proj)"),
        ({"task_options": {"scoring": "final"}}, "task_options.scoring final (there reference)"),
        ({"task_options": {"scoring": "reference"}}, ""),
        ({"n_eval": {"mbpp": 257, "gsm8k": 100}, "eval_tasks": ["gsm8k", "mbpp"]}, ""),
        ({"task": "synthetic-math", "n_train": 3}, ""),  # a task without sizes of its own
        ({"dtype": "float16"}, ""),
    ],
)
def test_what_a_protocol_leaves_at_its_default_is_part_of_it(given, words):
    config = spd.SPDConfig.make({"protocol": "reference", **given})
    assert protocol_in_words(config) == "reference (docs/protocols.md)" + (f", but for {words}" if words else "")


@pytest.mark.parametrize("name", ["refrence", None, ["reference"], {"reference"}])
def test_no_such_protocol(name):
    with refused("unknown protocol", "paper, reference, apple-ssd"):
        spd.protocol(name)


def test_a_pair_that_is_given_decides_how_prompts_are_written(tiny_pair, tiny_settings, tmp_path):
    small = {**tiny_settings, "layers": "3", "n_random": 0, "epochs": 1, "warmup_epochs": 0, "policies": ["base"]}
    config = spd.SPDConfig.make({**small, "protocol": "reference"})
    run = spd.run(config, tmp_path / "run", progress=False, pair=tiny_pair)
    assert run.notes["resolved"]["format"] == run.config.prompt_format == "raw"
    assert "prompt_format raw (there verbatim)" in run.summary
