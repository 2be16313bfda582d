"""What is in a corpus: lengths, repeats, degeneration and what stands outside of the task's text, with intervals."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import fmean, median, quantiles, stdev
from typing import Any

import numpy as np
import pandas as pd

from spd_lens.errors import SPDError
from spd_lens.generation import Corpus, Record
from spd_lens.stats import MIN_BOOTSTRAP, Estimate, bootstrap_ends, mean_interval, score_interval
from spd_lens.tasks import Task

GROUP = 10
"""Prompts whose completions are pooled for one value of distinct-n, which falls with the size of the pool."""
SAID = 3
"""How often in a row a completion must end on the same words to count as a loop (Holtzman et al. 2020)."""
SHORT = 3
"""Completions of fewer tokens are counted as short: at most a word and the end."""

_CLOSING = " \t\n`*_)]}$.\"'"
"""Characters that may stand alone behind an answer and belong to it: a fence, a bracket, emphasis."""


def corpus_diagnostics(
    corpus: Corpus | Sequence[Record], tokenizer: Any = None, task: Task | None = None
) -> pd.DataFrame:
    """One row per measure: `measure, value, low, high, n, unit, interval`.

    `n` counts prompts, which are what intervals rest on: several samples of one prompt are averaged first. `low` and
    `high` are missing where the data allow no interval, or where the value describes this corpus and nothing else.

    | measure | what it is |
    | --- | --- |
    | `completions`, `prompts` | how many |
    | `length`, `length sd`, `length median` | tokens of a completion, EOS included |
    | `shortest`, `length 10 %`, `length 90 %`, `longest` | the same, of this corpus |
    | `short` | share of completions of fewer than 3 tokens |
    | `truncated` | share cut at the token limit |
    | `empty` | share of completions without any visible character |
    | `duplicates` | share of completions whose text an earlier one of the corpus has, word for word |
    | `duplicates within prompts` | share of a prompt's further samples that repeat an earlier one of them |
    | `repeated 4-grams` | `1 - distinct / all` 4-grams of tokens in a completion (seq-rep-4, Welleck et al. 2020) |
    | `longest loop` | tokens of the longest stretch that only repeats what stands directly before it |
    | `loops` | share of completions that end on the same two or more tokens said three times or more (Holtzman 2020) |
    | `distinct-1`, `distinct-2` | distinct n-grams over all (Li et al. 2016), in pools of ten prompts |
    | `answered` | share from which the task extracts an answer |
    | `in the asked form` | share that gives it in the form that the prompt asks for (`Task.in_asked_form`) |
    | `after the answer` | share of tokens behind the settled answer (`share_after_answer`), of completions with one |

    Args:
        corpus: From `generate`, or records read with `Corpus.load`.
        tokenizer: A tokenizer or a `ModelPair`, to count tokens behind the answer; None counts characters there.
        task: The task whose answers are extracted; None leaves out the last three measures.

    Raises:
        SPDError: an empty corpus.
    """
    table = _Measures(_by_prompt(corpus))
    _lengths(table)
    _repetition(table)
    if task is not None:
        _answers(table, task, _decoder(tokenizer))
    return pd.DataFrame(table.rows)


def degeneration(corpus: Corpus | Sequence[Record]) -> list[str]:
    """What is so common in a corpus that it should not be trained on, a sentence for each; of a large one a sample.

    That is: more than a tenth of completions without a visible character, or more than half that end in a loop, were
    cut at the token limit, or say the same at some length (short answers may well be the same).
    """
    some = corpus[:: max(1, len(corpus) // _SAMPLED)]
    n, found = len(some), []
    for measure, (most, says) in _DEGENERATE.items():
        _, of = OF_COMPLETIONS[measure]
        if (share := sum(map(of, some)) / max(n, 1)) > most:
            found.append(f"{share:.0%} of {n} completions {says}")
    said = Counter(record.completion for record in some if record.n_completion_tokens > _LONG)
    if said and (share := max(said.values()) / n) > 0.5:
        found.append(f"{share:.0%} of {n} completions are the same text")
    return found


_SAMPLED, _LONG = 512, 8
_DEGENERATE = {
    "empty": (0.1, "are empty"), "loops": (0.5, "end in a loop"), "truncated": (0.5, "were cut at the token limit"),
}  # fmt: skip
"""The largest share that a corpus may have of what `OF_COMPLETIONS` measures, and what is said of more."""


class _Measures:
    """The rows of `corpus_diagnostics`."""

    def __init__(self, prompts: Sequence[Sequence[Record]]) -> None:
        self.prompts = prompts
        self.records = [record for samples in prompts for record in samples]
        self.rows: list[dict[str, Any]] = []

    def add(self, measure: str, unit: str, estimate: Estimate) -> None:
        self.rows.append({"measure": measure, **estimate.to_row(), "unit": unit, "interval": estimate.method})

    def fact(self, measure: str, unit: str, value: float) -> None:
        """What describes this corpus and nothing else."""
        self.add(measure, unit, Estimate(value, -np.inf, np.inf, len(self.prompts), "of this corpus"))

    def mean(
        self,
        measure: str,
        unit: str,
        of: Callable[[Record], float],
        prompts: Sequence[Sequence[Record]] | None = None,
    ) -> None:
        """A mean over prompts, each of them the mean over its samples."""
        values = [fmean(of(record) for record in samples) for samples in prompts or self.prompts]
        interval = score_interval if unit == "share" else mean_interval
        self.add(measure, unit, interval(values))

    def known(self, *measures: str) -> None:
        for measure in measures:
            self.mean(measure, *OF_COMPLETIONS[measure])

    def bootstrapped(self, measure: str, unit: str, statistic: Callable[[Sequence[float]], float]) -> None:
        """A statistic of all lengths; its bootstrap draws prompts with all of their samples."""
        lengths = [[float(record.n_completion_tokens) for record in samples] for samples in self.prompts]
        value, n = statistic([x for own in lengths for x in own]), len(lengths)
        low, high, how = -np.inf, np.inf, f"fewer than {MIN_BOOTSTRAP} prompts, no interval"
        if n >= MIN_BOOTSTRAP:
            low, high = bootstrap_ends(
                [np.arange(n)], lambda drawn: statistic([x for i in drawn for x in lengths[i]]),
                n_resamples=999, vectorized=False,
            )  # fmt: skip
            how = "percentile bootstrap 95% over prompts"
        self.add(measure, unit, Estimate(value, low, high, n, how))


def _lengths(table: _Measures) -> None:
    lengths = [float(record.n_completion_tokens) for record in table.records]
    table.fact("completions", "count", len(table.records))
    table.fact("prompts", "count", len(table.prompts))
    table.known("length")
    table.bootstrapped("length sd", "tokens", lambda drawn: stdev(drawn) if len(drawn) > 1 else 0.0)
    table.bootstrapped("length median", "tokens", median)
    tenths = quantiles(lengths, n=10, method="inclusive") if len(lengths) > 1 else lengths * 9
    table.fact("shortest", "tokens", min(lengths))
    table.fact("length 10 %", "tokens", tenths[0])
    table.fact("length 90 %", "tokens", tenths[-1])
    table.fact("longest", "tokens", max(lengths))
    table.known("short", "truncated", "empty")


def _repetition(table: _Measures) -> None:
    firsts = {record.completion: record.key for record in reversed(table.records)}
    table.mean("duplicates", "share", lambda record: float(firsts[record.completion] != record.key))
    several = [samples for samples in table.prompts if len(samples) > 1]
    if several:
        shares = [1 - (len({r.completion for r in samples}) - 1) / (len(samples) - 1) for samples in several]
        table.add("duplicates within prompts", "share", score_interval(shares))
    table.known("repeated 4-grams", "longest loop", "loops")
    for n in (1, 2):
        table.add(f"distinct-{n}", "share", _distinct(table.prompts, n))


def _answers(table: _Measures, task: Task, decode: Callable[[Sequence[int]], str] | None) -> None:
    answered = {record.key: task.extract(record.completion) is not None for record in table.records}
    table.mean("answered", "share", lambda record: float(answered[record.key]))
    table.mean("in the asked form", "share", lambda record: float(task.in_asked_form(record.completion)))
    kept = [[record for record in samples if answered[record.key]] for samples in table.prompts]
    with_answer = [samples for samples in kept if samples]
    if with_answer:
        share = partial(share_after_answer, task=task, decode=decode)
        table.mean("after the answer", "share", share, with_answer)


def repeated_ngrams(ids: Sequence[int], n: int = 4) -> float:
    """`1 - distinct / all` n-grams of one text (seq-rep-n, Welleck et al. 2020); 0 where there is none."""
    grams = _ngrams(ids, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def longest_loop(ids: Sequence[int]) -> int:
    """Tokens of the longest stretch that only says again what stands directly before it, at any period.

    `a b c a b c a b c` has one of 6: the first `a b c` is new, the rest repeats it. A stretch shorter than its period
    is no repeat.
    """
    tokens, best = np.asarray(ids), 0
    for period in range(1, len(tokens) // 2 + 1):
        same = np.flatnonzero(np.concatenate(([True], tokens[period:] != tokens[:-period], [True])))
        run = int(np.diff(same).max()) - 1
        if run >= period:
            best = max(best, run)
    return best


def ends_in_loop(ids: Sequence[int]) -> bool:
    """Whether a text ends on two or more tokens that occur three times or more in a row (Holtzman et al. 2020).

    The last repetition may be cut off in the middle.
    """
    tokens = np.asarray(ids)
    for period in range(2, len(tokens) // SAID + 1):
        same = tokens[period:][::-1] == tokens[:-period][::-1]
        run = len(same) if same.all() else int(same.argmin())
        if run >= (SAID - 1) * period:
            return True
    return False


def share_after_answer(record: Record, task: Task, decode: Callable[[Sequence[int]], str] | None = None) -> float:
    """Share of a completion that stands behind its answer.

    The answer is settled with the shortest beginning, in whole words, from which on the task extracts what it extracts
    from the whole, in the asked form if the whole is in it. What follows neither makes nor changes the answer: a second
    question that the model asks itself, an explanation, the answer once more. White space at the end does not count.

    Args:
        record: A completion from which the task extracts an answer.
        task: The task, which says what an answer is.
        decode: Token ids to text, to count in tokens; None counts characters.
    """
    text = record.completion.rstrip()
    place = settled_at(text, task)
    if decode is None:
        return 1 - place / len(text) if text else 0.0
    ids = text_ids(record)
    end, settled = _tokens_of(ids, len(text), decode), _tokens_of(ids, place, decode)
    return 1 - settled / end if end else 0.0


def settled_at(text: str, task: Task) -> int:
    """Character behind the word with which the answer stands; the text's length where it has none."""
    answer = task.extract(text)
    if answer is None:
        return len(text)
    # The form too: in "5 + 7 = 12\n#### 12" a lenient reader has the answer before the line that gives it.
    in_form = task.in_asked_form(text)
    ends = [word.end() for word in re.finditer(r"\S+", text)]
    settled = len(ends) - 1
    # From behind: most answers stand at the end, and a beginning may have had the right one by chance.
    while settled > 0:
        before = text[: ends[settled - 1]]
        if task.extract(before) != answer or task.in_asked_form(before) != in_form:
            break
        settled -= 1
    if settled + 1 < len(ends) and not text[ends[settled] : ends[settled + 1]].strip(_CLOSING):
        settled += 1  # it belongs to what it closes
    return ends[settled]


