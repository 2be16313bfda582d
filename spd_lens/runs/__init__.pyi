# What the face hands on, each loaded when it is first used.
from .artefacts import Artefacts as Artefacts
from .comparison import FORCED as FORCED
from .comparison import MEASURES as MEASURES
from .comparison import compare as compare
from .comparison import comparison_table as comparison_table
from .config import DEMO_SIZES as DEMO_SIZES
from .config import Size as Size
from .config import SPDConfig as SPDConfig
from .config import differ as differ
from .config import items_of as items_of
from .config import named as named
from .config import one_protocol as one_protocol
from .config import protocol_in_words as protocol_in_words
from .config import read_kept as read_kept
from .config import read_yaml as read_yaml
from .config import result_name as result_name
from .config import to_yaml as to_yaml
from .config import validated as validated
from .context_limit import fitted as fitted
from .context_limit import in_words as in_words
from .experiment import Experiment as Experiment
from .experiment import examples_digest as examples_digest
from .findings import contrasts as contrasts
from .findings import made_by as made_by
from .findings import run_findings as run_findings
from .findings import stored as stored
from .findings import write_card as write_card
from .findings import write_evidence as write_evidence
from .guardrails import check_base as check_base
from .guardrails import check_halves as check_halves
from .guardrails import check_items as check_items
from .loading import allow_execution as allow_execution
from .loading import decided_by as decided_by
from .loading import load_pair as load_pair
from .loading import make_tasks as make_tasks
from .loading import ready_pair as ready_pair
from .model_check import MOMENTS_TOLERANCE as MOMENTS_TOLERANCE
from .model_check import print_report as print_report
from .pipeline import N_OTHER as N_OTHER
from .pipeline import run as run
from .plain_yaml import parse_yaml as parse_yaml
from .preflight import check_data as check_data
from .preflight import check_model as check_model
from .preflight import check_settings as check_settings
from .preflight import check_stage as check_stage
from .round_drift import StopRule as StopRule
from .round_drift import say as say
from .rounds import run_rounds as run_rounds
from .run_dir import Folder as Folder
from .run_dir import Notes as Notes
from .run_dir import Run as Run
from .run_dir import environment as environment
from .stages import Step as Step
from .stages import note_start as note_start
from .stages import score as score
from .stages import work as work
from .summary import quoted as quoted
from .verification import Verified as Verified
from .verification import verify as verify

__all__ = [
    "Artefacts", "DEMO_SIZES", "Experiment", "FORCED", "Folder", "MEASURES", "MOMENTS_TOLERANCE", "N_OTHER", "Notes",
    "Run", "SPDConfig", "Size", "Step", "StopRule", "Verified", "allow_execution", "check_base", "check_data",
    "check_halves", "check_items", "check_model", "check_settings", "check_stage", "compare", "comparison_table",
    "contrasts", "decided_by", "differ", "environment", "examples_digest", "fitted", "in_words", "items_of",
    "load_pair", "made_by", "make_tasks", "named", "note_start", "one_protocol", "parse_yaml", "print_report",
    "protocol_in_words", "quoted", "read_kept", "read_yaml", "ready_pair", "result_name", "run", "run_findings",
    "run_rounds", "say", "score", "stored", "to_yaml", "validated", "verify", "work", "write_card", "write_evidence",
]  # fmt: skip
