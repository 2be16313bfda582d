"""The plan: shapes against published numbers, costs against hand counts, units against what a study does."""

import dataclasses
import os
import subprocess
import sys

import pytest

from spd_lens.study import StudyConfig, make_plan, preset_names
from spd_lens.study.costs import A100, TWO_CORES, TWO_CORES_FLOAT32, Cost, Costs, Machine
from spd_lens.study.plan import Clock, Unit, duration, rate, schedule, unit_costs
from spd_lens.study.shapes import Shape, known, read_shape
from tests.helpers import refused

PUBLISHED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-4B-Instruct-2507": 4_022_468_096,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
}
"""As the models' safetensors files sum up."""


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("model", known())
def test_the_built_in_shapes_have_the_published_number_of_weights(model):
    shape = read_shape(model)
    assert shape.n_params == PUBLISHED[model]
    # the matrices of the blocks, and the embeddings once or twice: all but norms and biases
    embeddings = shape.d_vocab * shape.d_model
    small = (shape.n_params - shape.n_block_params) / embeddings
    assert small == pytest.approx(round(small), abs=0.01)


def test_a_directory_tells_its_shape(tiny_llama_dir, tiny_qwen2_dir, tiny_pair):
    shape = read_shape(str(tiny_llama_dir))
    assert (shape.n_layers, shape.d_model, shape.n_heads, shape.n_kv_heads, shape.d_head) == (4, 32, 4, 2, 8)
    assert shape.n_params == sum(p.numel() for p in tiny_pair.hf.parameters())
    assert shape.n_block_params == 4 * (32 * 8 * 12 + 3 * 32 * 64)
    assert shape.widths("q_proj") == (32, 32)
    assert shape.widths("k_proj") == shape.widths("v_proj") == (32, 16)
    assert shape.widths("down_proj") == (64, 32)
    assert shape.widths("lm_head") is None
    assert read_shape(str(tiny_qwen2_dir)).n_params > shape.n_params  # biases


def test_a_model_that_nobody_knows_is_refused(tmp_path):
    with refused("the shape of 'someone/unknown' is not known here"):
        read_shape("someone/unknown")
    with refused("the shape of"):
        read_shape(str(tmp_path))


SHAPE = Shape("toy", 2, 8, 4, 2, 4, 16, 100, 5000, 512, "test")
"""q and o: 8 x 16, k and v: 8 x 8, MLP: 3 matrices of 8 x 16; so 384 + 384 weights in each of two layers."""


