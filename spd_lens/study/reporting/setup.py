"""What differs between a study's set-up and the paper's, setting by setting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spd_lens.protocols import protocol
from spd_lens.runs import SPDConfig, protocol_in_words
from spd_lens.study.reporting.evidence import Evidence
from spd_lens.tasks import PRESETS

BACKBONES = (
    "Qwen2.5-0.5B-Instruct", "Qwen2.5-7B-Instruct", "Qwen2.5-14B-Instruct", "Qwen3-4B-Instruct",
    "Llama-3.1-8B-Instruct",
)  # fmt: skip
"""The paper's models, in the order of its table 1."""
_PAPER = {
    "layers": "last_mid", "kinds": ["k", "v"], "rank": 0.5, "loss": "aligned", "strength": 1.0, "center": False,
    "method": "lora", "epochs": 5, "lr": 1e-5, "weight_decay": 0.01, "lora_rank": 8, "lora_alpha": 8,
    "lora_dropout": 0.05, "lora_targets": ["q_proj", "k_proj", "v_proj", "o_proj"], "loss_on": "all",
    "center_gradients": False,
}  # fmt: skip
"""The paper's tables 7-8 and section A.3, as settings."""
_SILENT = (
    "prompt_format", "per_head", "temperature", "top_p", "top_k", "max_new_tokens", "train_batch_size", "dtype",
)  # fmt: skip
"""Settings that the paper does not state."""
_SILENT_AND_RARE = (
    "system", "enable_thinking", "prompt_date", "too_long", "add_special_tokens", "span_rule", "max_calibration_tokens",
    "energy", "max_prompt_tokens", "warmup_epochs", "early_stop", "retokenise", "max_length", "loss_on_padding",
)  # fmt: skip
"""Settings that the paper does not state either, listed only where a study sets them."""
_OPTIONS = {"prompt_template": "instruct", "order": "seeded", "scoring": "final"}
"""Options of the paper's tasks of which it states nothing, with their defaults."""


def backbone(model: str) -> str | None:
    """The paper's backbone that a model's name means, whoever publishes it; None for any other model."""
    name = model.rstrip("/").rpartition("/")[2].lower()
    return next((known for known in BACKBONES if name.startswith(known.lower())), None)


def protocol_of(evidence: Evidence) -> str:
    """The study's protocol, and what its settings have in place of it; nothing for the default protocol."""
    settings = evidence.plan.get("settings") or {}
    own = (evidence.plan.get("source_settings") or {}).get(evidence.sources[0], {}) if evidence.sources else {}
    tasks: dict[str, Any] = {}
    if evidence.sources:
        tasks = {"task": evidence.sources[0], "eval_tasks": list(evidence.targets)}
        tasks["task_options"] = (evidence.plan.get("task_options") or {}).get(evidence.sources[0], {})
    return protocol_in_words(SPDConfig.make({**settings, **own, **tasks}))


def differences_from_paper(evidence: Evidence) -> list[tuple[str, str, str]]:
    """`(setting, paper, this study)` for all that differs, and for what the paper leaves open (`not stated`)."""
    defaults = SPDConfig.make({}).model_dump(mode="json")
    settings = {**defaults, **(evidence.plan.get("settings") or {})}
    by_source = evidence.plan.get("source_settings") or {}
    model = str(settings["model"])
    rows = [] if backbone(model) else [("model", "five models of 0.5B to 14B", model)]
    for source in evidence.sources:
        own = {**settings, **by_source.get(source, {})}
        known = PRESETS["paper"].get(source)
        if known is None or not known["n_train"]:
            rows.append(("source task", "gsm8k, mbpp or mmlu", source))
        else:
            rows += [
                (f"{name} of {source}", str(known[name]), str(own[name]))
                for name in ("n_train", "n_calibration")
                if own[name] != known[name]
            ]
    for target in evidence.targets:
        known = PRESETS["paper"].get(target)
        n_eval = settings["n_eval"]
        n = n_eval.get(target, "?") if isinstance(n_eval, Mapping) else n_eval
        if known is None:
            rows.append(("target task", "not in the paper", target))
        elif n != known["n_test"]:
            rows.append((f"test items of {target}", str(known["n_test"]), str(n)))
    seeds = evidence.seeds
    if len(seeds) != 1:
        rows.append(("seeds", "1 (42)", f"{len(seeds)} ({', '.join(seeds)})"))
    rows += [(name, _text(value), _text(settings[name])) for name, value in _PAPER.items() if settings[name] != value]
    resolved = {**settings, **_resolved(evidence.facts)}
    silent = [*_SILENT, *(name for name in _SILENT_AND_RARE if settings[name] != defaults[name])]
    rows += [(name, "not stated", _text(resolved[name])) for name in silent]
    return rows + _options(evidence)


def _options(evidence: Evidence) -> list[tuple[str, str, str]]:
    """Texts, order and scores of the tasks that are not as this project has them, each with the tasks it is set for."""
    plan = evidence.plan
    chosen = protocol((plan.get("settings") or {}).get("protocol") or "paper")
    found: dict[tuple[str, str], list[str]] = {}
    for task in dict.fromkeys([*evidence.sources, *map(str, plan.get("targets") or evidence.targets)]):
        own = {**chosen.options(task), **((plan.get("task_options") or {}).get(task) or {})}
        for name in (name for name, default in _OPTIONS.items() if own.get(name, default) != default):
            found.setdefault((name, own[name]), []).append(task)
    return [(name, "not stated", f"{value} ({', '.join(tasks)})") for (name, value), tasks in found.items()]


def _resolved(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What was decided when the study ran, where its settings say only `auto` or nothing."""
    resolved = facts.get("resolved") or {}
    sampling = resolved.get("sampling") or {}
    limits = {name: "none" if value is None else value for name, value in sampling.items()}
    found = {**resolved, **limits, "prompt_format": resolved.get("format")}
    return {name: found[name] for name in _SILENT if found.get(name) is not None}


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "the model's own", True: "yes", False: "no"}[value]
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
