"""Text to tokens: prompt formats, joint tokenisation and the token positions that decide correctness."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any, Literal

from spd_lens.errors import SPDError, TooLong, one_line, whole
from spd_lens.examples import Example, whole_characters
from spd_lens.models.templates import Message, asks_for_the_date, ending, render
from spd_lens.models.tokenizer import Tokens, tokenised

Loss = Literal["aligned", "full"]

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
        return Encoded(ids, min(self.completion_start, len(ids)), scored)


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


@dataclass(frozen=True)
class PromptFormat:
    """How a prompt becomes text. The paper does not say; both forms are common.

    `chat`: the tokenizer's chat template with one user turn and the generation prompt; the template brings its own
    BOS, so the tokenizer adds no special tokens. `raw`: the prompt and a line break; the tokenizer adds what it adds
    before any text. What it adds behind a text (EOS) is left out: the completion begins there.
    """

    tokenizer: Any
    chat: bool
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

    @classmethod
    def choose(
        cls,
        tokenizer: Any,
        name: str = "auto",
        system: str | None = None,
        enable_thinking: bool | None = None,
        prompt_date: str | date | None = None,
    ) -> PromptFormat:
        """`"auto"` is `chat` where the tokenizer has a template, else `raw`.

        Raises:
            SPDError: an unknown format; a chat without a template, or with one that makes no prompt or does not show
                what the user writes; a system message, `enable_thinking` or `prompt_date` that would do nothing; a
                tokenizer that gives no character offsets.
        """
        if name not in ("auto", "chat", "raw"):
            raise SPDError(f"unknown prompt format {name!r}; choose 'auto', 'chat' or 'raw'")
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if name == "chat" and not has_template:
            raise SPDError("the tokenizer has no chat template; use the prompt format 'raw'")
        if not getattr(tokenizer, "is_fast", False):
            raise SPDError(
                f"{type(tokenizer).__name__} gives no character offsets, which spans need; "
                "use a model with a fast tokenizer (tokenizer.json)"
            )
        chat = has_template if name == "auto" else name == "chat"
        form = cls(tokenizer, chat, system, enable_thinking, date_text(prompt_date), prompt_date is not None)
        return form._checked()

    @property
    def name(self) -> str:
        return "chat" if self.chat else "raw"

    @property
    def settings(self) -> dict[str, Any]:
        """What decides a prompt's text beside the tokenizer, as it is recorded."""
        shown = {} if self.prompt_date is None else {"prompt_date": self.prompt_date}
        return {"prompt_format": self.name, "system": self.system, "enable_thinking": self.enable_thinking, **shown}

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
            return f"{prompt}\n"
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
                    f"raw prompts have no chat template, so {given} would do nothing; leave it out, or use the prompt "
                    "format 'chat' and a model with a template"
                )
            return self
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

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of the prompt alone, as generation starts from them.

        Raises:
            SPDError: the text is no Unicode text, or far longer than the context (`TooLong`).
        """
        return self._tokens(self.text(prompt), f"prompt {prompt[:40]!r}", self.longest or _LONGEST).ids

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
            return tokenised(self.tokenizer, whole_characters(text, name), specials=not self.chat, most=most)
        except TooLong as error:
            raise TooLong(f"{name} {error}; shorten it or leave it out (--too-long drop does, and counts)") from error

    def encode(self, example: Example, loss: Loss = "aligned", max_tokens: int | None = None) -> Encoded:
        """Joint tokenisation (Eq. 6). `loss="full"` scores every token of the completion (paper table 5).

        A token that overlaps a span counts, also when it begins before it.

        Args:
            example: Prompt, completion and spans.
            loss: Which tokens are scored.
            max_tokens: Keep this many tokens of prompt and completion, from the beginning, and score what is scored
                among them; None keeps all.

        Raises:
            SPDError: the example has no completion or no span, a span covers no token, or no scored token is kept.
        """
        if loss not in ("aligned", "full"):
            raise SPDError(f"unknown loss {loss!r}; choose 'aligned' or 'full'")
        max_tokens = None if max_tokens is None else whole("max_tokens", max_tokens, least=2)
        name = example.name
        if not example.completion:
            raise SPDError(f"{name} has no completion, so it has no loss; give it a gold answer")
        if loss == "aligned" and not example.spans:
            raise SPDError(f"{name} has no correctness span; give it one or use loss='full'")
        joint = self.joint(example, any_length=max_tokens is not None)
        ids, offsets, start = joint.ids, joint.offsets, joint.completion_at
        spans = example.spans if loss == "aligned" else ((0, len(example.completion)),)
        scored: set[int] = set()
        for low, high in spans:
            covered = _overlapping(offsets, start + low, start + high)
            if not covered:
                raise SPDError(f"span ({low}, {high}) of {name} covers no token; check its character positions")
            scored.update(covered)
        scored.discard(0)  # nothing predicts the first token
        in_completion = _overlapping(offsets, start, start + len(example.completion))
        if not scored or not in_completion:
            raise SPDError(f"{name} scores no token that the model predicts; give it a longer prompt or another span")
        encoded = Encoded(ids, max(in_completion[0], 1), sorted(scored))
        return encoded if max_tokens is None else encoded.cut(max_tokens, name)


def _overlapping(offsets: list[tuple[int, int]], start: int, end: int) -> list[int]:
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
