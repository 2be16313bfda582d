"""The vocabulary of the synthetic word problems: names, scenes, and how each scene tells that an amount changes."""

from __future__ import annotations

from dataclasses import dataclass

NAMES = (
    "Aisha Amara Ana Anton Bea Ben Carla Chen Clara Dana David Elif Emma Farid Felix Fiona Grace Hana Hugo Ines Ivan "
    "Jack Jamal Jonas Julia Kai Karim Kofi Lara Leo Lin Lucia Maja Marco Maria Mateo Maya Mei Mina Nadia Nils Noah "
    "Nora Olga Omar Paul Petra Priya Rafael Rosa Ruth Sam Sara Sofia Tariq Tess Tom Uma Vera Victor Yara Yusuf Zoe"
).split()


@dataclass(frozen=True)
class Scene:
    """One setting. `{who}`, `{friend}` and `{unit}` are filled in, `{n}` and `{k}` are the numbers."""

    units: tuple[str, ...]
    start: str
    groups: str
    """Opening with `k` equal groups of `n`."""
    gains: tuple[str, ...]
    losses: tuple[str, ...]
    asks: tuple[str, ...] = ("How many {unit} does {who} have now?", "How many {unit} does {who} have in the end?")
    place: str = ""
    """Where the things are, if nobody has them; what somebody has can be compared and shared."""

    def step(self, when: str) -> str:
        """The worked step that says how many things there are, at first or now."""
        return f"{when} " + (f"there are {{work}} {{unit}} {self.place}." if self.place else "{who} has {work} {unit}.")


SCENES = (
    Scene(
        units=("marbles", "stickers", "stamps", "shells", "beads", "buttons", "postcards", "trading cards"),
        start="{who} has {n} {unit} in a collection.",
        groups="{who} keeps {unit} in {k} boxes, with {n} {unit} in each box.",
        gains=(
            "{friend} gives {who} {n} more {unit}.",
            "{who} finds {n} {unit} at a flea market and adds them.",
            "For a birthday, {who} gets another {n} {unit}.",
        ),
        losses=(
            "{who} gives {n} {unit} to {friend}.",
            "{who} loses {n} of the {unit}.",
            "{who} trades {n} {unit} away for a book.",
        ),
    ),
    Scene(
        units=("cookies", "muffins", "pancakes", "bread rolls", "dumplings", "pretzels"),
        start="{who} bakes {n} {unit} in the morning.",
        groups="{who} bakes {k} trays of {unit}, with {n} {unit} on each tray.",
        gains=(
            "In the afternoon {who} bakes {n} more {unit}.",
            "{friend} brings {n} {unit} along.",
            "Then {who} makes another batch of {n} {unit}.",
        ),
        losses=(
            "The family eats {n} of the {unit}.",
            "{who} sells {n} {unit} at the school fair.",
            "{n} of the {unit} get burnt and are thrown away.",
        ),
        asks=("How many {unit} does {who} have left now?", *Scene.asks),
    ),
    Scene(
        units=("apples", "pears", "plums", "oranges", "peaches", "lemons"),
        start="{who} picks {n} {unit} in the orchard.",
        groups="{who} fills {k} baskets in the orchard, with {n} {unit} in each basket.",
        gains=(
            "After lunch {who} picks {n} more {unit}.",
            "{friend} adds {n} {unit} to the pile.",
            "A neighbor brings {who} {n} more {unit}.",
        ),
        losses=(
            "{who} gives {n} {unit} to a neighbor.",
            "{who} uses {n} {unit} to make jam.",
            "{n} of the {unit} turn out to be rotten and are thrown away.",
        ),
    ),
    Scene(
        units=("dollars",),
        start="{who} has saved {n} {unit}.",
        groups="{who} works for {k} hours and is paid {n} {unit} for each hour.",
        gains=(
            "{who} earns {n} {unit} by mowing a lawn.",
            "{who} is given {n} {unit} by an aunt.",
            "{who} sells an old bike and gets {n} {unit} for it.",
        ),
        losses=(
            "{who} spends {n} {unit} on a game.",
            "{who} pays {n} {unit} for a bus ticket.",
            "{who} lends {n} {unit} to {friend}.",
        ),
    ),
    Scene(
        units=("hens", "sheep", "goats", "ducks", "rabbits"),
        start="{who} keeps {n} {unit} on a farm.",
        groups="On the farm of {who} there are {k} pens with {n} {unit} in each pen.",
        gains=(
            "{who} buys {n} more {unit}.",
            "In spring, {n} young {unit} are born.",
            "{friend} gives {who} {n} {unit}.",
        ),
        losses=("{who} sells {n} {unit}.", "{n} of the {unit} run away.", "{who} gives {n} {unit} to another farm."),
    ),
    Scene(
        units=("books", "comics", "magazines", "puzzles", "board games"),
        start="{who} has {n} {unit} on a shelf.",
        groups="{who} has {k} shelves with {n} {unit} on each shelf.",
        gains=(
            "{who} buys {n} more {unit}.",
            "{friend} returns {n} {unit} that belong to {who}.",
            "{who} puts {n} new {unit} on the shelf.",
        ),
        losses=(
            "{who} lends {n} {unit} to {friend}.",
            "{who} donates {n} {unit} to the library.",
            "{who} takes {n} {unit} off the shelf and sells them.",
        ),
    ),
    Scene(
        units=("passengers", "tourists", "students", "workers"),
        start="There are {n} {unit} on a bus that {who} drives.",
        groups="{who} drives a tram with {k} cars, and there are {n} {unit} in each car.",
        gains=("At the next stop {n} {unit} get on.", "At the market {n} more {unit} get on."),
        losses=("At the next stop {n} {unit} get off.", "At the station {n} of the {unit} get off."),
        asks=("How many {unit} are on board now?", "How many {unit} is {who} driving now?"),
        place="on board",
    ),
    Scene(
        units=("liters of water", "liters of milk", "liters of juice"),
        start="{who} fills a tank with {n} {unit}.",
        groups="{who} empties {k} cans into a tank, and each can holds {n} {unit}.",
        gains=("{who} pours in {n} more {unit}.", "{friend} adds {n} {unit}."),
        losses=("Then {n} {unit} leak out.", "{friend} takes out {n} {unit}."),
        asks=("How many {unit} are in the tank now?", "How many {unit} does the tank hold in the end?"),
        place="in the tank",
    ),
    Scene(
        units=("roses", "tulips", "daisies", "sunflowers", "lilies"),
        start="{who} plants {n} {unit} in the garden.",
        groups="{who} plants {k} rows of {unit}, with {n} {unit} in each row.",
        gains=("The next day {who} plants {n} more {unit}.", "{friend} plants {n} {unit} there as well."),
        losses=("{who} cuts {n} {unit} for a vase.", "A storm breaks {n} of the {unit}."),
        asks=("How many {unit} are in the garden now?", "How many {unit} are left standing in the garden?"),
        place="in the garden",
    ),
)
