"""Engines are found by name, read settings that exist, and refuse the others."""

from __future__ import annotations

import pytest

import spd_lens as spd
from spd_lens.generation import engines
from spd_lens.settings import EngineSettings
from spd_lens.study.config import StudyConfig
from tests.helpers import refused


@pytest.mark.parametrize("name", engines.names())
def test_an_engine_reads_settings_that_there_are(name):
    engine = engines.find(name)
    assert engine.name == name and engine.says
    assert set(engine.takes) <= set(EngineSettings.model_fields) - {"generation_engine"}


def test_a_name_is_taken_once_and_an_unknown_one_lists_the_others():
    assert {"twin", "lens", "openai"} <= set(engines.names())
    with refused("'vlm'", *engines.names()):
        engines.find("vlm")
    other = type("Other", (engines.find("twin"),), {"name": "lens"})
    with refused("'lens'", "another name"):
        engines.register(other)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"generation_engine": "vlm"}, ["'vlm'", "twin"]),
        ({"engine_url": "http://localhost:1/v1"}, ["'twin'", "engine_url", "no settings of its own"]),
        ({"generation_engine": "openai"}, ["engine_url"]),
        ({"generation_engine": "openai", "engine_url": "localhost"}, ["engine_url", "'localhost'"]),
        ({"generation_engine": "lens", "engine_retries": 2}, ["'lens'", "engine_retries"]),
    ],
)
def test_a_config_and_a_study_refuse_settings_that_the_engine_does_not_read(settings, words):
    with refused(*words):
        spd.SPDConfig.make(settings)
    with refused(*words):
        StudyConfig.make({"settings": settings})


def test_where_a_server_is_makes_no_other_run_but_the_engine_does():
    one, other = (
        spd.SPDConfig.make({"generation_engine": "openai", "engine_url": f"http://localhost:{port}/v1"})
        for port in (1, 2)
    )
    assert not one.differences(other)
    assert set(one.differences(spd.SPDConfig.make({}))) == {"generation_engine"}
    assert one.engine_settings.given == ["engine_url"]
