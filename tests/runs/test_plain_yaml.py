"""Settings from a stranger's YAML: plain values are read, anything else ends in a sentence at once."""

import time

import pytest

from spd_lens.errors import SPDError
from spd_lens.runs.config import SPDConfig, read_yaml, validated
from spd_lens.runs.plain_yaml import parse_yaml
from spd_lens.study.command import overrides
from tests.helpers import refused

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join(9 * [f'*a{n - 1}'])}]\n" for n in range(1, 9)
)
HOSTILE = {
    "laughs": (LAUGHS, "an alias (*) is not taken"),
    "recursive": ("a: &a [*a]", "an alias"),
    "merged": ("a: &a {b: 1}\nc: {<<: *a}", "an alias"),
    "alias": ("task: &x 1\nmodel: *" + "x" * 40_000, "cannot be read"),
    "deep list": ("a: " + "[" * 30_000, "nested more than 16 deep"),
    "deep table": ("a: " + "{a: " * 8_000, "nested more than 16 deep"),
    "deep block": ("- " * 20_000, "nested more than 16 deep"),
    "large": ("task: " + "x" * 50_000_000, "more than 65536 bytes"),
    "digits": ("seed: " + "9" * 5_000, "no text has more than 100 characters"),
    "sixties": ("seed: 1" + ":1" * 30_000, "no text has more than 100 characters"),
    "binary": ("model: !!binary " + "A" * 60_000, "no text has more than 100 characters"),
    "twice": ("seed: 1\nlr: 1.0\nseed: 2", "given twice"),
    "object": ("seed: !!python/object/apply:os.system [id]", "could not determine a constructor"),
    "control": ("task: a\x1bb", "cannot be read"),
    "date": ("prompt_date: 2026-13-45", "cannot be read"),
    "list": ("[1, 2]", "'setting: value'"),
    "text": ("seed", "'setting: value'"),
    "numbers": ("1: 2", "'setting: value'"),
    "utf-16": ("seed: 1".encode("utf-16"), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_settings_end_in_a_short_sentence_at_once(name, tmp_path):
    content, words = HOSTILE[name]
    path = tmp_path / "settings.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    began = time.process_time()
    with refused(path, words):
        read_yaml(path)
    assert time.process_time() - began < 2


def test_what_people_write_is_read(tmp_path):
    text = "# a comment\ntask: own.jsonl\nlr: 1.0e-4\nn_eval: {a: 3}\nkinds: [k, v]\nsystem: |\n  two\n  lines\n"
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8-sig")
    found = read_yaml(path)
    assert found["system"] == "two\nlines\n" and found["n_eval"] == {"a": 3} and found["lr"] == 1e-4
    own = SPDConfig.make({"system": "x" * 20_000})
    path.write_text(own.to_yaml())
    assert SPDConfig.make(read_yaml(path)) == own
    assert parse_yaml("") is None


@pytest.mark.parametrize("value", ["*a", "[" * 100, "9" * 5000, "x" * 100_000, "{a: 1, a: 2}"])
def test_values_of_flags_are_read_alike(value):
    with refused("--set 'a=", "no value in YAML"):
        overrides([f"a={value}"])


@pytest.mark.parametrize("settings", [{"seed": ["x"] * 10_000}, {"kinds": "z" * 50_000}])
def test_a_wrong_value_is_shortened(settings):
    with refused("setting"):
        validated(SPDConfig, settings)


def test_a_long_unknown_name_is_shortened():
    with pytest.raises(SPDError, match="unknown setting 'xxx") as caught:
        validated(SPDConfig, {"x" * 50_000: 1})
    assert len(str(caught.value)) < 2000  # the known names are listed
