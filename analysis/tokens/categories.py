"""Which part of an example each token belongs to: template, instruction, operands, worked steps, cue, answer."""

from __future__ import annotations

import os
from collections.abc import Sequence

from spd_lens.analysis.common import pieces_of
from spd_lens.errors import SPDError
from spd_lens.examples import Example
from spd_lens.models import Loss, PromptFormat
from spd_lens.spans import Piece

CATEGORIES: dict[str, str] = {
    "first token": "position 0, on which attention rests when it has nowhere to go (the attention sink)",
    "template": "chat markup and system message",
    "instruction": "what all prompts share at their beginning or end",
    "operands": "tokens with a digit in the rest of the prompt",
    "question": "the rest of the prompt",
    "worked numbers": "tokens with a digit in the completion, before the answer",
    "worked text": "the rest of the completion, before the answer",
    "cue": "the token right before an answer, at which it is predicted",
    "answer": "scored tokens (S)",
    "after": "what follows the last answer",
}
"""Every token is in one of these. Answer and cue take precedence, then the first token, then where a token stands."""


def categories(
    examples: Sequence[Example], format: PromptFormat, loss: Loss = "aligned"
) -> list[tuple[list[Piece], list[str]]]:
    """The tokens of each example, and the category of each (keys of `CATEGORIES`).

    Instructions are the characters that all prompts have in common at their beginning or end, whole words only, and
    need at least two different prompts to be seen.
    """
    shared = _shared_ends([example.prompt for example in examples])
    found = []
    for example, pieces in zip(examples, pieces_of(examples, format, loss), strict=True):
        text = "".join(piece.text for piece in pieces)
        begin, end = _place(example.prompt, text)
        question = (begin + shared[0], end - shared[1])
        tokens, names, at = [], [], 0
        for piece in pieces:
            middle = at + len(piece.text) / 2
            at += len(piece.text)
            if piece.id is not None:
                tokens.append(piece)
                names.append(_category(piece, middle, (begin, end), question))
        names[0] = names[0] if tokens[0].scored else "first token"
        scored = [i for i, piece in enumerate(tokens) if piece.scored]
        for position in scored:
            if position and not tokens[position - 1].scored:
                names[position - 1] = "cue"
        for position in range(scored[-1] + 1, len(tokens)):
            names[position] = "after"
        found.append((tokens, names))
    return found


def _category(piece: Piece, middle: float, prompt: tuple[int, int], question: tuple[int, int]) -> str:
    digit = any(character.isdigit() for character in piece.text)
    if piece.scored:
        return "answer"
    if piece.in_completion:
        return "worked numbers" if digit else "worked text"
    if not piece.text or not prompt[0] <= middle <= prompt[1]:
        return "template"
    if not question[0] <= middle <= question[1]:
        return "instruction"
    return "operands" if digit else "question"


def _shared_ends(prompts: Sequence[str]) -> tuple[int, int]:
    """How many characters all prompts share at their beginning and at their end, up to a border between words."""
    if len(set(prompts)) < 2:
        return 0, 0
    head = os.path.commonprefix(list(prompts))
    tail = os.path.commonprefix([prompt[::-1] for prompt in prompts])[::-1]
    head = head[: max((i + 1 for i, c in enumerate(head) if c.isspace()), default=0)]
    tail = tail[min((i for i, c in enumerate(tail) if c.isspace()), default=len(tail)) :]
    shortest = min(map(len, prompts))
    return len(head), min(len(tail), shortest - len(head))


def _place(prompt: str, text: str) -> tuple[int, int]:
    """Where a prompt begins and ends in a text, whose template may have trimmed it."""
    for form in (prompt, prompt.strip()):
        if form in text:
            return text.index(form), text.index(form) + len(form)
    raise SPDError("the chat template rewrites the prompt, so its parts cannot be told apart; use format 'raw'")
