"""The plan: shapes against published numbers, costs against hand counts, units against what a study does."""

import os
import subprocess
import sys

import pytest

from spd_lens.study.config import StudyConfig, preset_names
from spd_lens.study.costs import (
    A100,
    HELD_PROMPT,
    HELD_TOKEN,
    LENGTHS,
    TWO_CORES,
    TWO_CORES_FLOAT32,
    Cost,
    Costs,
    Machine,
    Unit,
    bytes_per_weight,
)
from spd_lens.study.plan import duration, make_plan, rate, remaining, schedule, unit_costs
from spd_lens.study.shapes import TABLE, Shape, read_shape
from tests.helpers import refused

PUBLISHED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-4B-Instruct-2507": 4_022_468_096,
    "Qwen/Qwen3-235B-A22B-Instruct-2507": 235_093_634_560,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-4-Maverick-17B-128E-Instruct": 400_711_848_960,
}
"""As the models' safetensors files sum up (Llama 4's: without what reads images)."""
ACTIVE = {"Qwen/Qwen3-235B-A22B-Instruct-2507": 22e9, "meta-llama/Llama-4-Maverick-17B-128E-Instruct": 17e9}
"""Weights that a token goes through, as the models' cards have them."""


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("model", TABLE)
def test_the_built_in_shapes_have_the_published_number_of_weights(model):
    shape = read_shape(model)
    assert shape.n_params == PUBLISHED[model]
    assert shape.n_active == pytest.approx(ACTIVE.get(model, shape.n_params), rel=0.02)
    assert ("for a token" in str(shape)) == (model in ACTIVE)


def test_a_directory_tells_its_shape(tiny_llama_dir, tiny_qwen2_dir, tiny_pair):
    shape = read_shape(str(tiny_llama_dir))
    assert shape[2:6] == (4, 32, 2, 8)  # layers, d_model, KV heads of d_head
    assert shape.d_vocab == tiny_pair.hf.config.vocab_size
    assert shape.n_params == sum(p.numel() for p in tiny_pair.hf.parameters())
    assert read_shape(str(tiny_qwen2_dir)).n_params > shape.n_params  # biases


def test_a_model_that_nobody_knows_is_refused(tmp_path):
    with refused("the shape of 'someone/unknown' is not known here"):
        read_shape("someone/unknown")
    with refused("the shape of"):
        read_shape(str(tmp_path))


SHAPE = Shape("toy", 5000, 2, 8, 2, 4, 100)
"""5000 weights, two layers, d_model 8, two KV heads of 4, a vocabulary of 100."""


def test_costs_are_what_one_counts_by_hand():
    machine = Machine("test", flops=1000.0, bandwidth=100.0, step=0.5)
    config = StudyConfig.make(
        {
            "sources": ["synthetic-math"], "methods": ["spd"], "n_forced": 10,
            "settings": {
                "dtype": "float32", "device": "cpu", "n_calibration": 3, "n_train": 5, "max_new_tokens": 16,
                "epochs": 2, "train_batch_size": 2, "generation_batch_size": 4, "engine": "twin",
            },
        }
    )  # fmt: skip
    prompt, gold = LENGTHS["synthetic-math"]
    weights = 4 * 5000

    def cost(stage, machine=machine, **changes):
        changed = config.model_copy(update={"settings": {**config.settings, **changes}})
        unit = Unit(stage, target="synthetic-math") if stage == "measure" else Unit(stage, "synthetic-math", "spd", 42)
        return Costs(changed, SHAPE, machine).of(unit)

    extract = cost("extract")
    assert extract.tokens == 3 * (prompt + gold)
    assert extract.seconds == pytest.approx(4 * extract.tokens * 5000 / 1000)
    kept = 2 * 2048 * 8 * 4 * 34
    assert extract.memory == weights + kept  # layers, tokens, d_model, bytes, values kept of each
    assert extract.flops == 4 * extract.tokens * 5000
    # one batch, not full: weights forth and back, activations out and in
    assert extract.moved == pytest.approx(2 * weights + 2 * kept * extract.tokens / 2048)
    moments = 8 * 8 * 4 * (2 * 8 * 8 + 2 * 8)  # bytes, shards, sites, grams of a width of 8 and sums
    assert extract.host == moments
    assert cost("extract", across_heads=False).host == 8 * 8 * 4 * (2 * 2 * 4 * 4 + 2 * 8)
    last = cost("extract", layers=[1])  # last_mid of two layers begins at 0
    assert last.memory == weights + (extract.memory - weights) / 2
    assert cost("extract", engine="lens").memory == extract.memory + weights  # lens model and twin

    generate = cost("generate")
    assert generate.tokens == 5 * (prompt + 16)
    token = 2 * 2 * 2 * 4 * 4  # of the KV cache: K and V, layers, heads, d_head, bytes
    read = weights + token * 4 * (prompt + 16 / 2)
    step = max(2 * 4 * 5000 / 1000, read / 100) + 0.5 * 2
    assert generate.seconds == pytest.approx(2 * 16 * step + 2 * 5 * prompt * 5000 / 1000)
    cache = token * 4 * (prompt + 16)
    assert generate.memory == weights + cache + 4 * 4 * 100
    assert generate.on(2) == (weights + cache) / 2 + 4 * 4 * 100  # what belongs to layers is halved
    assert generate.flops == pytest.approx(2 * 5000 * (5 * prompt + 2 * 16 * 4))  # the second batch counts whole
    written = 5 * token * (prompt + 16)
    assert generate.moved == pytest.approx(2 * weights + 2 * 16 * read + written)  # prompts, steps, the cache
    assert generate.host == 5 * (HELD_PROMPT + HELD_TOKEN * (prompt + 16))

    finetune = cost("finetune")
    assert finetune.tokens == 2 * 5 * (prompt + 16)
    assert finetune.seconds == pytest.approx(6 * finetune.tokens * 5000 / 1000)  # a GPU keeps no activations
    on_cpu = cost("finetune", TWO_CORES)
    assert on_cpu.seconds == pytest.approx(4 * finetune.tokens * 5000 / TWO_CORES.flops)
    batch = 2 * (prompt + 16)
    assert on_cpu.memory == weights + 2 * batch * 8 * 4 * 34 + batch * 100 * 12
    assert finetune.memory == pytest.approx(weights + (34 + 2) * batch * 8 * 4 + batch * 100 * 12)
    assert finetune.host > generate.host  # records and rows
    full = cost("finetune", method="full")
    assert full.on(4) == pytest.approx(finetune.memory - weights + (16 * 5000 + weights) / 4)
    assert full.memory == pytest.approx(finetune.memory + 16 * 5000)  # float32 weights, gradients and moments
    assert full.seconds == pytest.approx(8 * finetune.tokens * 5000 / 1000)

    measure = cost("measure")
    both = prompt + gold + prompt + 10  # the gold completion, and the answer alone
    assert measure.tokens == 10 * both * 3  # the base, after training, under the projection
    assert measure.seconds == pytest.approx(2 * measure.tokens * 5000 / 1000)