def _tokens_of(ids: Sequence[int], n_characters: int, decode: Callable[[Sequence[int]], str]) -> int:
    """How many of the tokens make up the first characters; a token that reaches beyond counts."""
    return bisect_left(range(len(ids)), n_characters, key=lambda n: len(decode(ids[:n])))


def _decoder(tokenizer: Any) -> Callable[[Sequence[int]], str] | None:
    if tokenizer is None:
        return None
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a ModelPair has one
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def text_ids(record: Record) -> tuple[int, ...]:
    """A completion's tokens without the one that ended it."""
    return record.completion_ids[:-1] if record.finish_reason == "eos" else record.completion_ids


OF_COMPLETIONS: dict[str, tuple[str, Callable[[Record], float]]] = {
    "length": ("tokens", lambda record: float(record.n_completion_tokens)),
    "short": ("share", lambda record: float(record.n_completion_tokens < SHORT)),
    "truncated": ("share", lambda record: float(record.finish_reason == "length")),
    "empty": ("share", lambda record: float(not record.completion.strip())),
    "repeated 4-grams": ("share", lambda record: repeated_ngrams(text_ids(record), 4)),
    "longest loop": ("tokens", lambda record: float(longest_loop(text_ids(record)))),
    "loops": ("share", lambda record: float(ends_in_loop(text_ids(record)))),
}
"""Unit and value of what a single completion tells."""


def _by_prompt(corpus: Iterable[Record]) -> list[list[Record]]:
    prompts: dict[str, list[Record]] = {}
    for record in corpus:
        prompts.setdefault(record.id, []).append(record)
    if not prompts:
        raise SPDError("the corpus is empty, so there is nothing to diagnose; generate completions first")
    return list(prompts.values())


def _ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def _distinct(prompts: Sequence[Sequence[Record]], n: int) -> Estimate:
    """Distinct-n of disjoint pools of ten prompts, one completion each, which compare across sizes of corpora.

    An incomplete last pool is left out, unless it is the only one.
    """
    firsts = [samples[0] for samples in prompts]
    starts = range(0, max(len(firsts) - GROUP, 0) + 1, GROUP)
    values = []
    for start in starts:
        grams = [gram for record in firsts[start : start + GROUP] for gram in _ngrams(text_ids(record), n)]
        if grams:
            values.append(len(set(grams)) / len(grams))
    return mean_interval(values or [0.0])
