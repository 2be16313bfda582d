"""A whole run, from calibration to scores, against the reference code's way on the same tokens (`reference_way`)."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import spd_lens as spd
from benchmarks import bounds, reference_way, subjects
from benchmarks.measure import Sample, in_turn, settle, timed
from benchmarks.reference_way import MAX_LENGTH, STAGES, Outcome, Work
from benchmarks.table import Row
from spd_lens.files import read_json
from spd_lens.models import resolve_dtype
from spd_lens.runs import Experiment

DTYPES = ("float32", "bfloat16")
GOALS = {"float32": 5.0, "bfloat16": 8.0}
BOUND_GOAL = 2.0
LAYERS = "last_mid_from_0"
"""Those of the reference protocol."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    n_calibration: int
    n_train: int
    n_eval: int
    new_tokens: int
    test_tokens: int
    rounds: int = 1


SIZES = {"smollm2": Sizes(8, 32, 8, 96, 64), "qwen2.5-0.5b-shape": Sizes(4, 16, 4, 64, 24)}
"""So that both sides together take about four minutes on two cores."""
QUICK = Sizes(4, 4, 2, 8, 4)


def rows(models: list[str], quick: bool) -> Iterator[Row]:
    """For each model and dtype: the whole run and each stage, both beside the bound, and whether both did the same."""
    for name in models:
        for dtype in DTYPES:
            yield from _model(name, dtype, QUICK if quick else SIZES[name])
            settle()


def _model(name: str, dtype: str, sizes: Sizes) -> Iterator[Row]:
    pair = without_end(subjects.subject(name, dtype).pair)
    config = config_of(sizes, dtype)
    work = work_of(pair, config)
    with tempfile.TemporaryDirectory() as folder:
        ways: dict[str, Callable[[int], Outcome]] = {
            "ours": partial(ours, pair, config, Path(folder)),
            "reference": lambda _: reference_way.run(pair, work),
        }
        samples = in_turn(ways, sizes.rounds, lambda: reference_way.run(pair, sliver(work)), settled=True)
        yield from _speeds(name, dtype, pair, work, samples)
        yield _beside(name, dtype, samples["ours"])
        yield _padded(name, dtype, pair, config, Path(folder) / "0", samples)
    own, peer = (samples[way][0].result for way in ("ours", "reference"))
    yield same_tokens(name, dtype, own, peer)
    yield same_losses(name, dtype, own, peer)


def without_end(pair: spd.ModelPair) -> spd.ModelPair:
    """The pair with prompts as the reference code writes them, and no token that ends a completion: all then have the
    same number of tokens, whatever a dtype's rounding makes of them."""
    tokenizer = copy.deepcopy(pair.tokenizer)
    tokenizer.pad_token_id = pair.pad_id
    tokenizer.eos_token = None
    pair.hf.generation_config.eos_token_id = None
    return spd.ModelPair(pair.hf, tokenizer, name=pair.name, prompt_format="verbatim")


def config_of(sizes: Sizes, dtype: str, **settings: Any) -> spd.SPDConfig:
    """The reference protocol, but for what `reference_way` says is different; `settings` go over it."""
    task = subjects.task()
    return spd.SPDConfig.make(
        {
            "protocol": "reference", "task": task.name, "data_dir": None if task.path is None else str(subjects.DATA),
            "task_options": {"max_new_tokens": sizes.test_tokens}, "engine": "twin", "dtype": dtype,
            "n_calibration": sizes.n_calibration, "n_train": sizes.n_train, "n_eval": sizes.n_eval,
            "max_new_tokens": sizes.new_tokens, "temperature": 0.0, "top_p": 1.0, "max_prompt_tokens": None,
            "epochs": 1, "early_stop": False, "retokenise": False, "loss_on_padding": False, "lora_dropout": 0.0,
            "n_compared": 1, "n_random": 0, **settings,
        }
    )  # fmt: skip