def test_costs_are_what_one_counts_by_hand():
    machine = Machine("test", flops=1000.0, bandwidth=100.0, step=0.5)
    cell = StudyConfig.make(
        {
            "sources": ["synthetic-math"],
            "settings": {
                "dtype": "float32", "device": "cpu", "n_calibration": 3, "n_train": 5, "max_new_tokens": 16,
                "epochs": 2, "train_batch_size": 2, "generation_batch_size": 4, "lora_rank": 2, "engine": "twin",
                "lora_targets": ["q_proj", "v_proj"],
            },
        }
    ).cell("synthetic-math", 42)  # fmt: skip
    assert SHAPE.n_block_params == 2 * (384 + 384)
    costs = Costs(SHAPE, machine, cell)
    prompt, gold = costs.lengths("synthetic-math")

    extract = costs.extract("synthetic-math", cell)
    assert extract.tokens == 3 * (prompt + gold)
    assert extract.seconds == pytest.approx(4 * extract.tokens * 1536 / 1000)
    assert extract.memory["weights"] == 4 * 5000
    hooked = costs.extract("synthetic-math", cell.model_copy(update={"engine": "lens"}))
    assert hooked.memory["weights"] == 2 * 4 * 5000  # lens model and twin
    everywhere = costs.extract("synthetic-math", cell.model_copy(update={"layers": "all"}))
    assert everywhere.memory["activations"] == extract.memory["activations"]  # last_mid of two layers begins at 0
    last = costs.extract("synthetic-math", cell.model_copy(update={"layers": [1]}))
    assert last.memory["activations"] == everywhere.memory["activations"] / 2

    generate = costs.generate("synthetic-math", cell)
    assert generate.tokens == 5 * (prompt + 16)
    step = max(2 * 4 * (1536 + 800) / 1000, 4 * 5000 / 100) + 0.5 * 2
    assert generate.seconds == pytest.approx(2 * 16 * step + 2 * 5 * prompt * 1536 / 1000)
    assert generate.memory["KV cache"] == 2 * 2 * 2 * 4 * 4 * 4 * (prompt + 16)  # K and V, layers, heads, d_head, bytes

    finetune = costs.finetune("synthetic-math", cell)
    assert finetune.tokens == 2 * 5 * (prompt + 16)
    assert finetune.seconds == pytest.approx(6 * finetune.tokens * (1536 + 800) / 1000)  # a GPU keeps no activations
    assert finetune.memory["optimiser"] == 12 * 2 * 2 * ((8 + 16) + (8 + 8))
    on_cpu = Costs(SHAPE, TWO_CORES, cell).finetune("synthetic-math", cell)
    assert on_cpu.seconds == pytest.approx(4 * finetune.tokens * (1536 + 800) / TWO_CORES.flops)

    measure = costs.measure(10, (30, 5), n_policies=3)
    assert measure.tokens == 10 * 35 * 4
    assert measure.seconds == pytest.approx(2 * (measure.tokens * 1536 + 10 * 5 * 4 * 800) / 1000)


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
    assert plan.machine in ([A100] if name.startswith("paper") else [TWO_CORES, TWO_CORES_FLOAT32])
    assert plan.memory < 80e9
    text = plan.to_markdown()
    assert config.settings["model"] in text
    assert "| finetune |" in text and "memory in GB" in text and "KV cache" in text and "optimiser" in text
    assert "Assumed: " in text and "TFLOP/s" in text
    weights = next(row.cost.memory["weights"] for row in plan.rows if row.stage == "generate")
    if name.startswith("paper"):
        assert weights == 2 * PUBLISHED[config.settings["model"]]  # bfloat16


def test_measured_seconds_replace_the_assumption(study_of):
    config = study_of()
    assumed = make_plan(config, SHAPE, TWO_CORES)
    plan = make_plan(config, SHAPE, TWO_CORES, measured={"generate": {"seconds": 30.0, "work": 10.0}})
    for before, after in zip(assumed.rows, plan.rows, strict=True):
        assert after.measured == (after.stage == "generate")
        factor = 3 if after.measured else 1
        assert after.cost.seconds == pytest.approx(before.cost.seconds * factor)
    assert ", measured rate |" in plan.to_markdown()


def test_the_clock_says_what_it_knows_and_no_more():
    a, b, c = Unit("generate"), Unit("generate", seed=2), Unit("finetune")
    costs = {a: Cost(1, 2.0), b: Cost(1, 4.0), c: Cost(1, 10.0), Unit("extract"): Cost()}
    assert Clock(costs, {}).remaining([a, b, c]) == "time left unknown"
    half = {"generate": {"seconds": 300.0, "work": 2.0}}
    assert Clock(costs, half).remaining([b, c]) == "at least 10 min left (finetune not yet measured)"
    both = {**half, "finetune": {"seconds": 5.0, "work": 10.0}}
    assert Clock(costs, both).remaining([b, c]) == "about 10 min left"
    assert Clock(costs, both).remaining([c]) == "about 5 s left"
    assert Clock(costs, {}).remaining([Unit("extract")]) == "about 0 s left"  # nothing that costs anything is left


def test_numbers_for_readers():
    assert [duration(x) for x in (0, 59, 120, 3 * 3600, 5 * 86400)] == ["0 s", "59 s", "2 min", "3.0 h", "5.0 days"]
    assert rate({}) is None
    assert rate({"seconds": 0.0, "work": 1.0}) is None
    assert rate({"seconds": 3.0, "work": 2.0}) == 1.5
    total = Cost.total([Cost(1, 2.0, {"weights": 5.0}), Cost(3, 4.0, {"weights": 1.0, "logits": 9.0})])
    assert (total.tokens, total.seconds, total.memory) == (4, 6.0, {"weights": 1.0, "logits": 9.0})
    assert dataclasses.replace(total, seconds=1.0).tokens == 4


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
