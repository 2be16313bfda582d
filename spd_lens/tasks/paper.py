"""`PaperTask`: a benchmark of the paper, with the prompts, the order and the scores of the reference code as options.

The reference code is github.com/gh540-svg/hahaha, commit e249fec. `docs/tasks.md` has its texts, and says how they are
read where that code leaves it open.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from spd_lens.errors import SPDError, whole
from spd_lens.examples import Example
from spd_lens.tasks.base import Pools, PublishedTask, Split, TwoScorings, check_count, without_repeats


@dataclass(kw_only=True)
class PaperTask(TwoScorings, PublishedTask):
    """One of the paper's six benchmarks. Each decides what the reference template and the order of files are for it."""

    prompt_template: Literal["instruct", "reference"] = "instruct"
    """`instruct`: prompts that say what form the answer must have; `reference`: the reference code's bare texts, whose
    completions begin with a space and follow the prompt with nothing between (the prompt format `verbatim`)."""
    order: Literal["seeded", "file"] = "seeded"
    """`seeded`: a seed decides what is drawn; `file`: the first n as the reference code takes them, whatever the seed.
    In file order no repeated problem is left out."""
    repeats_kept: int = field(default=0, init=False)
    """Training examples in file order that repeat another one or a test problem."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_option("prompt_template", ("instruct", "reference"))
        self.check_option("order", ("seeded", "file"))
        for option in fields(self):
            value = getattr(self, option.name, None)
            fixed = option.name in ("span", "asserts_in_prompt") and value not in ("results", "answer-only")
            if self.bare and fixed and value != option.default:
                raise SPDError(
                    f"{self.name}'s {option.name} {value!r} goes with the prompt template 'instruct' only; leave "
                    f"{option.name} away, as the template 'reference' has spans of its own"
                )

    @property
    def bare(self) -> bool:
        """Whether the texts are those of the reference code."""
        return self.prompt_template == "reference"

    @property
    def asks_form(self) -> bool:
        return not self.bare

    def draw(self, split: Split, n: int | None, seed: int) -> list[Example]:
        if self.order == "seeded":
            return super().draw(split, n, seed)
        pool = self.pool(split)
        whole("seed", seed, least=None)  # it decides nothing here; nonsense is refused all the same
        return pool[: check_count(self.name, split, n, len(pool))]

    def apart(self, pools: Pools) -> Pools:
        if self.order == "seeded":
            return super().apart(pools)
        held_out = {self.problem(example) for example in pools.test}
        self.repeats_kept = len(pools.train) - len(without_repeats(pools.train, held_out, self.problem))
        return pools

    def card(self) -> dict[str, Any]:
        """The data set card; in file order it counts the repeats that were kept."""
        card = super().card()
        return card if self.order == "seeded" else {**card, "repeats_kept": self.repeats_kept}


def bare_example(id: str, prompt: str, text: str, meta: Mapping[str, object], *, begin: int = 0) -> Example:
    """An example of the reference template: the published text after one space. Its span goes from the character
    `begin` of the completion, where 0 is the space, to the end."""
    completion = f" {text}"
    return Example(prompt, completion, ((begin, len(completion)),), id, meta)
