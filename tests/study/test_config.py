"""Settings of a study: what is refused in one sentence, what is joined, and what may be added to a study."""

import pytest
import yaml
from rich.console import Console

from spd_lens.errors import SPDError
from spd_lens.study.command import overrides, study
from spd_lens.study.config import StudyConfig, preset_names
from spd_lens.tasks.registry import PRESETS
from tests.helpers import refused


def test_settings_are_written_out_and_read_back(study_of, tmp_path):
    config = study_of()
    assert config.settings["epochs"] == 1
    assert config.settings["weight_decay"] == 0.01  # a default of SPDConfig, in the record
    file = tmp_path / "study.yaml"
    file.write_text(config.to_yaml())
    assert StudyConfig.read(file) == config


def test_targets_are_the_sources_where_none_are_named():
    assert StudyConfig.make({"sources": ["synthetic-qa", "synthetic-math"]}).targets == [
        "synthetic-qa",
        "synthetic-math",
    ]


def test_a_cell_has_its_sources_settings_and_its_seed():
    config = StudyConfig.make(
        {
            "sources": ["synthetic-math", "synthetic-qa"],
            "seeds": [3, 5],
            "task_options": {"synthetic-math": {"difficulty": "hard"}},
            "source_settings": {"synthetic-qa": {"n_train": 7}},
            "settings": {"n_train": 20, "data_seed": 9},
        }
    )
    math, qa = config.cell("synthetic-math", 3), config.cell("synthetic-qa", 5)
    assert (math.task, math.seed, math.n_train, math.task_options) == ("synthetic-math", 3, 20, {"difficulty": "hard"})
    assert (qa.task, qa.seed, qa.n_train, qa.task_options) == ("synthetic-qa", 5, 7, {})
    assert math.data_seed == qa.data_seed == 9  # the same prompts and items for every seed
    assert math.eval_tasks == ["synthetic-math", "synthetic-qa"]


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"methods": ["spd", "spdd"]}, ("unknown method 'spdd'", "choose from")),
        ({"sources": ["gsm9k"]}, ("no task 'gsm9k'", "did you mean 'gsm8k'")),
        ({"targets": ["svamp", "nonsense"]}, ("no task 'nonsense'",)),
        ({"method": ["spd"]}, ("unknown setting 'method'",)),
        ({"settings": {"epoch": 3}}, ("unknown setting 'epoch'",)),
        ({"settings": {"epochs": 0}}, ("setting epochs = 0 is not possible",)),
        ({"settings": {"seed": 3}}, ("setting 'seed' does not belong under settings",)),
        ({"settings": {"task": "gsm8k"}}, ("setting 'task' does not belong",)),
        ({"source_settings": {"gsm8k": {"epochs": 0}}}, ("setting epochs = 0 is not possible",)),
        ({"source_settings": {"mbpp": {"epochs": 2}}}, ("source_settings names 'mbpp'",)),
        ({"source_settings": {"gsm8k": {"model": "other"}}}, ("setting 'model' is the same for all sources",)),
        ({"source_settings": {"gsm8k": {"too_long": "drop"}}}, ("setting 'too_long' is the same for all sources",)),
        ({"source_settings": {"gsm8k": {"system": "Hi"}}}, ("setting 'system' is the same for all sources",)),
        ({"source_settings": {"gsm8k": {"span_rule": "inside"}}}, ("setting 'span_rule' is the same for all sources",)),
        ({"source_settings": {"gsm8k": {"add_special_tokens": False}}}, ("'add_special_tokens' is the same for all",)),
        ({"source_settings": {"gsm8k": {"published_name": "x"}}}, ("setting 'published_name' is the same for all",)),
        ({"task_options": {"mbpp": {}}}, ("task_options names 'mbpp'",)),
        ({"task_options": {"gsm8k": {"colour": 1}}}, ("gsm8k has no option 'colour'",)),
        ({"task_options": {"gsm8k": {"path": "x"}}}, ("gsm8k takes no option 'path'", "data_dir")),
        ({"seeds": [1, 1]}, ("setting seeds = [1, 1] is not possible", "twice")),
        ({"seeds": [-1]}, ("setting seeds", "0 to 4294967295")),
        ({"seeds": []}, ("setting seeds",)),
        ({"methods": "spd"}, ("setting methods = 'spd' is not possible",)),
        ({"settings": [1]}, ("setting settings = [1] is not possible",)),
        ({"n_side_effects": -1}, ("setting n_side_effects = -1",)),
        ({"n_forced": 0}, ("setting n_forced = 0", "at least 1")),
        ({"n_forced": {"svamp": 3}}, ("n_forced names no number of items for gsm8k",)),
        ({"settings": {"n_eval": {"svamp": 3}}}, ("n_eval names no number of items for gsm8k",)),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence(settings, words):
    with refused(*words):
        StudyConfig.make({"sources": ["gsm8k"], **settings})


def test_files_of_ones_own_keep_to_their_stems(tmp_path):
    for name in ("mine", "base"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "1+1=", "completion": "2", "answer": "2"}\n')
    config = StudyConfig.make({"sources": [str(tmp_path / "mine.jsonl")]})
    assert list(config.shared.targets) == ["mine"]
    with refused("a source called 'base'"):
        StudyConfig.make({"sources": [str(tmp_path / "base.jsonl")]})


