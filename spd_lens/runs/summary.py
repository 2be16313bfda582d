"""`summary.md`: what a run found, with intervals and controls, from the files in its directory."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from spd_lens.evaluation import (
    LOSS_TASKS,
    NEUTRAL,
    OUTCOMES,
    SAYS,
    EvalResult,
    ForcedItem,
    Format,
    Measured,
    Subject,
    per_item,
)
from spd_lens.files import Schema, read_json, write_text
from spd_lens.generation import APPLIED, Record, shown
from spd_lens.output import markdown, visible
from spd_lens.runs.config import SPDConfig, protocol_in_words
from spd_lens.runs.context_limit import in_words
from spd_lens.runs.run_dir import Run
from spd_lens.stats import (
    difference_sentence,
    mcnemar_exact,
    mean_interval,
    paired_difference,
    score_interval,
    verdict,
)
from spd_lens.subspaces import adapter_grade

Forced = Mapping[str, Sequence[ForcedItem]]
"""Teacher-forced items of several policies."""
_FIELDS = ("aligned_loss", "kl", "completion_loss", "token_accuracy")
"""What every version has measured."""
_TOLD = ("aligned_loss", "results_loss", "answer_only_loss", "kl")
"""Outcomes with a sentence of their own: on correctness, and on how much changed. None of them alone is the effect."""
_ON_OTHER_TEXTS = {"loss on other texts": "aligned_loss", "KL on other texts": "kl"}
STAGES = ("extract", "generate", "compare", "finetune", "effects", "evaluate")


def write_summary(run: Run) -> str:
    """Write and return `summary.md`."""
    targets = list(run.config.targets)
    parts, subject = [_heading(run)], _subject(run)
    other = run.effects(NEUTRAL, side=True) if run.effects_path(NEUTRAL, side=True).exists() else None
    for task in targets:
        parts.append(_scores(run, task))
        if subject is not None and (beside := _published(run, task, subject)):
            parts += [beside, subject.caveat if subject.caveat not in parts else ""]
        if (run.path / "effects" / f"{task}.json").exists():
            parts.append(effects_section(run.effects(task), task, _rounding(run), other))
    parts += [_cautions(run), _evidence(run), _proof(run), _completions(run, targets[0]), _times(run)]
    text = visible("\n\n".join(part for part in parts if part) + "\n")
    write_text(run.path / "summary.md", text)
    return text


def _heading(run: Run) -> str:
    config, notes = run.config, run.notes
    protocol = protocol_in_words(config)
    subspace, resolved = run.subspace, notes["resolved"]
    sampling = ", ".join(f"{key} {value}" for key, value in resolved["sampling"].items() if value is not None)
    if APPLIED in resolved:
        sampling += f"; of the model's own, {quoted(shown(resolved[APPLIED]))}"
    ranks = "; ".join(f"{site}: {'/'.join(map(str, subspace.ranks[site]))}" for site in subspace.sites)
    width = next(iter(subspace.bases.values())).shape[1]
    moments = run.moments  # of all positions, whatever the subspace was taken from
    counts = [int(n.sum()) for n in (moments.n_examples, moments.n_scored, moments.n_tokens)]
    spans = "" if config.span is None else f"spans {quoted(config.span)}, "
    return "\n".join(
        [
            f"# SPD on {quoted(config.task)} with {quoted(config.model)}",
            "",
            *([f"- Protocol: {protocol}"] if protocol else []),
            f"- Calibration: {counts[0]} examples, {counts[1]} scored of {counts[2]} tokens, {spans}"
            f"loss `{config.loss}`, engine `{config.engine}` "
            f"({resolved['backend']}, {resolved['dtype']}, {resolved['device']}, {resolved['format']} prompts)",
            f"- Subspace: {'per head' if config.per_head else 'joint'}, ranks of {width} per block: {ranks}; "
            f"{_taken(config)}strength {config.strength:g}",
            f"- Corpus: {len(run.corpus)} completions of at most {config.max_new_tokens} tokens ({sampling})",
            f"- Training: {config.method}, {_epochs(run)}, learning rate {config.lr:g}, seed {config.seed}",
            *([f"- Left out, {in_words(notes['left_out'])}."] if "left_out" in notes else []),
            "- Intervals are 95 %. Teacher-forced measures are on the gold completions of the test items: `aligned "
            "loss` on the tokens that decide correctness, `completion loss` and `KL` (base || policy) on all tokens, "
            "in nats per token; `token accuracy` is the share of tokens that are the most probable next one.",
        ]
    )


def _rounding(run: Run) -> float | None:
    """KL between hooks and folded weights, which differ by rounding alone; None where no lens model was built."""
    return run.notes["hooks"]["fold_parity"]["kl"] if "hooks" in run.notes else None


def _epochs(run: Run) -> str:
    """How long was trained and, where training may stop early, which epoch's weights were taken."""
    if not run.config.early_stop:
        return f"{run.config.epochs} epochs"
    stop = read_json(run.adapter / "training.json", _Training).early_stop
    done = f"{len(stop.losses)} of at most {run.config.epochs} epochs"
    return f"{done} (the weights are those of epoch {stop.epoch}, whose training loss was lowest)"


