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
from .costs import A100 as A100
from .costs import HELD_PROMPT as HELD_PROMPT
from .costs import HELD_TOKEN as HELD_TOKEN
from .costs import Costs as Costs
from .costs import Machine as Machine
from .costs import Unit as Unit
from .engine import run_study as run_study
from .findings import grades_of as grades_of
from .folder import Cell as Cell
from .folder import Study as Study
from .plan import duration as duration
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
from .shapes import Shape as Shape
from .shapes import read_shape as read_shape
from .shapes import shape_of as shape_of
from .sizes import begin_demo as begin_demo
from .sizes import machine_size as machine_size

__all__ = [
    "A100", "BACKBONES", "BASE", "Cell", "Costs", "Evidence", "FOCUS", "HELD_PROMPT", "HELD_TOKEN", "Machine",
    "Outcome", "PHASES", "RANDOM", "Report", "Shape", "Study", "StudyConfig", "Unit", "assemble", "backbone",
    "base_and_published", "base_warnings", "begin_demo", "corpora_frame", "differences_from_paper", "duration",
    "grades_of", "machine_size", "make_plan", "on_ray", "on_submitit", "preset_names", "read_shape", "results_frame",
    "run_parts", "run_study", "shape_of", "study", "workers_of",
]  # fmt: skip
