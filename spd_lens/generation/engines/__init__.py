"""Ways to turn prompts into completions, by name; `base` says what one is."""

from spd_lens.generation.engines.base import Engine, Run
from spd_lens.generation.engines.greedy_probe import GreedyProbe, OtherPolicy
from spd_lens.generation.engines.registry import chosen, find, names, register
from spd_lens.generation.engines.twin import complete, fitting, plain_batch, twin_engine

__all__ = [
    "Engine", "GreedyProbe", "OtherPolicy", "Run", "chosen", "complete", "find", "fitting", "names", "plain_batch",
    "register", "twin_engine",
]  # fmt: skip