class _Stopped(Schema, extra="ignore"):
    losses: list[float]
    epoch: int


class _Training(Schema, extra="ignore"):
    """What a summary reads of a training that may stop early."""

    early_stop: _Stopped


def _taken(config: SPDConfig) -> str:
    """How the directions were chosen, where that is not by a rank and from the gradients as they are."""
    by = "" if config.estimator == "paper" else f"estimator {quoted(config.estimator)}; "
    share = "" if config.energy is None else f"the fewest with {config.energy:g} of the squared singular values; "
    return by + share + ("of the gradients less their mean; " if config.center_gradients else "")


def _evidence(run: Run) -> str:
    """The grades of subspace and adapter, with what they rest on."""
    grades = {"subspace": run.subspace.grade, "adapter": adapter_grade(run.adapter)}
    lines = [f"- The {name}: **{grade}**. {quoted(grade.reasons[-1])}" for name, grade in grades.items()]
    return "\n".join(["## Evidence", "", *lines])


def _scores(run: Run, task: str) -> str:
    results = {name: run.result(task, name) for name in run.config.policies}
    columns: dict[str, list[Any]] = {
        "accuracy": [result.accuracy for result in results.values()],
        "accuracy by likelihood": [result.choice_accuracy for result in results.values()],
        "mean length (tokens)": [result.mean_length for result in results.values()],
        "cut off": [result.truncated for result in results.values()],
    }
    if not any(columns["accuracy by likelihood"]):
        del columns["accuracy by likelihood"]
    if any(unjudged := [result.n_unjudged for result in results.values()]):
        columns["cannot be judged (left out)"] = unjudged
    n = len(next(iter(results.values())).items)
    rows = zip(results, *columns.values(), strict=True)
    lines = [f"## {quoted(task)}: {n} test items", "", *markdown(["policy", *columns], rows)]
    for name, result in results.items():
        if "base" in results and name != "base":
            lines += ["", f"- {_gain(results['base'], result)}"]
    return "\n".join(lines)


def _gain(base: EvalResult, result: EvalResult) -> str:
    before, after = result.paired_scores(base)
    test = mcnemar_exact(before, after) if {*before, *after} <= {0.0, 1.0} else None
    return difference_sentence(
        result.accuracy_gain(base), measure="Accuracy", first=base.policy, second=result.policy, test=test
    )


def _cautions(run: Run) -> str:
    """What guardrails said, which is why results should be doubted."""
    noted = run.notes.get("cautions", [])
    return "\n".join(["## Doubts", "", *(f"- {quoted(sentence)}" for sentence in noted)]) if noted else ""


def base_warnings(run: Run) -> list[str]:
    """A sentence for every target on which the base is far below what is published of it."""
    if (subject := _subject(run)) is None:
        return []
    found = {task: _measured_base(run, task) for task in run.config.targets}
    named = run.config.targets
    says = ((task, subject.warning(named[task], measured)) for task, measured in found.items() if measured)
    return [f"{task}: {text}" for task, text in says if text is not None]


def _published(run: Run, task: str, subject: Subject) -> str:
    """The base beside what is published of it; empty where nothing is."""
    measured = _measured_base(run, task)
    return "" if measured is None else "\n".join(subject.beside(run.config.targets[task], measured))


def _measured_base(run: Run, task: str) -> Measured | None:
    """What the base does on a target, and in which format it was asked; None where that was not measured."""
    base, named = run.result(task, "base"), run.config.targets[task]
    value = base.completion_loss if named in LOSS_TASKS else base.accuracy
    if value is None:
        return None
    asked = base.settings.get("prompt_format", run.notes["resolved"]["format"])
    return Measured(value, Format.here(asked, base.settings.get("task_options", {})))


def _subject(run: Run) -> Subject | None:
    """The published model that the run's base is; None where that is not known, or no base was scored."""
    config = run.config
    # the base of a later round was trained by the rounds before it
    trained = run.path.name != "round-1" and (run.path.parent / "rounds.json").exists()
    if trained or "base" not in config.policies:
        return None
    return Subject.of(config.model, config.published_name, run.notes.get("published_name"))


