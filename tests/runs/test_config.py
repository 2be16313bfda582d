"""Settings: the paper's values, what is refused and how, files under flags, and round trips."""

import itertools

import pytest
import yaml

from spd_lens.runs.config import DEMO_SIZES, SPDConfig
from tests.helpers import refused

PAPER = {
    # tables 7 and 8, appendix A.3; `layers` is {L, L/2} counted from 1
    "n_calibration": 50,
    "layers": "last_mid",
    "kinds": ["k", "v"],
    "rank": 0.5,
    "strength": 1.0,
    "center": False,
    "loss": "aligned",
    "method": "lora",
    "lora_rank": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.05,
    "lora_targets": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "lr": 1e-5,
    "weight_decay": 0.01,
    "epochs": 5,
    "loss_on": "all",
    "seed": 42,
    "data_seed": 42,
    "n_eval": 100,
}


def test_defaults_are_the_papers():
    config = SPDConfig.make({}).model_dump()
    assert {name: config[name] for name in PAPER} == PAPER


def test_nothing_is_left_to_sample_greedily_by_default():
    config = SPDConfig.make({})
    assert (config.temperature, config.top_p, config.top_k) == (None, None, None)  # the model's own, then 0.7 and 0.95


def test_the_demo_is_the_same_job_at_every_size():
    sizes = [SPDConfig.make(settings) for settings in DEMO_SIZES.values()]
    counted = {"n_calibration", "n_train", "epochs", "max_new_tokens", "n_eval", "n_random", "n_compared"}
    for smaller, larger in itertools.pairwise(sizes):
        assert smaller.differences(larger).keys() <= counted
        assert all(getattr(smaller, name) <= getattr(larger, name) for name in counted)


def test_unknown_setting_is_refused_by_name():
    with refused("'n_trian'", "n_train"):
        SPDConfig.make({"n_trian": 3})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"backend": "hokked"}, ["backend", "'hokked'", "hooked"]),
        ({"prompt_format": "xml"}, ["prompt_format", "'xml'"]),
        ({"system": 3}, ["system", "3"]),
        ({"enable_thinking": "perhaps"}, ["enable_thinking", "'perhaps'"]),
        ({"too_long": "truncate"}, ["too_long", "'truncate'", "drop"]),
        ({"n_calibration": 0}, ["n_calibration", "0", "greater than or equal to 1"]),
        ({"n_train": -1}, ["n_train", "-1"]),
        ({"n_eval": 2.5}, ["n_eval", "2.5"]),
        ({"n_eval": "many"}, ["n_eval", "'many'"]),
        ({"n_eval": 0}, ["n_eval", "0", "at least 1"]),
        ({"n_eval": True}, ["n_eval", "True"]),
        ({"n_eval": "gsm8k=3,svamp"}, ["n_eval", "gsm8k=3,svamp"]),
        ({"n_eval": {"gsm8k": 2.5}}, ["n_eval", "2.5"]),
        ({"n_eval": {"gsm8k": 0}}, ["n_eval", "0"]),
        ({"rank": 0}, ["rank", "0", "at least 1"]),
        ({"rank": "0"}, ["rank", "'0'", "at least 1"]),
        ({"rank": -3}, ["rank", "-3"]),
        ({"rank": 0.0}, ["rank", "0.0"]),
        ({"rank": 1.5}, ["rank", "1.5", "fraction"]),
        ({"rank": "half"}, ["rank", "'half'"]),
        ({"rank": "nan"}, ["rank", "'nan'"]),
        ({"rank": True}, ["rank", "True"]),
        ({"rank": None}, ["rank", "None"]),
        ({"rank": [1]}, ["rank", "[1]"]),
        ({"kinds": "k,w"}, ["kinds", "'w'", "k, v, q"]),
        ({"kinds": []}, ["kinds", "[]"]),
        ({"kinds": ""}, ["kinds"]),
        ({"layers": "first"}, ["layers", "'first'", "last_mid"]),
        ({"layers": "1,x"}, ["layers", "'1,x'"]),
        ({"layers": []}, ["layers", "[]"]),
        ({"layers": ""}, ["layers"]),
        ({"layers": [1.5]}, ["layers", "[1.5]"]),
        ({"layers": True}, ["layers", "True"]),
        ({"layers": None}, ["layers", "None"]),
        ({"strength": 1.1}, ["strength", "1.1"]),
        ({"strength": "nan"}, ["strength", "'nan'"]),
        ({"loss": "aligend"}, ["loss", "'aligend'"]),
        ({"engine": "both"}, ["engine", "'both'"]),
        ({"temperature": -0.1}, ["temperature", "-0.1"]),
        ({"top_p": 0}, ["top_p", "0"]),
        ({"lr": 0}, ["lr", "0"]),
        ({"lr": float("inf")}, ["lr", "inf"]),
        ({"lora_dropout": 1}, ["lora_dropout", "1"]),
        ({"lora_targets": []}, ["lora_targets"]),
        ({"policies": "base,spds"}, ["policies.1", "'spds'"]),
        ({"policies": []}, ["policies"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"data_seed": -1}, ["data_seed", "-1"]),
        ({"seed": 2**32}, ["seed", str(2**32)]),
        ({"task_options": "difficulty"}, ["task_options"]),
        ({"model": None}, ["model", "None"]),
    ],
)
def test_wrong_value_is_one_sentence_with_setting_and_value(settings, words):
    with refused("setting", *words):
        SPDConfig.make(settings)


