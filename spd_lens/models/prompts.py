"""Text to tokens: prompt formats, joint tokenisation and the token positions that decide correctness."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any, Literal, cast, get_args

from spd_lens.errors import SPDError, TooLong, one_line, shortened, whole
from spd_lens.examples import Example, Span, whole_characters
from spd_lens.models.templates import Message, asks_for_the_date, ending, render
from spd_lens.models.tokenizer import Tokens, tokenised

Loss = Literal["aligned", "full"]
FormatName = Literal["chat", "raw", "verbatim"]
SpanRule = Literal["overlap", "inside"]

_SAMPLES = tuple("\n".join(f"{word} {n}: how many are {n} and {n + 1}?" for n in range(40)) for word in ("Line", "Row"))
_A_PART = re.compile(r"""['"]type['"]: ['"]text['"]""")
_QUESTION, _ANSWER = "spdlensasks", "spdlenssays"
_LONGEST = 2**20
"""The context in tokens that is assumed where no model says what its own is."""


@dataclass(frozen=True)
class Encoded:
    """An example as the model sees it: `z = T(q, y)` and `S` (paper section 3.2)."""

    ids: list[int]
    """Token ids of prompt and completion, tokenised jointly."""
    completion_start: int
    """Position of the first token that overlaps the completion; the number of tokens where all of it was cut off."""
    scored: list[int]
    """Positions `t` in `S`, each predicted from position `t - 1`, in ascending order."""
    shared: str = ""
    """Text of the token that begins in the prompt and ends in the completion, if there is one: it counts as the
    completion's, and generation from the prompt cannot produce it."""
    marked: Mapping[str, tuple[int, ...]] = field(default_factory=dict, compare=False)
    """Positions of the tokens that overlap each kind of the example's marks, in ascending order; a kind without tokens
    is not there."""

    def cut(self, max_tokens: int, name: str) -> Encoded:
        """The first `max_tokens` tokens, and what is scored among them; `name` is what a message calls the example."""
        scored = [position for position in self.scored if position < max_tokens]
        if not scored:
            raise TooLong(
                f"{name} has no scored token among its first {max_tokens} tokens (the first one is token "
                f"{self.scored[0]}, counted from 0); allow more tokens, or leave the example out (--too-long drop "
                "does, and counts)"
            )
        ids = self.ids[:max_tokens]
        marked = {kind: tuple(t for t in found if t < max_tokens) for kind, found in self.marked.items()}
        return replace(
            self, ids=ids, completion_start=min(self.completion_start, len(ids)), scored=scored,
            marked={kind: found for kind, found in marked.items() if found},
        )  # fmt: skip


@dataclass(frozen=True)
class JointText:
    """Prompt and completion as one text with its tokens, `T(q, y)`, and where each token stands in the text."""

    text: str
    completion_at: int
    """Character at which the completion begins."""
    ids: list[int]
    offsets: list[tuple[int, int]]
    """Characters `[low, high)` of each token: empty for a special token that the tokenizer added, and shared by tokens
    that hold parts of one character."""

    @property
    def shared(self) -> int | None:
        """Position of the token that begins in the prompt and ends in the completion; None if there is none."""
        border = self.completion_at
        return next((i for i, (low, high) in enumerate(self.offsets) if low < border < high), None)


@dataclass(frozen=True)
class PromptFormat:
    """How a prompt becomes text, and which of its tokens a span of characters means. The paper does not say.

    `chat`: the tokenizer's chat template with one user turn and the generation prompt; the template brings its own
    BOS, so the tokenizer adds no special tokens. `raw`: the prompt and a line break. `verbatim`: the prompt as it is.
    Before the text of the last two, the tokenizer adds what it adds before any text, unless it is told not to. What it
    adds behind a text (EOS) is left out: the completion begins there.
    """

    tokenizer: Any
    name: FormatName
    system: str | None = None
    """System message of the chat form; None leaves the template's own."""
    enable_thinking: bool | None = None
    """The switch of a thinking model's template (such as Qwen3): False closes an empty block of thoughts before the
    answer. None leaves the template's own default."""
    prompt_date: str | None = None
    """The day, as YYYY-MM-DD, that a template which shows today's date shows instead; None where it shows no date."""
    date_given: bool = False
    """Whether the day was asked for; else it is the day on which the format was chosen, and gives way to a recorded
    one."""
    parts: tuple[bool, bool] = (False, False)
    """Whether the template takes the content of a user's message, and of the system message, as a list of parts: those
    of multimodal models do."""
    longest: int | None = None
    """The model's context in tokens, if there is a model: no text is tokenised far beyond it."""
    add_special_tokens: bool = True
    """Whether raw and verbatim prompts begin with what the tokenizer adds before any text, such as BOS."""
    span_rule: SpanRule = "overlap"
    """Which tokens a span of characters means: those that overlap it, or only those that lie wholly `inside` it."""

    @classmethod
    def choose(
        cls,
        tokenizer: Any,
        name: str = "auto",
        system: str | None = None,
        enable_thinking: bool | None = None,
        prompt_date: str | date | None = None,
        *,
        add_special_tokens: bool = True,
        span_rule: str = "overlap",
    ) -> PromptFormat:
        """`"auto"` is `chat` where the tokenizer has a template, else `raw`.

        Raises:
            SPDError: an unknown format or span rule; a chat without a template, or with one that makes no prompt or
                does not show what the user writes; a system message, `enable_thinking`, `prompt_date` or
                `add_special_tokens` that would do nothing; a tokenizer that gives no character offsets.
        """
        formats, rules = get_args(FormatName), get_args(SpanRule)
        if name not in ("auto", *formats):
            raise SPDError(f"unknown prompt format {name!r}; choose 'auto', 'chat', 'raw' or 'verbatim'")
        if span_rule not in rules:
            raise SPDError(f"unknown span rule {span_rule!r}; choose 'overlap' or 'inside'")
        if not isinstance(add_special_tokens, bool):
            raise SPDError(f"add_special_tokens is {add_special_tokens!r}; write True or False")
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if name == "chat" and not has_template:
            raise SPDError("the tokenizer has no chat template; use the prompt format 'raw' or 'verbatim'")
        if not getattr(tokenizer, "is_fast", False):
            raise SPDError(
                f"{type(tokenizer).__name__} gives no character offsets, which spans need; "
                "use a model with a fast tokenizer (tokenizer.json)"
            )
        if name == "auto":
            name = "chat" if has_template else "raw"
        form = cls(
            tokenizer, cast(FormatName, name), system, enable_thinking, date_text(prompt_date), prompt_date is not None,
            add_special_tokens=add_special_tokens, span_rule=cast(SpanRule, span_rule),
        )  # fmt: skip
        return form._checked()

    @property
    def chat(self) -> bool:
        """Whether prompts stand in the tokenizer's chat template."""
        return self.name == "chat"

    @property
    def specials(self) -> bool:
        """Whether the tokenizer adds its special tokens before a text; a chat template brings its own."""
        return self.add_special_tokens and not self.chat

    @property
    def settings(self) -> dict[str, Any]:
        """What decides a prompt's text and its scored tokens beside the tokenizer, as it is recorded."""
        shown = {"prompt_format": self.name, "system": self.system, "enable_thinking": self.enable_thinking}
        return {**shown, **self.departures}

    @property
    def departures(self) -> dict[str, Any]:
        """The settings that are recorded only where they are not at their default, or do something."""
        found: dict[str, Any] = {} if self.prompt_date is None else {"prompt_date": self.prompt_date}
        if not self.add_special_tokens:
            found["add_special_tokens"] = False
        if self.span_rule != "overlap":
            found["span_rule"] = self.span_rule
        return found

    def on(self, day: str | None) -> PromptFormat:
        """The same format on a day that was recorded; as it is where it shows no date, or one that was asked for."""
        if day is None or self.prompt_date is None or self.date_given:
            return self
        return replace(self, prompt_date=day)

    def text(self, prompt: str) -> str:
        """The prompt as text, ready for the completion to follow.

        Raises:
            SPDError: the chat template fails at this prompt.
        """
        if not self.chat:
            return prompt if self.name == "verbatim" else f"{prompt}\n"
        try:
            return self.render([("user", prompt)])
        except Exception as error:  # a template is a program: its expressions raise more than jinja2's own errors
            raise SPDError(
                f"the chat template makes nothing of the prompt {prompt[:40]!r} ({one_line(error)}); leave it out, or "
                "use the prompt format 'raw'"
            ) from error

    def render(self, turns: Sequence[tuple[str, str]], *, generation: bool = True) -> str:
        """A conversation, of role and text each, in the chat template; with the system message if there is one."""
        system = [] if self.system is None else [_message("system", self.system, self.parts[1])]
        messages = [*system, *(_message(role, text, self.parts[0]) for role, text in turns)]
        options = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        return render(self.tokenizer, messages, generation=generation, date=self.prompt_date, **options)

    def _checked(self) -> PromptFormat:
        """The format with the kind of content and the date that the template takes; refuses options without effect."""
        options = {"system": self.system, "enable_thinking": self.enable_thinking, "prompt_date": self.prompt_date}
        given = ", ".join(f"{name}={value!r}" for name, value in options.items() if value is not None)[:80]
        if not self.chat:
            if given:
                raise SPDError(
                    f"{self.name} prompts have no chat template, so {given} would do nothing; leave it out, or use the "
                    "prompt format 'chat' and a model with a template"
                )
            return self
        if not self.add_special_tokens:
            raise SPDError(
                "a chat template brings its own special tokens, so add_special_tokens=False would do nothing; leave it "
                "out, or use the prompt format 'raw' or 'verbatim'"
            )
        form = self._with_content()
        if form.enable_thinking is not None:
            both = [replace(form, enable_thinking=value).text("Hi") for value in (True, False)]
            form._refuse_equal(both, "takes no enable_thinking", f"leave enable_thinking={form.enable_thinking} out")
        if not asks_for_the_date(self.tokenizer):
            if self.prompt_date is not None:
                raise SPDError(f"the chat template shows no date; leave prompt_date={self.prompt_date} out")
            return form
        return replace(form, prompt_date=self.prompt_date or _today())

    def _with_content(self) -> PromptFormat:
        """The format with the first kind of content under which the template shows what user and system say."""
        mine, instead = "makes no prompt", "use the prompt format 'raw'"
        if self.system is not None:
            mine = "takes no system message"
            instead = f"leave system={self.system[:60]!r} out, or write it into the prompts"
        faults: list[str] = []
        both: list[str] = []
        for parts in ((False, False), (True, True), (True, False), (False, True)):
            form = replace(self, parts=parts)
            try:
                if not form._shows_the_prompt():
                    faults.append("")
                    continue
                if self.system is None:
                    return form
                # not compared with none at all: the message may be word for word that which the template has by default
                both = [replace(form, system=text).text("Hi") for text in (self.system, f"{self.system} Hi")]
            except Exception as error:  # as in `text`
                faults.append(one_line(error))
                if isinstance(error, OverflowError):
                    break  # it would take as long in every other form
                continue
            if both[0] != both[1]:
                return form
        self._refuse_equal(both, mine, instead)
        if faults[0]:  # of a content that is a text, as most templates take it
            raise SPDError(f"the chat template {mine} ({faults[0]}); {instead}")
        raise SPDError(
            "the chat template does not show what the user writes: it makes the same prompt of different texts, or "
            "leaves a part of them out; use the prompt format 'raw', or a template that takes text"
        )

    def _shows_the_prompt(self) -> bool:
        """Whether what the template makes of two long texts contains every line of them."""
        for sample in _SAMPLES:
            text = self.render([("user", sample)])
            at = 0
            for line in sample.splitlines():
                at = text.find(line, at) + len(line)
                if at < len(line):
                    return False
            if _A_PART.search(text):  # a list that was written out as Python or JSON writes it
                return False
        return True

    @staticmethod
    def _refuse_equal(prompts: Sequence[str], fault: str, instead: str) -> None:
        """`SPDError` if forms that differ in an option make the same prompt."""
        if len(set(prompts)) == 1:
            raise SPDError(f"the chat template {fault}: it makes the same prompts whatever that is; {instead}")

    def end_of_turn(self) -> int | None:
        """The token with which the chat template ends an assistant's turn; None if it has none of its own.

        It stands right behind what the assistant says (white space may come before it), and nowhere else but behind
        messages: a token that also opens a turn, or stands within one, does not say that the turn is over.
        """
        if not self.chat:
            return None
        for after in ([], [("user", "Hi")]):  # some end a turn only where another follows
            with contextlib.suppress(Exception):  # a template that takes one question and no answers
                text = self.render([("user", _QUESTION), ("assistant", _ANSWER), *after], generation=False)
                opened = self.render([("user", _QUESTION)])
                if (found := ending(self.tokenizer, text, opened, _QUESTION, _ANSWER)) is not None:
                    return found
        return None

    def prompt_ids(self, prompt: str, most: int | None = None) -> list[int]:
        """Token ids of the prompt alone, as generation starts from them: at most the first `most` (None: all).

        Raises:
            SPDError: the text is no Unicode text, or, where it is not cut, far longer than the context (`TooLong`).
        """
        limit = (self.longest or _LONGEST) if most is None else None
        return self._tokens(self.text(prompt), f"prompt {prompt[:40]!r}", limit).ids[:most]

    def joint(self, example: Example, *, any_length: bool = False) -> JointText:
        """Tokenises prompt and completion as one text, so that a token may span both.

        Args:
            example: Prompt and completion.
            any_length: Whether the text may be far longer than the context, because it is cut afterwards.

        Raises:
            SPDError: the text is no Unicode text (JSON can spell half a character), or far longer than the context
                (`TooLong`).
        """
        whole_characters(example.completion, example.name)
        head = self.text(whole_characters(example.prompt, example.name))
        text = head + example.completion
        tokens = self._tokens(text, example.name, None if any_length else self.longest or _LONGEST)
        return JointText(text, len(head), tokens.ids, tokens.offsets)

    def _tokens(self, text: str, name: str, most: int | None) -> Tokens:
        try:
            return tokenised(self.tokenizer, whole_characters(text, name), specials=self.specials, most=most)
        except TooLong as error:
            raise TooLong(f"{name} {error}; shorten it or leave it out (--too-long drop does, and counts)") from error

    def encode(self, example: Example, loss: Loss = "aligned", max_tokens: int | None = None) -> Encoded:
        """Joint tokenisation (Eq. 6). `loss="full"` scores every token of the completion (paper table 5).

        Which tokens a span means is the `span_rule`. A token that prompt and completion share is the completion's.

        Args:
            example: Prompt, completion and spans.
            loss: Which tokens are scored: those of all spans, or all of the completion.
            max_tokens: Keep this many tokens of prompt and completion, from the beginning, and score what is scored
                among them; None keeps all.

        Raises:
            SPDError: the example has no completion or no span, a span means no token, the chat template does not show
                a prompt that has spans, or no scored token is kept.
        """
        if loss not in ("aligned", "full"):
            raise SPDError(f"unknown loss {loss!r}; choose 'aligned' or 'full'")
        max_tokens = None if max_tokens is None else whole("max_tokens", max_tokens, least=2)
        name = example.name
        if not example.completion:
            raise SPDError(f"{name} has no completion, so it has no loss; give it a gold answer")
        if loss == "aligned" and not example.measurable:
            raise SPDError(f"{name} has no correctness span; give it one or use loss='full'")
        joint = self.joint(example, any_length=max_tokens is not None)
        in_completion = overlapping(joint.offsets, joint.completion_at, len(joint.text))
        scored = set(self._aligned(example, joint) if loss == "aligned" else in_completion)
        scored.discard(0)  # nothing predicts the first token
        if not scored or not in_completion:
            instead = "" if self.chat or self.add_special_tokens else ", or leave add_special_tokens on"
            raise SPDError(
                f"{name} scores no token that the model predicts; give it a longer prompt or another span{instead}"
            )
        shared = "" if joint.shared is None else joint.text[slice(*joint.offsets[joint.shared])]
        encoded = Encoded(joint.ids, max(in_completion[0], 1), sorted(scored), shared, marked(example, joint))
        return encoded if max_tokens is None else encoded.cut(max_tokens, name)

    def _aligned(self, example: Example, joint: JointText) -> Iterator[int]:
        """The tokens that an example's spans mean; `SPDError` for a span that means none."""
        for what, span, low, high in self.places(example, joint):
            found = overlapping(joint.offsets, low, high)
            inside = [i for i in found if low <= joint.offsets[i][0] and joint.offsets[i][1] <= high]
            if not found:
                raise SPDError(f"{what} {span} of {example.name} covers no token; check its character positions")
            if self.span_rule == "inside" and not inside:
                shown = ", ".join(f"{i} {shortened(joint.text[slice(*joint.offsets[i])], 20)!r}" for i in found[:4])
                raise SPDError(
                    f"no token lies inside the {what} {span} of {example.name}, which overlaps "
                    f"{'token' if len(found) == 1 else 'tokens'} {shown}; use span_rule='overlap', or move the span to "
                    "where tokens begin and end"
                )
            yield from inside if self.span_rule == "inside" else found

    def places(self, example: Example, joint: JointText) -> Iterator[tuple[str, Span, int, int]]:
        """Where an example's spans stand in its joint text: the kind of span, the span, and characters `[low, high)`.

        Raises:
            SPDError: the chat template does not show the prompt as it is, and it has spans.
        """
        if example.prompt_spans:
            at, cut = self._prompt_at(example, joint)
            for low, high in example.prompt_spans:
                if cut[1] <= low or high <= cut[0]:
                    raise SPDError(
                        f"prompt span {low, high} of {example.name} holds nothing but white space that the chat "
                        "template leaves out; leave out the span, or use the prompt format 'verbatim' or 'raw'"
                    )
                yield "prompt span", (low, high), at + max(low, cut[0]), at + min(high, cut[1])
        for low, high in example.spans:
            yield "span", (low, high), joint.completion_at + low, joint.completion_at + high

    def _prompt_at(self, example: Example, joint: JointText) -> tuple[int, Span]:
        """Where in the joint text the prompt's first character would stand, and which of its characters are there: a
        template may take white space off both ends."""
        prompt = example.prompt
        if not self.chat:
            return 0, (0, len(prompt))
        # what stands before any prompt tells the prompt from the same words elsewhere in the template
        before = self.text(_QUESTION).rpartition(_QUESTION)[0]
        for shown in (prompt, prompt.rstrip(), prompt.lstrip(), prompt.strip()):
            if shown and joint.text.startswith(before + shown):
                start = prompt.index(shown)
                return len(before) - start, (start, start + len(shown))
        raise SPDError(
            f"the chat template rewrites the prompt of {example.name}, so that its prompt_spans have no place in the "
            "text; use the prompt format 'verbatim' or 'raw'"
        )


def marked(example: Example, joint: JointText) -> dict[str, tuple[int, ...]]:
    """The tokens that an example's marks overlap, by kind, in ascending order; never the first one, which nothing
    predicts. Unlike a span, a mark may mean no token."""
    at = joint.completion_at
    found = {
        kind: {t for low, high in spans for t in overlapping(joint.offsets, at + low, at + high)} - {0}
        for kind, spans in example.marks.items()
    }
    return {kind: tuple(sorted(tokens)) for kind, tokens in found.items() if tokens}


def overlapping(offsets: Sequence[tuple[int, int]], start: int, end: int) -> list[int]:
    """Tokens whose characters overlap `[start, end)`; special tokens have empty offsets and never do."""
    return [position for position, (low, high) in enumerate(offsets) if low < end and high > start and high > low]


def date_text(day: str | date | None) -> str | None:
    """A day as YYYY-MM-DD; `SPDError` if the value is no day."""
    try:
        if isinstance(day, date):
            return date(day.year, day.month, day.day).isoformat()  # a time of day is left out
        return None if day is None else date.fromisoformat(day).isoformat()
    except (TypeError, ValueError) as error:
        raise SPDError(f"prompt_date is {day!r}; write a day as YYYY-MM-DD") from error


def _today() -> str:
    return date.today().isoformat()


def _message(role: str, text: str, parts: bool) -> Message:
    return {"role": role, "content": [{"type": "text", "text": text}] if parts else text}
