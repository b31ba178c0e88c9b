"""From the name that a user gives to a directory on this machine."""

from __future__ import annotations

import re
from pathlib import Path

from kvstore.errors import ConfigError

from . import default
from .directory import check

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
#: Only data: never pickled weights, never code.
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model")


def resolve_model(name: str | None) -> Path:
    """Directory of the model that `name` means, ready to load.

    Parameters
    ----------
    name : str or None
        None, an empty string or ``SmolLM2-135M-Instruct`` for the default model (fetched on first use); a directory; or a hub name
        ``org/name``, taken from the hub's local cache or fetched.

    Raises
    ------
    ConfigError
        For a directory that is no model, or a hub model that cannot be had; says which files are missing.
    """
    if not name or name == default.NAME:
        return default.fetch_default()
    path = Path(name).expanduser()
    if path.exists() or not _HUB_NAME.fullmatch(name):
        return check(path.absolute())
    return check(_from_hub(name))


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download  # seconds to import, and only this branch needs it
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES), etag_timeout=5))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"model {name!r} is no directory here and could not be fetched from the hub ({reason}); "
            "check the name and the network, or give a directory"
        ) from error