@pytest.mark.parametrize(
    ("text", "rank"),
    [("16", 16), ("0.5", 0.5), ("1", 1), ("1.0", 1.0), (" 8", 8), (16, 16), (0.25, 0.25), ("1e-1", 0.1)],
)
def test_rank_counts_or_is_a_share(text, rank):
    made = SPDConfig.make({"rank": text}).rank
    assert made == rank
    assert type(made) is type(rank)  # 1 is one direction, 1.0 is all of them


@pytest.mark.parametrize("layers", ["1,3", " 3, 1 ", [1, 3], [3, 1, 3], (1, 3), ["1", "3"]])
def test_layers_have_one_spelling(layers):
    assert SPDConfig.make({"layers": layers}).layers == [1, 3]


def test_one_layer_needs_no_list():
    assert SPDConfig.make({"layers": 2}).layers == [2]


@pytest.mark.parametrize("name", ["kinds", "lora_targets"])
def test_comma_lists(name):
    allowed = {"kinds": ["k", "v"], "lora_targets": ["a", "b"]}[name]
    for text in (",".join(allowed), " , ".join(allowed) + ","):
        assert getattr(SPDConfig.make({name: text}), name) == allowed


def test_eval_tasks_and_policies_as_text():
    config = SPDConfig.make({"eval_tasks": "gsm8k, svamp", "policies": "base,projected"})
    assert (config.eval_tasks, config.policies) == (["gsm8k", "svamp"], ["base", "projected"])


def test_paths_are_text(tmp_path):
    assert SPDConfig.make({"data_dir": tmp_path, "model": tmp_path}).data_dir == str(tmp_path)


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(ValueError, match="frozen"):
        SPDConfig.make({}).seed = 1


CHANGED = {
    "task": "synthetic-math",
    "task_options": {"difficulty": "hard", "max_new_tokens": 9},
    "eval_tasks": ["synthetic-qa", "ü.jsonl"],
    "layers": [0, 3],
    "kinds": ["v"],
    "rank": 1,
    "per_head": False,
    "lr": 1e-7,
    "temperature": 0.0,
    "data_dir": None,
    "system": "",
    "enable_thinking": False,
    "too_long": "drop",
    "n_eval": {"synthetic-qa": 3},
}


@pytest.mark.parametrize("settings", [{}, CHANGED, {"rank": 1.0}, {"task_options": {"subjects": ("a", "b")}}])
def test_yaml_round_trip(tmp_path, settings):
    config = SPDConfig.make(settings)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    again = SPDConfig.read(path)
    assert not config.differences(again)
    assert type(again.rank) is type(config.rank)
    assert set(yaml.safe_load(config.to_yaml())) == set(SPDConfig.model_fields)  # every setting is written out


