"""Profiles as files: ``cache_dir()/profiles/<model fingerprint>-<layout digest>.kvp``."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from kvstore.codecs import Profile
from kvstore.codecs.profile import shape_of
from kvstore.errors import ConcertinaError, LayoutMismatchError
from kvstore.identity import digest
from kvstore.layout import KVLayout
from kvstore.settings import cache_dir

log = logging.getLogger(__name__)


def name_of(fingerprint: str, layout: KVLayout) -> str:
    """What a profile belongs to: the model, and the shape and rotation of its cache (the dtype does not matter)."""
    return f"{fingerprint}-{digest(*(str(part).encode() for part in shape_of(layout))).hex()}"


def path_of(fingerprint: str, layout: KVLayout) -> Path:
    """Where the profile of a model is kept on this machine."""
    return cache_dir() / "profiles" / f"{name_of(fingerprint, layout)}.kvp"


def check(profile: Profile, fingerprint: str, layout: KVLayout) -> None:
    """Raise LayoutMismatchError for a profile that was made for another model, shape or rotation."""
    profile.check(layout)
    made_for = profile.facts.get("model", fingerprint)
    if made_for != fingerprint:
        raise LayoutMismatchError(f"the profile was made for model {made_for}, this one is {fingerprint}; calibrate this model")


def find(fingerprint: str, layout: KVLayout) -> Profile | None:
    """The profile of a model, if this machine has one. A file that is damaged, or of another version, is as good as none."""
    path = path_of(fingerprint, layout)
    if not path.is_file():
        return None
    try:
        profile = Profile.load(path)
        check(profile, fingerprint, layout)
    except ConcertinaError as error:
        log.warning("%s is not used: %s", path, error)
        return None
    return profile


def save(profile: Profile, fingerprint: str, layout: KVLayout) -> None:
    """Keep a profile on this machine. A disk that is full or read-only is logged: the profile works without its file."""
    try:
        with draft_of(path_of(fingerprint, layout)) as draft:
            profile.save(draft)
    except OSError as error:
        log.warning("the profile is not kept on this machine: %s", error)


@contextlib.contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place at the end; whoever else writes meanwhile has a path of their own.

    Nothing is left of it when the block is left by an exception.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.stem[:16]}-{os.getpid()}-{secrets.token_hex(4)}.draft")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
