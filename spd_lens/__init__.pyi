# What the face hands on, each loaded when it is first used.
from . import estimators as estimators
from . import tasks as tasks
from .errors import Guardrail as Guardrail
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
from .spans import explain as explain
from .subspaces import GradientMoments as GradientMoments
from .subspaces import Subspace as Subspace
from .subspaces import detect as detect
from .subspaces import extract as extract
from .subspaces import fold_to as fold_to
from .subspaces import folded as folded
from .subspaces import from_hub as from_hub
from .subspaces import projected as projected
from .subspaces import push_to_hub as push_to_hub
from .training import finetune as finetune

__all__ = [
    "Corpus", "EvalResult", "Example", "GradientMoments", "Guardrail", "ModelPair", "Run", "SPDConfig", "SPDError",
    "Site", "Subspace", "detect", "estimators", "evaluate", "explain", "extract", "finetune", "fold_to", "folded",
    "from_hub", "generate", "load", "projected", "protocol", "push_to_hub", "run", "tasks",
]  # fmt: skip
