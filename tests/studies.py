"""Studies with planted effects, in the form in which the engine leaves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

Effects = Mapping[tuple[str, str], float]
"""`(method, measure)` → mean change from base."""

LEVELS = {
    "aligned loss": 1.0, "copied-answer loss": 0.3, "results loss": 1.5, "completion loss": 0.8, "token accuracy": 0.6,
    "tokens": 80.0,
}  # fmt: skip
BINARY = {"accuracy": 0.4, "format": 0.9, "finished": 0.8}


def planted(
    effects: Effects | None = None,
    *,
    methods: Sequence[str] = ("base", "psr", "ssd", "spd", "spd-random"),
    sources: Sequence[str] = ("synthetic-math",),
    targets: Sequence[str] = ("synthetic-math", "svamp"),
    seeds: Sequence[int] = (1, 2, 3),
    n_items: int = 32,
    phases: Sequence[str] = ("trained",),
    side_effects: Sequence[str] = (),
    measures: Sequence[str] = ("aligned loss", "KL from base", "accuracy"),
    noise: float = 0.1,
    seed_noise: float = 0.0,
    seed: int = 0,
) -> pd.DataFrame:
    """Rows of `results.csv`: item levels that all methods share, item noise of each, and what was planted."""
    rng = np.random.default_rng(seed)
    rows: list[tuple[Any, ...]] = []
    places = [("target", t, tuple(measures)) for t in targets]
    places += [("side effect", t, ("completion loss", "KL from base")) for t in side_effects]
    for role, target, wanted in places:
        items = [f"{target}-{i}" for i in range(n_items)]
        for measure in wanted:
            if measure in BINARY:
                level = (rng.random(n_items) < BINARY[measure]).astype(float)
            elif measure == "KL from base":
                level = np.full(n_items, 0.1)
            else:
                level = LEVELS[measure] + rng.normal(0, 0.3, n_items)
            if measure != "KL from base":
                rows += [("", target, role, "base", "", "", i, measure, v) for i, v in zip(items, level, strict=True)]
            for source in sources:
                for method in methods:
                    for phase in phases:
                        if method == "base" or (phase == "projected" and not method.startswith("spd")):
                            continue
                        rows += _method(
                            rng, (source, target, role, method, phase), seeds, items, measure, level,
                            dict(effects or {}).get((method, measure), 0.0), noise, seed_noise,
                        )  # fmt: skip
    names = ["source", "target", "role", "method", "phase", "seed", "item", "measure", "value"]
    return pd.DataFrame(rows, columns=names)


def _method(
    rng: np.random.Generator,
    place: tuple[str, ...],
    seeds: Sequence[int],
    items: Sequence[str],
    measure: str,
    level: np.ndarray,
    effect: float,
    noise: float,
    seed_noise: float,
) -> list[tuple[Any, ...]]:
    own = rng.normal(0, noise, len(items))
    found: list[tuple[Any, ...]] = []
    for seed in seeds:
        if measure in BINARY:
            flip = rng.random(len(items)) < 0.1
            values = np.where(flip, rng.random(len(items)) < BINARY[measure] + effect, level)
        else:
            values = level + effect + own + rng.normal(0, noise / 2, len(items)) + rng.normal(0, seed_noise)
        if measure == "KL from base":
            values = np.abs(values)
        found += [(*place, seed, item, measure, float(v)) for item, v in zip(items, values, strict=True)]
    return found


def write_study(folder: Path, results: pd.DataFrame, **plan: Any) -> Path:
    """A study's folder: results, settings as planned, corpora."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = results[results.method != "base"]
    settings = {
        "methods": list(dict.fromkeys(results.method)),
        "sources": list(dict.fromkeys(trained.source)),
        "targets": list(dict.fromkeys(results[results.role == "target"].target)),
        "seeds": sorted({int(s) for s in trained.seed}),
        "settings": {"n_train": 64, "n_calibration": 32, "n_eval": 32},
    }
    (folder / "study.yaml").write_text(yaml.safe_dump({**settings, **plan}), encoding="utf-8")
    results.to_csv(folder / "results.csv", index=False)
    corpora = [
        {"source": s, "method": m, "seed": k, "mean_tokens": 80 + k, "duplicates": 0.0}
        for s, m, k in trained[["source", "method", "seed"]].drop_duplicates().itertuples(index=False)
    ]
    pd.DataFrame(corpora).to_csv(folder / "corpora.csv", index=False)
    return folder