def work_of(pair: spd.ModelPair, config: spd.SPDConfig) -> Work:
    """The tokens that a run of these settings begins with."""
    with tempfile.TemporaryDirectory() as folder:
        experiment = Experiment(config, folder, progress=False)
        experiment.pair = pair
        (target,) = experiment.targets.values()
        items = target.test(config.n_test(config.task), config.data_seed)
        return Work(
            sites=pair.sites(LAYERS),
            calibration=[pair.encode(e, config.loss, "twin", config.max_calibration_tokens)
                         for e in experiment.calibration],
            prompts=[pair.prompt_ids(example) for example in experiment.prompts],
            items=[pair.prompt_ids(item) for item in items],
            new_tokens=config.max_new_tokens,
            test_tokens=target.max_new_tokens,
        )  # fmt: skip


def sliver(work: Work) -> Work:
    """One text of each kind, as a warm-up: what is imported and set up once is not the first side's alone."""
    first = {name: getattr(work, name)[:1] for name in ("calibration", "prompts", "items")}
    return replace(work, **first, new_tokens=2, test_tokens=2)


@dataclass
class Ours(Outcome):
    """The same, and what a run does beside."""

    beside: float = 0.0
    """Seconds of what the reference code does not have."""


def ours(pair: spd.ModelPair, config: spd.SPDConfig, folder: Path, n: int) -> Ours:
    """`spd_lens.run` in a new folder, the `n`-th, as `spd-lens run` calls it; the model is loaded already.

    What is left of its time beside the stages (checks, digests, the summary) is in the total and in no stage.
    """
    start = time.perf_counter()
    record = spd.run(config, folder / str(n), progress=False, pair=pair)
    total, stages = time.perf_counter() - start, record.notes["seconds"]
    beside = stages["compare"] + stages["effects"]
    seconds = {stage: stages[stage] for stage in STAGES}
    seconds["all"] = total - beside
    corpora = {
        policy: spd.Corpus.load(record.result_path(config.task, policy).with_suffix(".jsonl"))
        for policy in ("base", "spd")
    }
    return Ours(
        seconds=seconds,
        completions=_new_ids(record.corpus),
        losses=[entry["loss"] for entry in read_json(record.adapter / "training.json")["log"]],
        answers={policy: _new_ids(corpus) for policy, corpus in corpora.items()},
        beside=beside,
    )


def _new_ids(corpus: spd.Corpus) -> list[list[int]]:
    return [list(record.completion_ids) for record in corpus]


def _speeds(name: str, dtype: str, pair: spd.ModelPair, work: Work, samples: dict[str, list[Sample]]) -> Iterator[Row]:
    """All of it, then stage by stage. Bounds are measured in between, so that they are of the same machine."""
    ideal = ideal_seconds(pair, work)
    native = dtype == "float32" or resolve_dtype("auto", pair.device) == pair.dtype
    notes = {
        "all": "checks and files included",
        "extract": f"{len(work.calibration)} texts, {sum(len(encoded.ids) for encoded in work.calibration)} tokens",
        "generate": f"{len(work.prompts)} prompts × {work.new_tokens} tokens",
        "finetune": f"{len(work.prompts)} texts, one epoch",
        "evaluate": f"{len(work.items)} items × {work.test_tokens} tokens, two policies",
    }
    for stage, note in notes.items():
        own, peer = ([sample.result.seconds[stage] for sample in samples[way]] for way in ("ours", "reference"))
        is_all = stage == "all"
        yield _row(
            name, dtype, "a whole run" if is_all else stage, [b / a for a, b in zip(own, peer, strict=True)],
            target=GOALS[dtype] if is_all and native else None,
            bound=f"{statistics.median(peer) / ideal[stage]:.2f} (matrix products alone)",
            ours=f"{statistics.median(own):.1f} s", peer=f"{statistics.median(peer):.1f} s", note=note,
        )  # fmt: skip
        yield _row(
            name, dtype, f"{'a whole run' if is_all else stage}: time over that of its matrix products alone",
            [a / ideal[stage] for a in own], target=BOUND_GOAL if is_all else None, at_least=False,
            ours=f"{statistics.median(own):.1f} s", peer=f"{ideal[stage]:.1f} s",
        )  # fmt: skip


