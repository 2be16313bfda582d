# What the face hands on, each loaded when it is first used.
from . import estimators as estimators
from . import tasks as tasks
from .errors import SPDError as SPDError
from .evaluation import EvalResult as EvalResult
from .evaluation import evaluate as evaluate
from .examples import Example as Example
from .generation import Corpus as Corpus
from .generation import generate as generate
from .models import ModelPair as ModelPair
from .models import load as load
from .protocols import protocol as protocol
from .runs import Run as Run
from .runs import SPDConfig as SPDConfig
from .runs import run as run
from .sites import Site as Site
from .subspaces import GradientMoments as GradientMoments
from .subspaces import Subspace as Subspace
from .subspaces import extract as extract
from .subspaces import fold_to as fold_to
from .subspaces import folded as folded
from .subspaces import projected as projected
from .training import finetune as finetune

__all__ = [
    "Corpus", "EvalResult", "Example", "GradientMoments", "ModelPair", "Run", "SPDConfig", "SPDError", "Site",
    "Subspace", "estimators", "evaluate", "extract", "finetune", "fold_to", "folded", "generate", "load", "projected",
    "protocol", "run", "tasks",
]  # fmt: skip
