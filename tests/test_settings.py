"""Settings that functions take whole: declared once, the same by keyword, and named where `help` shows them."""

import inspect

import pytest

import spd_lens as spd
from spd_lens.settings import (
    LATER,
    CallSettings,
    Extraction,
    ExtractionKeywords,
    SamplingKeywords,
    SamplingSettings,
    Settings,
    TrainingKeywords,
    TrainingSettings,
)
from tests.helpers import EXAMPLES, refused

CALLS = {
    spd.extract: (Extraction, ExtractionKeywords),
    spd.generate: (SamplingSettings, SamplingKeywords),
    spd.finetune: (TrainingSettings, TrainingKeywords),
}
FUNCTIONS = pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)

CHANGED = {
    "layers": [1], "kinds": ["v"], "loss": "full", "engine": "twin", "max_calibration_tokens": 7, "max_new_tokens": 5,
    "temperature": 0.5,
    "top_p": 0.5, "top_k": 3, "generation_batch_size": 2, "seed": 7, "method": "full", "epochs": 2, "lr": 0.5,
    "weight_decay": 0.25, "train_batch_size": 3, "lora_rank": 2, "lora_alpha": 4, "lora_dropout": 0.5,
    "lora_targets": ["q_proj"], "loss_on": "completion", "warmup_epochs": 0.5, "early_stop": True, "retokenise": True,
    "max_length": 16, "loss_on_padding": True, "max_prompt_tokens": 12, "keep": ["cross"], "sinks": "attended",
    "labels": "sampled", "across_heads": False,
}  # fmt: skip
"""A value other than the default for every setting that a function takes."""
OF_A_CALL = {"samples_per_prompt", "gradient_accumulation", "keep", "sinks", "labels"}
"""Settings that a config does not have."""


@FUNCTIONS
def test_every_setting_has_a_keyword_which_help_names(function):
    kind, keywords = CALLS[function]
    assert set(kind.keywords) == set(keywords.__annotations__)
    assert sorted(kind.keywords.values()) == sorted(kind.model_fields)
    listed = inspect.getdoc(function).split("**keywords:")[1].split("Returns:")[0].split("Raises:")[0]
    assert all(f" {name}" in listed for name in keywords.__annotations__)
    assert kind.__name__ in listed
    assert all(field.description for field in kind.model_fields.values())


@FUNCTIONS
def test_a_config_hands_on_all_that_it_knows(function):
    kind, _ = CALLS[function]
    config = spd.SPDConfig.make({name: value for name, value in CHANGED.items() if name not in OF_A_CALL})
    part = {Extraction: config.extraction, SamplingSettings: config.sampling, TrainingSettings: config.training}[kind]
    assert type(part) is kind
    known = {name: value for name, value in part if name in spd.SPDConfig.model_fields}
    assert known == {name: CHANGED[name] for name in known}
    assert all(value != getattr(kind(), name) for name, value in known.items())
    assert set(kind.model_fields) - set(known) <= OF_A_CALL


def test_a_copy_of_a_config_hands_on_what_was_changed():
    assert spd.SPDConfig.make({}).model_copy(update={"lr": 0.5}).training.lr == 0.5


def test_settings_are_declared_once():
    def declared(kind):
        return [name for name in vars(kind).get("__annotations__", {}) if name in kind.model_fields]

    def below(kind):
        return {kind, *(each for sub in kind.__subclasses__() for each in below(sub))}

    groups = [*spd.SPDConfig.__bases__, *below(CallSettings)]
    names = [name for group in groups for name in declared(group)]
    assert len(names) == len(set(names))
    assert {*spd.SPDConfig.model_fields, *OF_A_CALL} == set(names)
    assert issubclass(spd.SPDConfig, Settings)


def test_training_json_records_settings_by_keyword_and_in_its_old_order():
    assert TrainingSettings().recorded() == {
        "method": "lora", "rank": 8, "alpha": 8, "dropout": 0.05, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "lr": 1e-5, "weight_decay": 0.01, "epochs": 5, "batch_size": 8, "gradient_accumulation": 1, "loss_on": "all",
        "seed": 42,
    }  # fmt: skip
    assert list(TrainingSettings().by_keyword()) == list(TrainingKeywords.__annotations__)
    for name, value in CHANGED.items():
        if name in LATER:
            changed = TrainingSettings(**{name: value}).recorded()
            assert changed == TrainingSettings().recorded() | {name: value}
    assert LATER.keys() <= CHANGED.keys()


@FUNCTIONS
def test_keywords_go_over_settings(function):
    kind, _ = CALLS[function]
    for name, field in kind.keywords.items():
        value = CHANGED.get(field, 9)
        over = kind.given(None, {name: value}, "f")
        assert over.by_keyword()[name] == value
        assert kind.given(over, {}, "f") == over
        assert kind.given(over, {name: "other"}, "f").by_keyword() == over.by_keyword() | {name: "other"}


@FUNCTIONS
def test_an_unknown_keyword_is_a_type_error(tiny_pair, function):
    with pytest.raises(TypeError, match=rf"{function.__name__}\(\) got an unexpected keyword argument 'lora_rnk'"):
        function(tiny_pair, [], lora_rnk=3)


@FUNCTIONS
def test_settings_of_another_function_are_refused(tiny_pair, function):
    with refused(function.__name__, CALLS[function][0].__name__, "SPDConfig"):
        function(tiny_pair, [], settings=spd.SPDConfig())


def test_extract_by_keyword_and_whole(tiny_pair, tmp_path):
    config = spd.SPDConfig.make({"layers": [1], "kinds": "v", "loss": "full", "engine": "twin"})
    whole = spd.extract(tiny_pair, EXAMPLES, settings=config.extraction, progress=False)
    single = spd.extract(tiny_pair, EXAMPLES, layers=1, kinds="v", loss="full", engine="twin", progress=False)
    saved = [moments.save(tmp_path / name).read_bytes() for name, moments in (("a", whole), ("b", single))]
    assert saved[0] == saved[1]
    assert [str(site) for site in whole.sites] == ["1.v"]


def test_generate_and_finetune_by_keyword_and_whole(tiny_pair, tmp_path):
    config = spd.SPDConfig.make(
        {"max_new_tokens": 4, "temperature": 1.5, "top_p": 0.9, "top_k": 20, "seed": 3, "generation_batch_size": 2,
         "lr": 0.01, "epochs": 1, "train_batch_size": 2, "lora_rank": 2, "weight_decay": 0}
    )  # fmt: skip
    whole = spd.generate(tiny_pair, ["a b", "c"], settings=config.sampling, progress=False)
    single = spd.generate(
        tiny_pair, ["a b", "c"], max_new_tokens=4, temperature=1.5, top_p=0.9, top_k=20, seed=3, progress=False
    )
    assert (whole.records, whole.settings) == (single.records, single.settings)
    out = spd.finetune(tiny_pair, whole, settings=config.training, out=tmp_path / "adapter", progress=False)
    made = (out / "adapter_model.safetensors").stat().st_mtime_ns
    again = spd.finetune(
        tiny_pair, whole, out=out, lr=0.01, epochs=1, batch_size=2, rank=2, weight_decay=0, seed=3, progress=False
    )  # refused or trained anew if a setting were another one
    assert (again / "adapter_model.safetensors").stat().st_mtime_ns == made
