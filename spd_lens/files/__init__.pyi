# What the face hands on, each loaded when it is first used.
from .contents import holding as holding
from .contents import is_made as is_made
from .contents import load_tensors as load_tensors
from .contents import note_undigested as note_undigested
from .contents import read_json as read_json
from .contents import reading as reading
from .contents import save_tensors as save_tensors
from .contents import update_text as update_text
from .contents import write_json as write_json
from .contents import write_text as write_text
from .digests import canonical as canonical
from .digests import signed as signed
from .limits import refuse_special as refuse_special
from .manifest import MANIFEST as MANIFEST
from .manifest import Manifest as Manifest
from .manifest import check_recorded as check_recorded
from .manifest import forget as forget
from .manifest import hash_again as hash_again
from .manifest import record_files as record_files
from .publishing import check_writable as check_writable
from .publishing import damage as damage
from .publishing import file_sha256 as file_sha256
from .publishing import filling as filling
from .publishing import inventory as inventory
from .publishing import is_blank as is_blank
from .publishing import is_free as is_free
from .publishing import make_directory as make_directory
from .publishing import occupants as occupants
from .publishing import publish as publish
from .publishing import refuse_linked as refuse_linked
from .publishing import replacing as replacing
from .publishing import scratch_directory as scratch_directory
from .publishing import sync as sync
from .publishing import unreadable_weights as unreadable_weights
from .schemas import STRICT as STRICT
from .schemas import Loss as Loss
from .schemas import Schema as Schema
from .schemas import fitting as fitting
from .stand_ins import refuse_stand_in as refuse_stand_in
from .store import Store as Store
from .tables import read_csv as read_csv

__all__ = [
    "Loss", "MANIFEST", "Manifest", "STRICT", "Schema", "Store", "canonical", "check_recorded", "check_writable",
    "damage", "file_sha256", "filling", "fitting", "forget", "hash_again", "holding", "inventory", "is_blank",
    "is_free", "is_made", "load_tensors", "make_directory", "note_undigested", "occupants", "publish", "read_csv",
    "read_json", "reading", "record_files", "refuse_linked", "refuse_special", "refuse_stand_in", "replacing",
    "save_tensors", "scratch_directory", "signed", "sync", "unreadable_weights", "update_text",
    "write_json", "write_text",
]  # fmt: skip
