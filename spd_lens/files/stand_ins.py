"""Files that stand where another should be: pointers of git-lfs, pages of failed downloads."""

from __future__ import annotations

from pathlib import Path

from spd_lens.errors import SPDError
from spd_lens.files.limits import refuse_special

_GIT_LFS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
_STAND_INS = {
    _GIT_LFS: "a git-lfs pointer, not the file itself; run `git lfs pull` there",
    (b"/annex/objects/",): "a git-annex pointer, not the file itself; run `git annex get` there",
    (b"<!doctype", b"<html"): "a web page, not the file itself: a failed download perhaps; download it again",
    (b"<?xml",): "XML, not the file itself: a failed download perhaps; download it again",
}
"""How files begin that stand where another should be."""


def refuse_stand_in(path: str | Path) -> None:
    """Raise `SPDError` where a file is not itself but a pointer of git-lfs, a failed download's page, or a pipe."""
    refuse_special(path)
    try:
        with Path(path).open("rb") as file:
            start = file.read(512).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    except OSError:
        return  # whoever reads the file says so
    for beginnings, what in _STAND_INS.items():
        if start.startswith(beginnings):
            raise SPDError(f"{path} is {what}")