def effects_section(effects: Forced, task: str, rounding: float | None = None, other: Forced | None = None) -> str:
    """Teacher-forced outcomes: each policy against the base, and the projection against random subspaces.

    `rounding` is the KL that the model's dtype alone leaves between two ways to compute the same thing; `other` are the
    same policies on other texts.
    """
    groups = _groups(effects)
    outcomes = _outcomes(groups["base"])
    # what earlier versions measured has the table that they wrote
    table = _by_policy(groups) if set(outcomes) <= set(_FIELDS) and not other else _by_outcome(groups, other)
    lines = [f"### Teacher-forced on gold solutions of {quoted(task)}", "", *table, ""]
    told = [outcome for outcome in _TOLD if outcome in outcomes]
    random = next((group for label, group in groups.items() if label.endswith("random subspaces")), None)
    if random and "projected" in groups:
        lines += [_against_random(groups["projected"], random, outcome) for outcome in told]
    if "spd" in effects:
        for outcome in told[:-1]:  # not for KL, which the base has none of
            change = paired_difference(per_item(groups["base"], outcome), per_item(groups["spd"], outcome))
            lines += [f"- {_capital(OUTCOMES[outcome])} after fine-tuning, minus before: {change}; {verdict(change)}."]
        moved_by = fmean(item.kl for item in effects["spd"])
        if rounding is not None and moved_by < 2 * rounding:
            lines += [
                f"- The fine-tuned model's KL from base ({moved_by:.1g}) is no more than rounding in this dtype leaves "
                f"between two engines ({rounding:.1g}): the training changed little."
            ]
    return "\n".join(lines).rstrip()


def _groups(effects: Forced) -> dict[str, Forced]:
    """The policies of a run by what a table calls them; random subspaces are one group."""
    random = {name: items for name, items in effects.items() if name.startswith("random-")}
    groups: dict[str, Forced] = {
        name: {name: effects[name]} for name in ("base", "projected", "spd") if name in effects
    }
    return {**groups, **({f"{len(random)} random subspaces": random} if random else {})}


def _outcomes(base: Forced) -> list[str]:
    """The outcomes that some item has; where only the answer is asked for anyway, that is the aligned loss alone."""
    found = {outcome: values for outcome in OUTCOMES if (values := per_item(base, outcome))}
    if found.get("answer_only_loss") == found["aligned_loss"]:
        del found["answer_only_loss"]
    return list(found)


def _by_outcome(groups: Mapping[str, Forced], other: Forced | None) -> list[str]:
    """Outcomes side by side: a row for each, with the base's mean and every policy's paired change from it."""
    columns = ["outcome", "base", *(f"{label} − base" for label in groups if label != "base"), "what it says"]
    asked = [(OUTCOMES[outcome], groups, outcome, SAYS[outcome]) for outcome in _outcomes(groups["base"])]
    if other:
        says = f"The same on {len(other['base'])} short texts of plain prose, which SPD was not aimed at."
        asked += [(what, _groups(other), outcome, says) for what, outcome in _ON_OTHER_TEXTS.items()]
    rows = []
    for heading, measured, outcome, says in asked:
        base, *policies = (per_item(group, outcome) for group in measured.values())
        rows.append([heading, mean_interval(base), *(paired_difference(base, own) for own in policies), says])
    return markdown(columns, rows)


def _by_policy(groups: Mapping[str, Forced]) -> list[str]:
    """The outcomes that every version has measured, a row for each policy."""
    rows = []
    for label, group in groups.items():
        loss, kl, whole, right = (mean_interval(per_item(group, field)) for field in _FIELDS)
        change = paired_difference(per_item(groups["base"], "aligned_loss"), per_item(group, "aligned_loss"))
        is_base = label == "base"
        rows.append([label, loss, "0" if is_base else change, "0" if is_base else kl, whole, right])
    columns = ["policy", "aligned loss", "change from base", "KL from base", "completion loss", "token accuracy"]
    return markdown(columns, rows)


def _against_random(projected: Forced, random: Forced, outcome: str) -> str:
    """The question that matters: does the gradient subspace do what any subspace of its rank would?"""
    difference = paired_difference(per_item(random, outcome), per_item(projected, outcome))
    each = [fmean(per_item({name: items}, outcome)) for name, items in random.items()]
    name = _capital(OUTCOMES[outcome])
    sentence = difference_sentence(difference, measure=name, first="random", second="projected")
    return f"- {sentence} Random subspaces ranged from {min(each):.3f} to {max(each):.3f}."


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def changed(first: Sequence[Record], second: Sequence[Record]) -> list[bool]:
    """Whether each completion of `first` differs from that of the same prompt in `second`, where both have it."""
    other = {record.key: record for record in second}
    return [record.completion_ids != other[record.key].completion_ids for record in first if record.key in other]


