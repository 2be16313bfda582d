"""Text to tokens: prompt formats, joint tokenisation and the token positions that decide correctness."""

from __future__ import annotations

from dataclasses import dataclass
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

    @classmethod
    def choose(cls, tokenizer: Any, name: str = "auto", system: str | None = None) -> PromptFormat:
        """`"auto"` is `chat` where the tokenizer has a template, else `raw`."""
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
        return cls(tokenizer, chat=has_template if name == "auto" else name == "chat", system=system)

    @property
    def name(self) -> str:
        return "chat" if self.chat else "raw"

    def text(self, prompt: str) -> str:
        """The prompt as text, ready for the completion to follow."""
        if not self.chat:
            return f"{prompt}\n"
        messages = [{"role": "user", "content": prompt}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

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
