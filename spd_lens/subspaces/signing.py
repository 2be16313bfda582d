"""Signatures of what is published: made with a private key, checked with its public half, by OpenSSF's model-signing.

They say who published files, which no digest in them can: whoever changes a file writes a new digest too.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spd_lens.errors import SPDError, caution, one_line

SIGNATURE = "model.sig"
"""The name of a signature's file, beside what it signs."""


def sign(folder: Path, files: Iterable[str], key: str | Path) -> None:
    """Write a signature of these files of a folder, with a private key on an elliptic curve (PEM, as OpenSSL makes).

    Raises:
        SPDError: the key cannot be read, or model-signing is not installed.
    """
    signing = _library().signing
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=Path(key))
        config.set_hashing_config(_only(folder, files)).sign(folder, folder / SIGNATURE)
    except Exception as error:  # of several libraries, which have no class in common
        raise SPDError(
            f"nothing can be signed with {key}: {one_line(error, 200)}; give a private key on an elliptic curve in "
            "PEM, without a password ('openssl ecparam -genkey -name prime256v1 -noout -out KEY')"
        ) from error


def check_signature(folder: Path, files: Iterable[str], key: str | Path | None) -> None:
    """Refuse files whose signature is not by the owner of a key; without a key, say that there is one.

    Args:
        folder: Where the files are, and the signature beside them.
        files: Those that count. One that is not signed is refused as a changed one is.
        key: The publisher's public key (PEM), which comes from elsewhere than the files.

    Raises:
        SPDError: a key is given, and the files are not signed, or not as they are, or not with its private half.
    """
    signature = folder / SIGNATURE
    if key is None:
        if signature.is_file():
            caution("signed, but by whom was not checked: give the publisher's public key (key, --key)")
        return
    if not signature.is_file():
        raise SPDError(f"nothing says who published it: there is no {SIGNATURE}; leave out the key to take it as it is")
    if not Path(key).is_file():
        raise SPDError(f"{key} is no file; give the publisher's public key in PEM")
    verifying = _library().verifying
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=Path(key))
        config.set_hashing_config(_only(folder, files)).verify(folder, signature)
    except Exception as error:  # whatever goes wrong, it was not verified
        raise SPDError(
            f"its signature is not that of {key} over the files as they are: {one_line(error, 200)}; do not use it"
        ) from error


def _only(folder: Path, files: Iterable[str]) -> Any:
    """How files are hashed: all others are left out, and the links of the hub's cache are followed."""
    known = set(files)
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    others = [path for path in paths if path.as_posix() not in known]
    config = _library().hashing.Config().set_allow_symlinks(True)
    return config.set_ignored_paths(paths=others, ignore_git_paths=False)


def _library() -> Any:
    try:
        import model_signing
    except ImportError as error:
        raise SPDError("signatures need model-signing: pip install 'spd-lens[signing]'") from error
    return model_signing
