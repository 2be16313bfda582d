"""The loop that runs and studies share."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from spd_lens.runs.config import SPDConfig
from spd_lens.runs.preflight import check_settings
from spd_lens.runs.run_dir import Run
from spd_lens.runs.stages import Step, note_set_up, work
from tests.helpers import refused


@pytest.mark.parametrize("keeps_lens", [True, False])
def test_what_is_not_done_is_done_in_order_and_without_the_lens_model(keeps_lens):
    seen = []
    pair = SimpleNamespace(drop_lens=lambda: seen.append("lens dropped"))
    steps = [
        Step("extract", "moments", lambda: True, lambda: seen.append("never")),
        Step("extract", "subspace", lambda: False, lambda: seen.append("subspace")),
        Step("generate", "corpus", lambda: False, lambda: seen.append("corpus")),
    ]

    def do(step, place, rest):
        step.do()
        seen.append((place, [other.what for other in rest]))

    work(steps, pair, keeps_lens, do)
    dropped = [] if keeps_lens else ["lens dropped"]
    assert seen == ["subspace", ("[1/2]", ["corpus"]), *dropped, "corpus", ("[2/2]", []), *dropped]


def test_what_a_local_model_says_of_itself_is_noted_where_something_is_published_of_it(tiny_pair, tmp_path):
    files = SimpleNamespace(_model_name_or_path="Qwen2.5 Coder 0.5B Instruct AWQ")
    for place, model, says, noted in (
        ("gguf", "models/model.gguf", files, "Qwen2.5-Coder-0.5B-Instruct"),
        ("silent", "models/model.gguf", SimpleNamespace(), None),
        ("unknown", "models/model.gguf", SimpleNamespace(_model_name_or_path="mine"), None),
        ("hub", "Qwen/Qwen2.5-7B-Instruct", files, None),  # whose name says it already
    ):
        run = Run(tmp_path / place)
        run.path.mkdir()
        config = SPDConfig.make({"model": model})
        with pytest.MonkeyPatch.context() as patch:
            for name, value in vars(says).items():
                patch.setattr(tiny_pair.hf.config, name, value, raising=False)
            note_set_up(run, config, tiny_pair)
        assert run.notes.get("published_name") == noted


def test_a_name_under_which_nothing_is_published_is_refused():
    check_settings(SPDConfig.make({"published_name": "qwen2.5-0.5b-instruct"}))
    with refused("'Qwen2.5-0.5B-Instuct'", "published_name", "did you mean 'Qwen2.5-0.5B-Instruct'"):
        check_settings(SPDConfig.make({"published_name": "Qwen2.5-0.5B-Instuct"}))
    with refused("'mine'", "leave published_name out", "SmolLM2-135M-Instruct"):
        check_settings(SPDConfig.make({"published_name": "mine"}))
