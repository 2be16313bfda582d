"""Write the table of docs/protocols.md from the presets: `python scripts/protocol_table.py`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from spd_lens.protocols import POINTS, PROTOCOLS, Protocol
from spd_lens.runs import SPDConfig
from spd_lens.study import StudyConfig

DOCUMENT = Path(__file__).parents[1] / "docs" / "protocols.md"
_TASKS = ("gsm8k", "svamp", "mbpp", "codealpaca", "mmlu", "bbh")
_OPTIONS = {"prompt_template", "train_source", "order", "scoring", "subtasks"}


def table() -> str:
    """The protocols side by side: each point's settings, what is to be known beside them, and the source."""
    lines = ["| | " + " | ".join(f"`{name}`" for name in PROTOCOLS) + " |", "| --- " * (len(PROTOCOLS) + 1) + "|"]
    for point, names in POINTS.items():
        cells = [cell(chosen, point, names) for chosen in PROTOCOLS.values()]
        lines.append(f"| {point} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(chosen: Protocol, point: str, names: tuple[str, ...]) -> str:
    """The values of one point under one protocol."""
    if chosen.name == "apple-ssd":  # which changes little: what it leaves is said once
        rest = [name for name in names if name not in (*chosen.settings, "methods")]
        names = tuple(name for name in names if name not in rest)
        values = ["as `paper`" if not names else "the rest as `paper`"] if rest else []
    else:
        values = []
    values = [f"`{name}` {shown}" for name in names if (shown := value(chosen, name))] + values
    source = chosen.sources[point]
    return "; ".join(part for part in (", ".join(values), source.value) if part) + f" *[{source.where}]*"


def value(chosen: Protocol, name: str) -> str:
    """A setting, an option of tasks or a size under a protocol, in words; nothing for an option that it leaves."""
    if name == "methods":
        return ", ".join(chosen.methods or StudyConfig.model_fields["methods"].default)
    if name in ("n_train", "n_eval", "n_calibration") and chosen.sizes:
        by_task = {task: size[name] for task, size in chosen.sizes.items() if name in size}
        return _by_task(by_task)
    if name == "test tokens":
        options = {task: chosen.task_options.get(task, {}).get("max_new_tokens") for task in _TASKS}
        return _by_task({task: n for task, n in options.items() if n is not None})
    if name in _OPTIONS:
        by_task = {task: options[name] for task in _TASKS if name in (options := chosen.options(task))}
        return _by_task(by_task)
    return text(getattr(SPDConfig.make({"protocol": chosen.name}), name))


def _by_task(values: dict[str, Any]) -> str:
    one = {text(found) for found in values.values()}
    if len(one) == 1 and len(values) > 1:
        return one.pop()
    return ", ".join(f"{text(found)} ({task})" for task, found in values.items())


def text(found: Any) -> str:
    """A value as a reader writes it."""
    if found is None or isinstance(found, bool):
        return {None: "not set", True: "on", False: "off"}[found]
    if isinstance(found, list):
        return ", ".join(map(str, found))
    return f"{found:g}" if isinstance(found, float) else str(found)


def written(document: str) -> str:
    """The document with the table that the presets make."""
    return re.sub(
        r"(<!-- begin table -->\n).*?(\n<!-- end table -->)",
        lambda found: found[1] + table() + found[2], document, flags=re.DOTALL,
    )  # fmt: skip


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
