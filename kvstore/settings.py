"""The one place that reads the environment, and the parser of sizes.

A component declares a frozen ``Config`` dataclass; `load` fills it from ``CONCERTINA_<PART>__<FIELD>`` and explicit overrides.
An unknown key is an error.
"""

from __future__ import annotations

import os
import re
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from .errors import ConfigError

C = TypeVar("C")
_UNITS = {"": 1, "B": 1} | {
    prefix + unit: base**power
    for power, prefix in enumerate("KMGT", 1)
    for unit, base in (("", 1000), ("B", 1000), ("IB", 1024))
}


def parse_size(text: str | int) -> int:
    """Bytes of ``"256MiB"``, ``"1.5 GiB"`` or a plain number. Raises ConfigError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if not match or match[2].upper() not in _UNITS:
        raise ConfigError(f"{text!r} is no size; write it as 256MiB, 1.5GiB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def format_size(size_bytes: float) -> str:
    """`size_bytes` for people: ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size_bytes) < 1024 or unit == "GiB":
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    raise AssertionError("unreachable")


def load(config: type[C], part: str, **overrides: Any) -> C:
    """An instance of the dataclass `config`: defaults, then the environment, then `overrides` that are not None.

    Raises
    ------
    ConfigError
        For an environment variable of this part that names no field, or a value of the wrong type.
    """
    hints = typing.get_type_hints(config)
    known = {f.name for f in fields(config)}  # type: ignore[arg-type]
    prefix = f"CONCERTINA_{part.upper()}__"
    values: dict[str, Any] = {}
    for name, text in os.environ.items():
        if name.startswith(prefix):
            field = name[len(prefix) :].lower()
            if field not in known:
                raise ConfigError(f"{name} names no setting of {part}; known: {', '.join(sorted(known))}")
            values[field] = _convert(name, text, hints[field])
    values |= {k: v for k, v in overrides.items() if v is not None}
    unknown = set(values) - known
    if unknown:
        raise ConfigError(f"unknown setting of {part}: {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
    return config(**values)


def _convert(name: str, text: str, hint: Any) -> Any:
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    if options:  # ``int | None`` takes what ``int`` takes
        hint = options[0]
    try:
        if hint is bool:
            return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
        if hint is int:
            return parse_size(text)
        return hint(text) if hint in (float, str) else text
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{name}={text!r} is not a valid {getattr(hint, '__name__', hint)}") from error


def environment(**extra: str) -> dict[str, str]:
    """A copy of the process's environment with `extra`, for child processes."""
    return {**os.environ, **extra}


def set_environment(values: dict[str, str]) -> None:
    """Set variables for libraries that read the environment when they are imported. Only the program of a process calls this."""
    os.environ.update(values)


def cache_dir() -> Path:
    """Where models and profiles are kept: ``${XDG_CACHE_HOME:-~/.cache}/concertina``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "concertina"


def state_dir() -> Path:
    """Where running systems are recorded: ``${XDG_STATE_HOME:-~/.local/state}/concertina``."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "concertina"
