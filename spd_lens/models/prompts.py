"""Text to tokens: prompt formats, joint tokenisation and the token positions that decide correctness."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from spd_lens.errors import SPDError
from spd_lens.examples import Example

Loss = Literal["aligned", "full"]


@dataclass(frozen=True)
class Encoded:
    """An example as the model sees it: `z = T(q, y)` and `S` (paper section 3.2)."""

    ids: list[int]
    """Token ids of prompt and completion, tokenised jointly."""
    completion_start: int
    """Position of the first token that overlaps the completion."""
    scored: list[int]
    """Positions `t` in `S`, each predicted from position `t - 1`, in ascending order."""


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
    to any text.
    """

    tokenizer: Any
    chat: bool
    system: str | None = None
    """System message of the chat form; None leaves the template's own."""
    enable_thinking: bool | None = None
    """The switch of a thinking model's template (Qwen3 and like): False closes an empty block of thoughts before the
    answer. None leaves the template's own default."""

    @classmethod
    def choose(
        cls, tokenizer: Any, name: str = "auto", system: str | None = None, enable_thinking: bool | None = None
    ) -> PromptFormat:
        """`"auto"` is `chat` where the tokenizer has a template, else `raw`.

        Raises:
            SPDError: an unknown format; a chat without a template, or with one that makes no prompt; a system message
                or `enable_thinking` that would do nothing; a tokenizer that gives no character offsets.
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
        form = cls(tokenizer, has_template if name == "auto" else name == "chat", system, enable_thinking)
        form._check()
        return form

    @property
    def name(self) -> str:
        return "chat" if self.chat else "raw"

    @property
    def settings(self) -> dict[str, Any]:
        """What decides a prompt's text beside the tokenizer, as records keep it."""
        return {"prompt_format": self.name, "system": self.system, "enable_thinking": self.enable_thinking}

    def text(self, prompt: str) -> str:
        """The prompt as text, ready for the completion to follow."""
        if not self.chat:
            return f"{prompt}\n"
        messages = [{"role": "user", "content": prompt}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        options = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)

    def _check(self) -> None:
        """Refuse a template that makes no prompt, and options that the prompts would not show."""
        options = {"system": self.system, "enable_thinking": self.enable_thinking}
        given = ", ".join(f"{name}={value!r}" for name, value in options.items() if value is not None)[:80]
        if not self.chat:
            if given:
                raise SPDError(
                    f"raw prompts have no chat template, so {given} would do nothing; leave it out, or use the prompt "
                    "format 'chat' and a model with a template"
                )
            return
        if self.system is None:
            self._sample("makes no prompt", "use the prompt format 'raw'")
        else:
            instead = f"leave system={self.system[:60]!r} out, or write it into the prompts"
            # not compared with none at all: the message may be word for word the one that the template has by default
            both = (replace(self, system=text) for text in (self.system, f"{self.system} Hi"))
            self._refuse_equal(both, "takes no system message", instead)
        if self.enable_thinking is not None:
            instead = f"leave enable_thinking={self.enable_thinking} out"
            both = (replace(self, enable_thinking=value) for value in (True, False))
            self._refuse_equal(both, "takes no enable_thinking", instead)

    @staticmethod
    def _refuse_equal(forms: Iterable[PromptFormat], fault: str, instead: str) -> None:
        """`SPDError` if forms that differ in an option make the same prompt, or none."""
        if len({form._sample(fault, instead) for form in forms}) == 1:
            raise SPDError(f"the chat template {fault}: it makes the same prompts whatever that is; {instead}")

    def _sample(self, fault: str, instead: str) -> str:
        """A short prompt's text, or what it means that the template makes none."""
        try:
            return self.text("Hi")
        except Exception as error:  # a template is a program: its expressions raise more than jinja2's own errors
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise SPDError(f"the chat template {fault} ({reason}); {instead}") from error

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of the prompt alone, as generation starts from them."""
        return self.tokenizer(self.text(prompt), add_special_tokens=not self.chat)["input_ids"]

    def joint(self, example: Example) -> JointText:
        """Tokenises prompt and completion as one text, so that a token may span both.

        Raises:
            SPDError: the text is no Unicode text (JSON can spell half a character).
        """
        try:
            (example.prompt + example.completion).encode()
        except UnicodeEncodeError as error:
            raise SPDError(
                f"example {example.id or example.prompt[:40]!r} holds half a character ({error.object[error.start]!r}) "
                "that no tokenizer reads; mend or leave out the record"
            ) from error
        head = self.text(example.prompt)
        text = head + example.completion
        tokens = self.tokenizer(text, add_special_tokens=not self.chat, return_offsets_mapping=True)
        return JointText(text, len(head), tokens["input_ids"], tokens["offset_mapping"])

    def encode(self, example: Example, loss: Loss = "aligned") -> Encoded:
        """Joint tokenisation (Eq. 6). `loss="full"` scores every token of the completion (paper table 5).

        A token that overlaps a span counts, also when it begins before it.

        Raises:
            SPDError: the example has no completion or no span, or a span covers no token.
        """
        if loss not in ("aligned", "full"):
            raise SPDError(f"unknown loss {loss!r}; choose 'aligned' or 'full'")
        name = f"example {example.id or example.prompt[:40]!r}"
        if not example.completion:
            raise SPDError(f"{name} has no completion, so it has no loss; give it a gold answer")
        if loss == "aligned" and not example.spans:
            raise SPDError(f"{name} has no correctness span; give it one or use loss='full'")
        joint = self.joint(example)
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
        return Encoded(ids, max(in_completion[0], 1), sorted(scored))


def _overlapping(offsets: list[tuple[int, int]], start: int, end: int) -> list[int]:
    """Tokens whose characters overlap `[start, end)`; special tokens have empty offsets and never do."""
    return [position for position, (low, high) in enumerate(offsets) if low < end and high > start and high > low]
