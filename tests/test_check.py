"""The model check is green for every architecture that works, and red for every way to get one wrong."""

import json

import pytest
import torch
from typer.testing import CliRunner

from spd_lens.check import check_model, tokens_of
from spd_lens.cli import app
from tests.conftest import BACKENDS
from tests.helpers import refused
from tests.models.zoo import ZOO, build_pair

TAKEN = [(name, backend) for name, member in ZOO.items() for backend in BACKENDS if getattr(member, backend)]


def failed(pair):
    return [check.name for check in check_model(pair) if check.passed is False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "backend_name"), TAKEN)
def test_green(name, backend_name, dtype):
    if backend_name == "hooked" and dtype not in ZOO[name].hooked_dtypes:
        with refused(type(build_pair(name, backend_name).hf).__name__, "bfloat16", "another backend"):
            build_pair(name, backend_name, dtype).lens  # noqa: B018 (building is what is tested)
        return
    wrong = [check for check in check_model(build_pair(name, backend_name, dtype)) if check.passed is False]
    assert not wrong


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
