"""`spd-lens spans`: from a task's name to its audit, in the terminal and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import cast, get_args

from rich.console import Console

from spd_lens.errors import SPDError
from spd_lens.examples import Example
from spd_lens.models import PromptFormat, load_tokenizer
from spd_lens.protocols import protocol
from spd_lens.runs import SPDConfig, allow_execution
from spd_lens.spans.core import audit
from spd_lens.spans.page import write_page
from spd_lens.spans.terminal import print_audit
from spd_lens.tasks import Split, Task

_DEFAULT_N = 20


def show_spans(
    config: SPDConfig, name: str, split: str, n: int | None, html: Path | None, show: int, console: Console,
    span: str | None = None,
) -> None:  # fmt: skip
    """Audit examples of the task `name`; print what was found, and write it to `html` if that is given. With `span`,
    something else decides correctness than the task's options say (`Task.spanned`)."""
    chosen = protocol(config.protocol)
    options = {**chosen.options(name), **config.task_options}
    source = chosen.task_for(name, config.data_dir, config.task_options, config.prompt_format).spanned(span)
    if span is not None:
        options["span"] = span
    allow_execution(config, [source])
    examples = _draw(source, split, n, config.data_seed)
    format = PromptFormat.choose(
        load_tokenizer(config.model), config.prompt_format, config.system, config.enable_thinking, config.prompt_date,
        add_special_tokens=config.add_special_tokens, span_rule=config.span_rule,
    )  # fmt: skip
    # table 6 of the paper is about answers
    found = audit(examples, format, config.loss, task="" if options.get("span") == "results" else source.name)
    title = f"Span audit: {Path(name).name}"
    plural = "example" if len(examples) == 1 else "examples"
    facts = [
        f"{len(examples)} {split} {plural}", f"seed {config.data_seed}", config.model, f"{format.name} format",
        *(f"{key}={value!r}" for key, value in format.settings.items() if key != "prompt_format" and value is not None),
        f"{config.loss} loss", *(f"{key}={value}" for key, value in options.items()),
    ]  # fmt: skip
    print_audit(console, found, title=f"{title} · {' · '.join(facts)}", show=show)
    if html is not None:
        console.print(f"written to {write_page(html, found, title=title, facts=facts)}", highlight=False, markup=False)


def _draw(source: Task, split: str, n: int | None, seed: int) -> list[Example]:
    if split not in get_args(Split):
        raise SPDError(f"there is no split {split!r}; choose one of {', '.join(get_args(Split))}")
    side = cast(Split, split)
    if n is None:
        n = min(_DEFAULT_N, len(source.pool(side))) or _DEFAULT_N  # an empty split is refused by the draw
    return source.kept(side, source.draw(side, n, seed))  # where programs have to be run first, it runs them
