"""Multiple-choice questions made from templates over common knowledge, numbers and letters: no data needed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import ClassVar

from spd_lens.examples import Example
from spd_lens.tasks.forms import ChosenLetter
from spd_lens.tasks.synthetic import SyntheticTask

KINDS = {
    "an animal": "cat horse tiger rabbit eagle salmon elephant sheep wolf frog camel monkey goose lizard whale".split(),
    "a fruit": "apple banana cherry mango grape peach pear plum lemon melon apricot papaya kiwi fig".split(),
    "a color": "red blue green yellow purple brown pink gray white black turquoise beige crimson".split(),
    "a tool": "hammer saw drill wrench screwdriver pliers chisel shovel axe rake sickle crowbar".split(),
    "a vehicle": "car bus truck bicycle tram airplane ship tractor motorcycle van ferry helicopter".split(),
    "a piece of furniture": "table chair sofa wardrobe desk bookshelf stool bench cupboard armchair dresser".split(),
    "a musical instrument": "piano violin guitar flute trumpet drum cello harp clarinet banjo trombone oboe".split(),
    "a part of the body": "arm knee elbow shoulder finger ankle neck thumb hip wrist heel forehead".split(),
    "a piece of clothing": "shirt coat hat scarf glove skirt sweater sock jacket dress trousers vest".split(),
    "a profession": "doctor teacher baker carpenter lawyer pilot nurse plumber farmer tailor architect dentist".split(),
    "a vegetable": "carrot potato onion cabbage spinach broccoli leek radish turnip celery cauliflower".split(),
    "a country": "France Brazil Japan Egypt Canada Norway Kenya India Peru Poland Mexico Vietnam Greece".split(),
}
OPPOSITES = [
    tuple(pair.split("/"))
    for pair in (
        "hot/cold big/small fast/slow old/young light/heavy early/late rich/poor full/empty hard/soft wet/dry "
        "strong/weak high/low open/closed happy/sad clean/dirty long/short near/far loud/quiet deep/shallow "
        "thick/thin sharp/blunt wide/narrow brave/cowardly ancient/modern rough/smooth cheap/expensive tight/loose"
    ).split()
]

Question = tuple[str, str, list[str]]
"""A question, the right choice, three wrong ones."""


@dataclass(kw_only=True)
class SyntheticQA(ChosenLetter, SyntheticTask):
    """easy: kinds of things, opposites, the largest of four numbers; medium: the odd one out, alphabetical order,
    sequences; hard: alphabetical order from behind, sums, sequences with growing steps."""

    name: ClassVar[str] = "synthetic-qa"
    generator: ClassVar[str] = "12ea09c9661ec0604e0c6da9f7d3f2e8f72e27f953dee8e15780eefad67b8bb1"

    max_new_tokens: int = 24

    def make(self, rng: random.Random) -> Example:
        question, right, wrong = rng.choice(_MAKERS[self.difficulty])(rng)
        choices = [right, *wrong]
        rng.shuffle(choices)
        return self.example("", question, choices, choices.index(right))


def _kind(rng: random.Random) -> Question:
    kind, *others = rng.sample(sorted(KINDS), 4)
    question = rng.choice(["Which of these is {}?", "Which of the following words names {}?"]).format(kind)
    return question, rng.choice(KINDS[kind]), [rng.choice(KINDS[other]) for other in others]


def _odd_one_out(rng: random.Random) -> Question:
    kind, other = rng.sample(sorted(KINDS), 2)
    question = f"Three of these are of the same sort. Which one is not {kind}?"
    return question, rng.choice(KINDS[other]), rng.sample(KINDS[kind], 3)


def _opposite(rng: random.Random) -> Question:
    word, right = rng.sample(rng.choice(OPPOSITES), 2)
    others = [other for pair in OPPOSITES if word not in pair for other in pair]
    return f"Which word is the opposite of '{word}'?", right, rng.sample(others, 3)


def _extreme(rng: random.Random) -> Question:
    numbers = rng.sample(range(10, 1000), 4)
    largest = rng.random() < 0.5
    right = max(numbers) if largest else min(numbers)
    question = f"Which of these numbers is the {'largest' if largest else 'smallest'}?"
    return question, str(right), [str(number) for number in numbers if number != right]


def _alphabet(rng: random.Random, first: bool) -> Question:
    words = rng.sample(sorted({word.lower() for kind in KINDS.values() for word in kind}), 4)
    right = min(words) if first else max(words)
    question = f"Which of these words comes {'first' if first else 'last'} in alphabetical order?"
    return question, right, [word for word in words if word != right]


def _sequence(rng: random.Random, growing: bool) -> Question:
    start, step = rng.randint(1, 60), rng.randint(2, 15)
    growth = rng.randint(1, 5) if growing else 0
    *shown, right = accumulate((step + index * growth for index in range(5)), initial=start)
    wrong = rng.sample([right + d for d in sorted({-10, -step, -2, -1, 1, 2, step + 1, 10})], 3)
    question = f"Which number comes next: {', '.join(map(str, shown))}?"
    return question, str(right), [str(number) for number in wrong]


def _sum(rng: random.Random) -> Question:
    one, other = rng.randint(12, 489), rng.randint(12, 489)
    right = one + other
    wrong = rng.sample([right + difference for difference in (-100, -20, -10, -2, -1, 1, 2, 10, 20, 100)], 3)
    return f"What is {one} + {other}?", str(right), [str(number) for number in wrong]


_MAKERS: dict[str, tuple[Callable[[random.Random], Question], ...]] = {
    "easy": (_kind, _opposite, _extreme),
    "medium": (_odd_one_out, partial(_alphabet, first=True), partial(_sequence, growing=False)),
    "hard": (partial(_alphabet, first=False), _sum, partial(_sequence, growing=True)),
}