def test_a_token_goes_through_its_experts_and_a_batch_reads_those_of_all_of_its_tokens():
    experts = SHAPE._replace(n_routed=4000, routed_share=0.25)
    assert experts.n_active == 1000 + 1000
    assert experts.n_read(2) == 1000 + 4000 * (1 - 0.75**2)
    assert experts.n_read(500) == pytest.approx(5000)
    machine = Machine("test", flops=1e3, bandwidth=1e12, step=0.0)
    config = StudyConfig.make(
        {"sources": ["synthetic-math"], "methods": ["spd"], "settings": {"n_train": 8, "generation_batch_size": 2}}
    )
    for unit in (Unit("generate", "synthetic-math", "spd", 42), Unit("finetune", "synthetic-math", "spd", 42)):
        dense, sparse = (Costs(config, shape, machine).of(unit) for shape in (SHAPE, experts))
        assert sparse.flops / dense.flops == pytest.approx(2000 / 5000)
        assert sparse.seconds / dense.seconds == pytest.approx(2000 / 5000)
        assert sparse.memory == dense.memory  # all experts are held
        assert sparse.moved <= dense.moved


def test_a_model_is_spread_over_as_few_devices_as_hold_it(study_of):
    config, large = study_of(), SHAPE._replace(n_params=10**9, n_layers=20)
    small = make_plan(config, large, A100)
    assert small.devices == 1 and " devices with " not in small.to_markdown()
    one = max(row.cost.memory for row in small.rows)
    tight = make_plan(config, large, A100._replace(memory=one / 2))
    assert tight.devices > 1 and tight.memory <= one / 2
    assert f"on each of {tight.devices} devices" in tight.to_markdown()
    assert tight.seconds == small.seconds  # one computes at a time
    fewer = max(cost.on(tight.devices - 1) for cost in unit_costs(config, large, A100).values())
    assert fewer > one / 2
    assert make_plan(config, large, A100._replace(memory=1.0)).devices == 20, "no more than layers"


def test_bytes_of_a_weight():
    assert [bytes_per_weight(name, "cpu") for name in ("float64", "float32", "bfloat16", "float16")] == [8, 4, 2, 2]
    assert bytes_per_weight("auto", "cuda") == 2  # planned where there is none
    assert bytes_per_weight("float32", "cuda:7") == 4


def test_units_of_a_study(study_of):
    units = schedule(study_of())
    assert len(set(units)) == len(units)
    stages = [unit.stage for unit in units]
    count = {stage: stages.count(stage) for stage in dict.fromkeys(stages)}
    # base: 2 measures, 1 side effects, 2 scores; extract: spd x 2 seeds; per seed 2 corpora, 2 adapters, 2 targets,
    # side effects, 2 x 2 scores after training and 1 x 2 under the projection
    assert count == {"measure": 6, "side effects": 3, "score": 14, "extract": 2, "generate": 4, "finetune": 4}
    order = [unit.seed for unit in units if unit.stage in ("generate", "finetune", "score") and unit.seed]
    assert order == sorted(order)  # a study that is stopped early has whole seeds
    assert Unit("score", "synthetic-math", "psr", 1, "synthetic-qa", "projected") not in units