def ideal_seconds(pair: spd.ModelPair, work: Work) -> dict[str, float]:
    """The matrix products of each stage alone: real tokens, as many completions at a time as there are."""

    def completed(prompts: Sequence[list[int]], n_new: int) -> float:
        return bounds.generation_seconds(pair, len(prompts), sum(map(len, prompts)), n_new)

    lengths = [len(encoded.ids) for encoded in work.calibration]
    found = {
        "extract": bounds.extraction_seconds(pair, lengths, LAYERS),
        "generate": completed(work.prompts, work.new_tokens),
        "finetune": bounds.training_seconds(pair, n_trained(work)),
        "evaluate": 2 * completed(work.items, work.test_tokens),
    }
    return {**found, "all": sum(found.values())}


def n_trained(work: Work) -> int:
    """Tokens that training reads, padding not counted."""
    return sum(min(MAX_LENGTH, len(ids) + work.new_tokens) for ids in work.prompts)


def _beside(name: str, dtype: str, samples: list[Sample]) -> Row:
    each = [sample.result.beside / (sample.result.beside + sample.result.seconds["all"]) for sample in samples]
    return _row(
        name, dtype, "what the reference code does not have: its share of a run", each, unit="of the time",
        ours=f"{statistics.median(sample.result.beside for sample in samples):.1f} s",
        note="losses and KL on held-out solutions and other texts, a prompt without the projection",
    )  # fmt: skip


def _padded(
    name: str, dtype: str, pair: spd.ModelPair, config: spd.SPDConfig, run: Path, samples: dict[str, list[Sample]]
) -> Row:
    """The training once more with the reference code's loss, for which the padding has to be computed."""
    settings = config.training.model_copy(update={"loss_on_padding": True, "max_length": MAX_LENGTH})
    corpus = spd.Corpus.load(run / "corpus.jsonl")
    sample = timed(lambda: spd.finetune(pair, corpus, settings=settings, out=run / "padded", progress=False))
    peer = samples["reference"][-1].result.seconds["finetune"]
    return _row(
        name, dtype, "finetune, with the loss on padding that the reference code has", [peer / sample.seconds],
        ours=f"{sample.seconds:.1f} s", peer=f"{peer:.1f} s",
    )  # fmt: skip


def same_tokens(name: str, dtype: str, own: Outcome, peer: Outcome) -> Row:
    """The share of completions and answers with the very tokens of the reference way."""
    pairs = list(zip(own.generated, peer.generated, strict=True))
    if any(len(a) != len(b) for a, b in pairs):
        raise RuntimeError("the two sides did not generate equally many tokens, so that their times do not compare")
    share = sum(a == b for a, b in pairs) / len(pairs)
    return _row(
        name, dtype, "same greedy tokens as the reference way", [share], unit="of completions",
        target=1.0 if dtype == "float32" else None, ours=f"{sum(len(a) for a, _ in pairs)} tokens",
        peer=f"{sum(len(b) for _, b in pairs)} tokens",
    )  # fmt: skip


def same_losses(name: str, dtype: str, own: Outcome, peer: Outcome) -> Row:
    """The largest relative difference of a training step's loss."""
    each = [abs(a - b) / b for a, b in zip(own.losses, peer.losses, strict=True)]
    return Row(
        "run", name, dtype, "loss of a step: largest relative difference from the reference way's",
        max(each), min(each), max(each), 1e-4 if dtype == "float32" else None, at_least=False, unit="",
    )  # fmt: skip


def _row(name: str, dtype: str, what: str, each: Sequence[float], **options: Any) -> Row:
    return Row.of("run", name, dtype, what, each, **options)
