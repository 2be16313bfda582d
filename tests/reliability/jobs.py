"""The five commands that go on where they were stopped, each as a job of a second on a tiny model, and results."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import spd_lens as spd
from spd_lens.runs import StopRule, run_rounds
from spd_lens.study import StudyConfig, run_study
from tests.conftest import build_llama, build_tokenizer

_TIMES = re.compile(r"^## Time\n.*|^- Time:[^\n]*|<li>Time:[^<]*", re.MULTILINE | re.DOTALL)
_DIFFER = ("seconds", "measured", "sha256", "sum")
"""Keys of seconds, and of digests of what holds them or depends on the order of lines."""
_PROMPTS = ("Tom has 12 apples.", "7 * 3", "def add(a, b):", "Which planet is the largest?")
_SETTINGS = {
    "dtype": "float32", "device": "cpu", "engine": "twin", "n_calibration": 4, "n_train": 4, "n_eval": 4,
    "max_new_tokens": 4, "generation_batch_size": 2, "train_batch_size": 2, "epochs": 1, "lr": 0.01,
}  # fmt: skip
_RUN = {
    **_SETTINGS, "task": "synthetic-math", "task_options": {"max_new_tokens": 4}, "n_compared": 2, "n_random": 0,
    "policies": ["spd"],
}  # fmt: skip
_STUDY = {
    "methods": ["base", "psr", "spd"], "sources": ["synthetic-math"], "targets": ["synthetic-math"], "seeds": [1],
    "n_forced": 4, "n_side_effects": 2, "task_options": {"synthetic-math": {"max_new_tokens": 4}},
}  # fmt: skip


def _run(pair: spd.ModelPair, place: Path) -> None:
    spd.run(spd.SPDConfig.make({**_RUN, "model": pair.name}), place / "run", progress=False, pair=pair)


def _rounds(pair: spd.ModelPair, place: Path) -> None:
    config = spd.SPDConfig.make({**_RUN, "model": pair.name})
    rule = StopRule(on_rising_loss=False, kl_budget=None)
    run_rounds(config, place / "rounds", 1, stop=rule, n_held_out=4, progress=False, pair=pair)


def _study(pair: spd.ModelPair, place: Path) -> None:
    config = StudyConfig.make({**_STUDY, "settings": {**_SETTINGS, "model": pair.name}})
    run_study(config, place / "study", pair=pair)


def _generate(pair: spd.ModelPair, place: Path) -> None:
    spd.generate(pair, _PROMPTS, path=place / "new" / "corpus.jsonl", max_new_tokens=4, batch_size=1, progress=False)


def _finetune(pair: spd.ModelPair, place: Path) -> None:
    corpus = spd.generate(pair, _PROMPTS, max_new_tokens=4, progress=False)
    spd.finetune(
        pair, corpus, out=place / "adapter", progress=False, save_steps=1, epochs=2, batch_size=4, lr=0.01,
        early_stop=True,
    )  # fmt: skip


JOBS: dict[str, Callable[[spd.ModelPair, Path], None]] = {
    "run": _run, "study": _study, "rounds": _rounds, "generate": _generate, "finetune": _finetune,
}  # fmt: skip
"""Each command's job: it works below the given directory, and goes on from what it finds there."""


def save_model(directory: Path) -> None:
    """Write the tests' random Llama, with its tokenizer."""
    tokenizer = build_tokenizer(chat=False)
    build_llama(tokenizer).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def results(place: Path) -> dict[str, str | bytes]:
    """Every file and folder below a directory with its content, but for locks and for what tells the time."""
    found: dict[str, str | bytes] = {}
    for path in sorted(place.rglob("*")):
        name = path.relative_to(place).as_posix()
        if path.is_dir():
            found[f"{name}/"] = ""
        elif path.suffix == ".safetensors":
            found[name] = path.read_bytes()
        elif path.suffix == ".json":
            found[name] = _timeless(path.read_text(encoding="utf-8"))
        elif path.name != "lock" and path.suffix != ".lock":
            text = path.read_text(encoding="utf-8")
            lines = text.splitlines() if path.suffix == ".jsonl" else []
            found[name] = "\n".join(sorted(map(_timeless, lines))) if lines else _TIMES.sub("", text)
    return found


def _timeless(text: str) -> str:
    """JSON without what differs between two undisturbed jobs."""

    def without(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = {key: value for key, value in pairs if key not in _DIFFER}
        if isinstance(summary := found.get("summary.md"), dict):
            summary.pop("size", None)  # its table of times is as long as the times are
        return found

    return json.dumps(json.loads(text, object_pairs_hook=without))


def ends(job: str, pair: spd.ModelPair, place: Path, undisturbed: Mapping[str, str | bytes]) -> str:
    """Start a job again after something went wrong, and say how that ended.

    Returns:
        `"same"`: with the results of an undisturbed job, and nothing beside them; `"refused"` with the sentence; or
        `"lost"` with what is wrong.
    """
    try:
        JOBS[job](pair, place)
    except spd.SPDError as error:
        return f"refused: {error}"
    except Exception as error:  # a traceback, on the command line
        return f"lost: {error!r}"
    found = results(place)
    wrong = [name for name in {**found, **undisturbed} if found.get(name) != undisturbed.get(name)]
    return f"lost: {', '.join(wrong)} differ" if wrong else "same"