def test_a_study_of_the_base_alone():
    config = StudyConfig.make({"methods": ["base"], "sources": ["synthetic-math"], "n_side_effects": 0})
    assert schedule(config) == [
        Unit("measure", method="base", target="synthetic-math"), Unit("score", method="base", target="synthetic-math"),
    ]  # fmt: skip


def test_an_extraction_is_counted_once_for_all_who_share_it(study_of):
    methods = ["spd", "spd-random", "spd-random-kl", "spd-complement", "spd-full-loss", "spd-shuffled"]
    config = study_of(methods=methods, seeds=[1, 2])
    costs = unit_costs(config, SHAPE, A100)
    paid = [unit for unit, cost in costs.items() if unit.stage == "extract" and cost.tokens]
    # one of the aligned loss, one of the full loss, and one for each seed's permutation of the answers
    assert [(unit.method, unit.seed) for unit in paid] == [
        ("spd", 1), ("spd-full-loss", 1), ("spd-shuffled", 1), ("spd-shuffled", 2)
    ]  # fmt: skip


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_has_a_plan(name):
    config = StudyConfig.read(preset=name)
    plan = make_plan(config, read_shape(config.settings["model"]))
    assert [row.stage for row in plan.rows] == ["extract", "generate", "finetune", "measure", "side effects", "score"]
    assert all(row.cost.tokens > 0 and row.cost.seconds > 0 and not row.measured for row in plan.rows)
    assert plan.machine in ([A100] if name.startswith(("paper", "reference")) else [TWO_CORES, TWO_CORES_FLOAT32])
    assert plan.memory < 80e9
    text = plan.to_markdown()
    assert config.settings["model"] in text
    assert "| finetune |" in text and "| memory in GB |" in text
    assert "Assumed: " in text and "TFLOP/s" in text
    assert "| PFLOP | TB moved |" in text and plan.devices == 1
    if name.startswith(("paper", "reference")):
        assert plan.memory > 2 * PUBLISHED[config.settings["model"]]  # bfloat16


def test_measured_seconds_replace_the_assumption(study_of):
    config = study_of()
    assumed = make_plan(config, SHAPE, TWO_CORES)
    plan = make_plan(config, SHAPE, TWO_CORES, measured={"generate": {"seconds": 30.0, "work": 10.0}})
    for before, after in zip(assumed.rows, plan.rows, strict=True):
        assert after.measured == (after.stage == "generate")
        factor = 3 if after.measured else 1
        assert after.cost.seconds == pytest.approx(before.cost.seconds * factor)
    assert ", measured rate |" in plan.to_markdown()
    assert (plan.seconds, plan.memory) == (
        sum(row.cost.seconds for row in plan.rows), max(row.cost.memory for row in plan.rows)
    )  # fmt: skip


def test_the_clock_says_what_it_knows_and_no_more():
    a, b, c = Unit("generate"), Unit("generate", seed=2), Unit("finetune")
    costs = {a: Cost(1, 2.0), b: Cost(1, 4.0), c: Cost(1, 10.0), Unit("extract"): Cost()}
    assert remaining(costs, {}, [a, b, c]) == "time left unknown"
    half = {"generate": {"seconds": 300.0, "work": 2.0}}
    assert remaining(costs, half, [b, c]) == "at least 10 min left (finetune not yet measured)"
    both = {**half, "finetune": {"seconds": 5.0, "work": 10.0}}
    assert remaining(costs, both, [b, c]) == "about 10 min left"
    assert remaining(costs, both, [c]) == "about 5 s left"
    assert remaining(costs, {}, [Unit("extract")]) == "about 0 s left"  # nothing that costs anything is left


def test_numbers_for_readers():
    assert [duration(x) for x in (0, 59, 120, 3 * 3600, 5 * 86400)] == ["0 s", "59 s", "2 min", "3.0 h", "5.0 days"]
    assert rate({}) is None
    assert rate({"seconds": 0.0, "work": 1.0}) is None
    assert rate({"seconds": 3.0, "work": 2.0}) == 1.5


def test_the_dry_run_writes_nothing_and_needs_no_weights(tmp_path):
    """As a user does it, with an empty cache and no network: only a process of its own proves that."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "COLUMNS": "300"}
    arguments = ["study", "--preset", "paper-llama3.1-8b", "--dry-run", "--out", str(tmp_path / "study")]
    done = subprocess.run(
        [sys.executable, "-m", "spd_lens", *arguments], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "8,030 million weights" in done.stdout
    for stage in ("extract", "generate", "finetune", "measure", "score"):
        assert stage in done.stdout
    assert not (tmp_path / "study").exists()