def test_flags_over_file_over_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("lr: 1e-3\nseed: 1\ntask_options: {difficulty: hard, span: line}\n")
    config = SPDConfig.read(path, {"seed": 2, "task_options": {"span": "number"}})
    assert (config.lr, config.seed, config.epochs) == (1e-3, 2, 5)
    assert config.task_options == {"difficulty": "hard", "span": "number"}


def test_empty_file_is_all_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("# nothing\n")
    assert not SPDConfig.read(path).differences(SPDConfig.make({}))


@pytest.mark.parametrize(
    "content",
    [b"lr: [1", b"- lr\n- seed\n", b"lr", b"[]", b"false", b"1: 2", b"\xff\xfe", b"a: b: c", b"lr: !!python/name:os.x"],
)
def test_bad_yaml(tmp_path, content):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with refused(path):
        SPDConfig.read(path)


def test_missing_file(tmp_path):
    with refused("nowhere.yaml", "cannot be read"):
        SPDConfig.read(tmp_path / "nowhere.yaml")


def test_differences():
    base = SPDConfig.make({"seed": 1})
    assert base.differences(SPDConfig.make({"seed": 1})) == {}
    assert base.differences(SPDConfig.make({"lr": 1e-4})) == {"lr": (1e-5, 1e-4), "seed": (1, 42)}


def test_one_direction_differs_from_all_directions():
    assert SPDConfig.make({"rank": 1}).differences(SPDConfig.make({"rank": 1.0})) == {"rank": (1, 1.0)}


def test_order_of_task_options_is_no_difference():
    first, second = ({"task_options": dict(pairs)} for pairs in ([("a", 1), ("b", 2)], [("b", 2), ("a", 1)]))
    assert not SPDConfig.make(first).differences(SPDConfig.make(second))


@pytest.mark.parametrize("n_eval", ["gsm8k=3, svamp=4", {"gsm8k": 3, "svamp": 4}, {"gsm8k": "3", "svamp": 4}])
def test_items_for_each_task(n_eval):
    config = SPDConfig.make({"n_eval": n_eval})
    assert (config.n_test("gsm8k"), config.n_test("svamp")) == (3, 4)
    with refused("mbpp", "gsm8k, svamp"):
        config.n_test("mbpp")


def test_items_for_every_task():
    assert SPDConfig.make({"n_eval": "7"}).n_test("whatever") == 7


def test_preset_under_file_under_flags(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("task: gsm8k\neval_tasks: [gsm8k, mbpp, bbh]\nn_calibration: 7\n")
    config = SPDConfig.read(path, {"n_train": 9}, preset="paper")
    assert (config.n_calibration, config.n_train) == (7, 9)
    assert config.n_eval == {"gsm8k": 100, "mbpp": 257, "bbh": 300}
    assert SPDConfig.read(None, {"task": "mmlu"}, preset="paper").n_train == 2000


@pytest.mark.parametrize(
    ("settings", "preset", "words"),
    [
        ({}, "papr", ["'papr'", "paper"]),
        ({"task": "synthetic-math"}, "paper", ["synthetic-math", "gsm8k"]),
        ({"task": "svamp"}, "paper", ["svamp", "only evaluates"]),
        ({"eval_tasks": ["own.jsonl"]}, "paper", ["own", "gsm8k"]),
    ],
)
def test_presets_that_do_not_fit(settings, preset, words):
    with refused(*words):
        SPDConfig.read(None, settings, preset)


def test_targets_are_the_source_unless_named():
    assert SPDConfig.make({"task": "svamp"}).targets == {"svamp": "svamp"}
    config = SPDConfig.make({"eval_tasks": ["gsm8k", "mine/own.jsonl", "gsm8k"]})
    assert config.targets == {"gsm8k": "gsm8k", "own": "mine/own.jsonl"}


def test_two_files_of_one_name_are_refused():
    with refused("a/own.jsonl", "b/own.jsonl"):
        _ = SPDConfig.make({"eval_tasks": ["a/own.jsonl", "b/own.jsonl"]}).targets