def test_a_file_goes_over_a_preset_key_by_key(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text("seeds: [7]\nsettings: {lr: 0.001}\n")
    config = StudyConfig.read(file, preset="tiny", overrides={"settings": {"epochs": 9}})
    plain = StudyConfig.read(preset="tiny")
    assert config.seeds == [7]
    assert (config.settings["lr"], config.settings["epochs"]) == (0.001, 9)
    assert config.settings["n_train"] == plain.settings["n_train"] != StudyConfig.make({}).settings["n_train"]
    with refused("unknown preset 'huge'", "choose from", "tiny"):
        StudyConfig.read(preset="huge")


def test_settings_of_the_command_line():
    found = overrides(["seeds=[1, 2]", "settings.lr=1.0e-3", "settings.n_eval={gsm8k: 3}", "n_forced="])
    assert found == {"seeds": [1, 2], "settings": {"lr": 0.001, "n_eval": {"gsm8k": 3}}, "n_forced": None}
    for wrong in ("seeds", "=3", "settings.=3", "a=[1"):
        with refused("--set"):
            overrides([wrong])
    with refused("reaches into"):
        overrides(["settings=3", "settings.lr=3"])


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_studies(name):
    config = StudyConfig.read(preset=name)
    assert "base" in config.methods
    # the paper's methods, and the control it lacks
    as_reference = "-reference" if name.startswith("reference") else ""
    assert {f"psr{as_reference}", f"ssd{as_reference}", "spd", "spd-random"} <= set(config.methods)


@pytest.mark.parametrize("name", [name for name in preset_names() if name.startswith("paper-")])
def test_the_papers_presets_have_the_papers_sizes(name):
    config = StudyConfig.read(preset=name)
    sizes = PRESETS["paper"]
    assert set(config.targets) == set(sizes)
    assert set(config.sources) == {task for task, size in sizes.items() if size["n_train"]}
    for source in config.sources:
        cell = config.cell(source, 42)
        assert (cell.n_train, cell.n_calibration) == (sizes[source]["n_train"], sizes[source]["n_calibration"])
        assert (cell.epochs, cell.lr, cell.lora_rank, cell.lora_alpha, cell.layers) == (5, 1e-5, 8, 8, "last_mid")
    assert {target: config.n_scored(target) for target in config.targets} == {t: s["n_test"] for t, s in sizes.items()}
    assert config.seeds == [42]


def test_there_is_a_preset_for_every_backbone_of_the_paper():
    models = {
        StudyConfig.read(preset=name).settings["model"].rpartition("/")[2] for name in preset_names() if "paper" in name
    }
    wanted = (
        "Qwen2.5-0.5B-Instruct",
        "Qwen2.5-7B-Instruct",
        "Qwen2.5-14B-Instruct",
        "Qwen3-4B",
        "Llama-3.1-8B-Instruct",
    )
    assert all(any(model.startswith(name) for model in models) for name in wanted)
    assert len(models) == 5


def test_what_may_be_added(study_of):
    earlier = study_of()
    assert study_of(seeds=[2, 1], methods=["spd", "psr", "base"]).extended(earlier) == []
    larger = study_of(seeds=[3, 2, 1], methods=["spd-random", "base", "spd", "psr"])
    assert larger.extended(earlier) == []
    assert larger.after(earlier).seeds == [1, 2, 3]  # what is there keeps its place
    assert larger.after(earlier).methods == ["base", "psr", "spd", "spd-random"]


@pytest.mark.parametrize(
    "changes, phrase",
    [
        ({"seeds": [1, 3]}, "seeds: 2 there and not now"),
        ({"methods": ["base", "spd"]}, "methods: psr there and not now"),
        ({"settings": {"lr": 0.02}}, "lr: 0.01 there, 0.02 now"),
        ({"settings": {"rank": 1}}, "rank: 0.5 there, 1 now"),
        ({"n_side_effects": 3}, "n_side_effects: 2 there, 3 now"),
        ({"targets": ["synthetic-qa", "synthetic-math"]}, "targets: ['synthetic-math', 'synthetic-qa'] there"),
        ({"task_options": {"synthetic-math": {"max_new_tokens": 8}}}, "synthetic-qa: {'max_new_tokens': 4} there"),
    ],
)  # fmt: skip
def test_what_may_not(study_of, changes, phrase):
    assert any(found.startswith(phrase) for found in study_of(**changes).extended(study_of()))


def test_rank_one_is_not_rank_all(study_of):
    one, everything = study_of(settings={"rank": 1}), study_of(settings={"rank": 1.0})
    assert one.extended(everything) == ["rank: 1.0 there, 1 now"]


def test_a_file_that_is_no_yaml_is_refused(tmp_path):
    file = tmp_path / "study.yaml"
    for text in ("seeds: [1", "- 1\n- 2\n"):
        file.write_text(text)
        with pytest.raises(SPDError, match="config file"):
            StudyConfig.read(file)
    file.write_text(yaml.safe_dump({"seeds": [5]}))
    assert StudyConfig.read(file).seeds == [5]


def test_the_command_needs_a_file_or_a_preset(tmp_path):
    console = Console(quiet=True)
    with refused("give a study's YAML file, or --preset with one of", "tiny"):
        study(None, None, tmp_path / "study", [], dry_run=True, console=console)
    with refused("config file", "cannot be read"):
        study(tmp_path / "none.yaml", None, tmp_path / "study", [], dry_run=False, console=console)
    with refused("unknown method 'nothing'"):
        study(None, "tiny", tmp_path / "study", ["methods=[nothing]"], dry_run=False, console=console)
    assert not list(tmp_path.iterdir())
