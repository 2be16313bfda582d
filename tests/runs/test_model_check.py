"""The model check as a command, red where something is wrong; its matrix and its mutations are in tests/models."""

import json

import torch
from typer.testing import CliRunner

from spd_lens.cli.commands import app
from spd_lens.runs.model_check import EXAMPLES, check_model, require_core, tokens_of
from tests.helpers import refused


def failed(pair):
    return [check.name for check in check_model(pair) if check.passed is False]


def test_red_for_a_lens_model_that_was_edited(fresh_pair):
    with torch.no_grad():
        next(p for p in fresh_pair.lens.parameters() if p.ndim > 1).add_(0.3)
    assert "lens = twin" in failed(fresh_pair)


def test_red_where_the_template_brings_a_second_bos(tiny_qwen2_dir):
    import spd_lens as spd

    pair = spd.load(str(tiny_qwen2_dir), dtype="float32", device="cpu")
    assert not failed(pair)
    pair.tokenizer.chat_template = "{{ bos_token }}" + pair.tokenizer.chat_template
    assert "special tokens" in failed(pair)


def test_red_where_the_template_makes_an_empty_prompt(tiny_qwen2_pair, monkeypatch):
    monkeypatch.setattr(tiny_qwen2_pair.tokenizer, "chat_template", "{{ '' }}")
    said = {check.name: check.says for check in check_model(tiny_qwen2_pair) if check.passed is False}
    assert "is empty" in said["special tokens"] and "is empty" in said["cached, left-padded = whole"]


def test_the_command_prints_every_line_and_the_tokens(tiny_qwen2_dir):
    arguments = ["check", str(tiny_qwen2_dir), "--dtype", "float32"]
    found = CliRunner().invoke(app, [*arguments, "--show-tokens", "Tom has 12"], env={"COLUMNS": "200"})
    assert found.exit_code == 0
    for line in ("lens = twin", "hook = fold", "gradients", "<|start|>", "qwen2"):
        assert line.lower() in found.output.lower()
    record = json.loads(CliRunner().invoke(app, [*arguments, "--json", "--show-tokens", "Tom has 12"]).stdout)
    assert record["passed"] is True
    assert {check["name"] for check in record["checks"]} >= {"model", "hook = fold", "cached, left-padded = whole"}
    assert "Tom has 12" in "".join(token["text"] for token in record["tokens"])


def test_tokens_are_those_that_generation_starts_from(tiny_qwen2_pair):
    ids = [id for _, id, _ in tokens_of(tiny_qwen2_pair, "Tom")]
    assert ids == tiny_qwen2_pair.format.prompt_ids("Tom")


def test_the_check_of_a_run_has_spans_for_the_rule_overlap(tiny_pair):
    """Where a tokenizer joins numbers to the space before them, none of its examples has a token inside its span."""
    inside = tiny_pair.with_span_rule("inside")
    with refused("no token lies inside", "'sum'"):
        inside.encode(EXAMPLES[0])
    require_core(inside, "last_mid", ["k", "v"])