def _proof(run: Run) -> str:
    notes = run.notes
    corpus, unprojected = run.corpus, run.unprojected
    share = score_interval([float(x) for x in changed(corpus, unprojected)])
    ended = score_interval([float(record.finish_reason != "length") for record in corpus])
    lines = ["## What shows that something happened", ""]
    if "hooks" in notes:
        firings = ", ".join(f"{site}: {n}" for site, n in notes["hooks"]["firings"].items())
        parity = notes["hooks"]["fold_parity"]
        lines.append(
            f"- Hook firings per site in one forward pass of the lens model: {firings}. The folded twin that generated "
            f"the corpus agrees with the hooks to a KL of {parity['kl']:.1g} nats."
        )
    else:
        lines.append("- No lens model was built (engine `twin`): the projection was folded into the twin's weights.")
    dtype, rounding = notes["resolved"]["dtype"], ""
    if dtype not in ("float32", "float64") and len(unprojected) != len(corpus):
        rounding = f" In {dtype} some of them differ by their batch alone (it held other prompts)."
    engine, other = (each.settings.get("engine") for each in (corpus, unprojected))
    if engine == other:
        lines.append(f"- Completions that the projection changed, same prompts and same noise: {share}.{rounding}")
    else:
        lines.append(
            f"- Completions that differ from those without the projection, same prompts: {share}. The engine {other!r} "
            f"wrote those, and {engine!r} the corpus, with noise of its own: sampling alone makes completions differ."
        )
    lines.append(f"- Completions that the model ended by itself: {ended}.")
    return "\n".join(lines)


def _completions(run: Run, task: str, n: int = 3) -> str:
    """The same prompts side by side: base, under the projection, and after fine-tuning."""
    other = {record.key: record for record in run.unprojected}
    both = [record for record in run.corpus if record.key in other]
    lines = [f"## Training prompts without and with the projection ({min(n, len(both))} of {len(both)})", ""]
    # changed ones first: equal pairs show nothing
    both.sort(key=lambda record: record.completion_ids == other[record.key].completion_ids)
    for record in both[:n]:
        pair = {"Base": other[record.key].completion, "Projected": record.completion}
        lines += _quotations({"Prompt": record.prompt, **pair})
    if {"base", "spd"} <= set(run.config.policies):
        base, spd = run.result(task, "base").items, run.result(task, "spd").items
        shown_of = f"{min(n, len(base))} of {len(base)}"
        lines += [f"## Test items of {quoted(task)}, base and fine-tuned, greedy ({shown_of})", ""]
        pairs = sorted(zip(base, spd, strict=True), key=lambda pair: pair[0].completion == pair[1].completion)
        for before, after in pairs[:n]:
            base_label, spd_label = f"Base ({before.score:g})", f"SPD ({after.score:g})"
            lines += _quotations({"Prompt": before.prompt, base_label: before.completion, spd_label: after.completion})
    return "\n".join(lines).rstrip()


def _quotations(texts: Mapping[str, str]) -> list[str]:
    """Texts one below the other, each after its label."""
    return [*(line for label, text in texts.items() for line in (f"> **{label}:** {quoted(text)}", ">")), ""]


def quoted(text: str, limit: int = 600) -> str:
    """A model's or a data set's text on one line, shown as it is: a code span, in which Markdown and HTML mean nothing.

    Line breaks become `⏎`, other control characters `�`; a long text is cut in the middle, so that the answer shows.
    """
    text = re.sub("\r\n|[\n\r\v\f\x85\u2028\u2029]", " ⏎ ", text.strip()).replace("\t", "    ")
    text = "".join("�" if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)
    if not text:
        return "(nothing)"
    if len(text) > limit:
        text = f"{text[: limit // 2]} … {text[-(limit // 2) :]}"
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if "`" in (text[0], text[-1]) else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _times(run: Run) -> str:
    seconds, foreseen = run.notes.get("seconds", {}), run.notes.get("foreseen", {})
    stages = [stage for stage in STAGES if stage in seconds]
    rows = [[*(times.get(stage, 0.0) for stage in stages)] for times in (seconds, foreseen) if times]
    shown = [[f"{time:.0f} s" for time in (*row, sum(row))] for row in rows]
    if not foreseen:
        return "\n".join(["## Time", "", *markdown([*stages, "total"], shown)])
    labelled = [[label, *row] for label, row in zip(("taken", "foreseen"), shown, strict=True)]
    return "\n".join(["## Time", "", *markdown(["time", *stages, "total"], labelled)])
