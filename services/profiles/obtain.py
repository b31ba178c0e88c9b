"""The profile of a model for a command that measures: no cluster, no background, the same places (see `keeper` for a worker's)."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from kvstore.codecs import Profile
from kvstore.layout import KVLayout
from services.model.directory import fingerprint
from services.progress import Progress

from . import local

log = logging.getLogger(__name__)


def layout_of(directory: Path, dtype: torch.dtype = torch.float32) -> KVLayout:
    """Layout of the cache of the model in `directory`, without loading it."""
    from transformers import AutoConfig

    return KVLayout.from_model_config(AutoConfig.from_pretrained(directory), dtype)


def find(directory: Path, given: str | None = None) -> Profile | None:
    """The profile in the file `given`, or else the one that this machine keeps for the model in `directory`.

    Raises
    ------
    LayoutMismatchError
        If the file is another model's.
    """
    layout = layout_of(directory)
    if given is None:
        return local.find(fingerprint(directory), layout)
    profile = Profile.load(given)
    local.check(profile, fingerprint(directory), layout)
    return profile


def obtain(directory: Path, given: str | None = None) -> Profile:
    """As `find`; where this machine keeps none, the model is calibrated now, and the profile kept."""
    profile = find(directory, given)
    if profile is None:
        from services.calibrate.run import calibrate_model

        log.warning("there is no profile of this model yet: calibrating, which takes minutes; it is kept for the next time")
        with Progress("calibrating, windows of text") as report:
            profile = calibrate_model(directory, report=report)
        local.save(profile, fingerprint(directory), layout_of(directory))
    return profile
