"""Sizes that a machine's rates choose: monotone, within the minutes promised, recorded, and kept by what is resumed."""

import itertools
import logging

import pytest

from spd_lens.models import MatrixRates
from spd_lens.runs import DEMO_SIZES, Run, SPDConfig
from spd_lens.settings import DEFAULT_MODEL
from spd_lens.study.config import TINY_SIZES, StudyConfig
from spd_lens.study.costs import LENGTHS, Machine, run_seconds
from spd_lens.study.folder import Study
from spd_lens.study.shapes import read_shape
from spd_lens.study.sizes import DEMO_SECONDS, begin_demo, demo_seconds, largest, machine_size, sized_study
from tests.helpers import refused

ORDER = list(DEMO_SIZES)
SLOW, FAST = MatrixRates(2e10, 1e9), MatrixRates(1e15, 1e12)


@pytest.fixture
def rates(monkeypatch):
    """Let the machine have these rates; None: it must not be asked."""

    def _rates(found):
        def ask(*_):
            assert found is not None, "the machine was timed"
            return found

        monkeypatch.setattr("spd_lens.study.costs.matrix_rates", ask)

    return _rates


def machine(flops):
    return Machine("test", flops=flops, bandwidth=flops / 30, step=5e-4, recomputes=False)


def test_a_faster_machine_gets_no_smaller_size_and_minutes_are_kept():
    chosen = []
    for flops in (10**n for n in range(9, 16)):
        seconds = {size: sum(stages.values()) for size, stages in demo_seconds(machine(flops)).items()}
        assert list(seconds.values()) == sorted(seconds.values())
        size = largest(seconds, DEMO_SECONDS)
        assert seconds[size] <= DEMO_SECONDS or size == "small"
        assert all(seconds[larger] > DEMO_SECONDS for larger in ORDER[ORDER.index(size) + 1 :])
        chosen.append(ORDER.index(size))
    assert chosen == sorted(chosen)
    assert {chosen[0], chosen[-1]} == {0, 2}


def test_the_seconds_of_a_run_are_counted_by_hand():
    prompt, gold = LENGTHS["synthetic-math"]
    config, shape = SPDConfig.make({**DEMO_SIZES["small"], "dtype": "float32"}), read_shape(DEFAULT_MODEL)
    found = run_seconds(config, shape, machine(1e11))
    token = shape.n_params / 1e11  # seconds of one operation with each weight
    assert found["extract"] == pytest.approx(4 * 20 * (prompt + gold) * token)
    assert found["finetune"] == pytest.approx(4 * 2 * 16 * (prompt + 64) * token)
    n_passes = 1 + 2 + config.n_random  # base, projected and fine-tuned, random subspaces
    items = 20 * (prompt + gold + prompt + 10)  # and once more where the answer alone is asked for
    assert found["effects"] == pytest.approx(2 * n_passes * (items + 16 * 87) * token)
    cache = 16 * (prompt + 32) * 30 * 2 * 3 * 64  # rows, tokens on the mean, layers, K and V, heads, d_head
    step = max(2 * 16 * token, 4 * (shape.n_params + cache) / (1e11 / 30)) + 30 * 5e-4
    assert found["generate"] == pytest.approx(2 * 16 * prompt * token + 64 * step)
    assert found["compare"] < found["generate"] < found["evaluate"]


def test_a_size_that_is_chosen_is_said_recorded_and_kept(rates, tmp_path, caplog):
    rates(SLOW)
    with caplog.at_level(logging.INFO, logger="spd_lens"):
        config = begin_demo(tmp_path / "demo")
    assert config == SPDConfig.make(DEMO_SIZES["small"])
    (said,) = (record.getMessage() for record in caplog.records if "size" in record.getMessage())
    assert all(word in said for word in ("size small", "20 GFLOP/s", "medium", "large", "--size"))
    run = Run(tmp_path / "demo")
    assert run.config == config
    assert run.notes["foreseen"].keys() == {"extract", "generate", "compare", "finetune", "effects", "evaluate"}
    assert run.notes["foreseen"]["effects"] > 60
    rates(None)
    assert begin_demo(tmp_path / "demo") == config


def test_a_size_given_by_hand_is_taken_without_a_look_at_the_machine(rates, tmp_path):
    rates(None)
    assert begin_demo(tmp_path, "medium") == SPDConfig.make(DEMO_SIZES["medium"])
    assert not any(tmp_path.iterdir())
    Run.open(tmp_path, begin_demo(tmp_path, "small"))
    assert begin_demo(tmp_path).n_eval == 20
    with refused("holds a run with other settings", "n_eval"):
        begin_demo(tmp_path, "large")


def test_the_demo_leaves_other_folders_alone(rates, tmp_path):
    rates(None)
    (tmp_path / "letter.txt").write_text("Dear reader")
    with refused("is not a run directory"):
        begin_demo(tmp_path)


def test_sizes_of_ones_own(rates):
    for found, size in ((SLOW, "small"), (FAST, "large")):
        rates(found)
        assert machine_size("cpu", "float32") == size


def test_the_tiny_study_has_sizes(rates, tmp_path):
    plain = StudyConfig.read(preset="tiny")
    smaller = {name: StudyConfig.read(preset="tiny", size=name) for name in TINY_SIZES}
    assert smaller["large"] == plain
    for one, other in itertools.pairwise(smaller.values()):
        assert one.settings["n_train"] <= other.settings["n_train"]
        assert one.n_measured("synthetic-math") < other.n_measured("synthetic-math")
    rates(FAST)
    assert sized_study(None, "tiny", {}, tmp_path) == plain
    rates(SLOW)
    chosen = sized_study(None, "tiny", {"settings": {"n_train": 5}}, tmp_path)
    assert chosen.seeds == [1, 2]
    assert chosen.settings["n_train"] == 5  # what is given goes over the size
    Study(tmp_path).begin(smaller["medium"])
    rates(None)
    assert sized_study(None, "tiny", {}, tmp_path) == smaller["medium"]
    assert sized_study(None, "small", {}, tmp_path) == StudyConfig.read(preset="small")
    with refused("'tiny' alone has sizes"):
        sized_study(None, "small", {}, tmp_path, "large")
