# What the face hands on, each loaded when it is first used.
from .cluster import assemble as assemble
from .cluster import on_ray as on_ray
from .cluster import on_submitit as on_submitit
from .cluster import run_parts as run_parts
from .command import study as study
from .command import workers_of as workers_of
from .config import BASE as BASE
from .config import StudyConfig as StudyConfig
from .config import preset_names as preset_names
from .engine import run_study as run_study
from .findings import grades_of as grades_of
from .folder import Cell as Cell
from .folder import Study as Study
from .plan import make_plan as make_plan
from .reporting.differences import FOCUS as FOCUS
from .reporting.differences import RANDOM as RANDOM
from .reporting.evidence import Evidence as Evidence
from .reporting.evidence import Outcome as Outcome
from .reporting.published import base_and_published as base_and_published
from .reporting.published import base_warnings as base_warnings
from .reporting.report import PHASES as PHASES
from .reporting.report import Report as Report
from .reporting.setup import BACKBONES as BACKBONES
from .reporting.setup import backbone as backbone
from .reporting.setup import differences_from_paper as differences_from_paper
from .results import corpora_frame as corpora_frame
from .results import results_frame as results_frame

__all__ = [
    "BACKBONES", "BASE", "Cell", "Evidence", "FOCUS", "Outcome", "PHASES", "RANDOM", "Report", "Study",
    "StudyConfig", "assemble", "backbone", "base_and_published", "base_warnings", "corpora_frame",
    "differences_from_paper", "grades_of", "make_plan", "on_ray", "on_submitit", "preset_names", "results_frame",
    "run_parts", "run_study", "study", "workers_of",
]  # fmt: skip
