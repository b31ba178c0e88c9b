"""Codecs: K and V of a block to bytes, and back. `CODECS` is the table; adding one is a file and a row.

::

    codec = create("int8", layout)
    block = codec.encode(keys, values, start=0)
    keys, values = codec.decode(EncodedBlock.from_bytes(block.to_bytes()))
"""

from __future__ import annotations

import importlib
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from kvstore.errors import ConfigError, LayoutMismatchError

if TYPE_CHECKING:
    from kvstore.block import EncodedBlock
    from kvstore.layout import KVLayout

    from .base import Codec, KVSample

#: Name -> (number in a block's header, "module:Class"). The class is imported on use; a number is never given to another format.
CODECS: dict[str, tuple[int, str]] = {
    "raw": (1, "kvstore.codecs.raw:RawCodec"),
    "int8": (2, "kvstore.codecs.int8:Int8Codec"),
    "int4": (3, "kvstore.codecs.int4:Int4Codec"),
    "int2": (4, "kvstore.codecs.int2:Int2Codec"),
    "fp8": (5, "kvstore.codecs.fp8:Fp8Codec"),
    "svd": (6, "kvstore.codecs.svd:SvdCodec"),
    "transform": (7, "kvstore.codecs.transform:TransformCodec"),
}

#: In the header of a block that carries a part of a profile through the store. No codec of K and V ever gets this number.
PROFILE_WIRE_ID = 0xFFFF

#: Imported on use, so that the table can be read without torch.
_LAZY = {
    "Codec": "kvstore.codecs.base",
    "EncodedBlock": "kvstore.block",
    "KVSample": "kvstore.codecs.base",
    "Profile": "kvstore.codecs.profile",
    "calibrate": "kvstore.codecs.calibration",
}

__all__ = [
    "CODECS", "PROFILE_WIRE_ID", "Codec", "EncodedBlock", "KVSample", "Profile", "calibrate", "codec_class", "codec_for_wire_id", "create",
    "name_of_wire_id", "names",
]  # fmt: skip


def names() -> tuple[str, ...]:
    """Names of all codecs, in the table's order."""
    return tuple(CODECS)


def codec_class(name: str) -> type[Codec]:
    """The class behind `name`. Raises ConfigError, naming the known ones, for any other."""
    if name not in CODECS:
        raise ConfigError(f"unknown codec {name!r}; known: {', '.join(CODECS)}")
    module, _, attribute = CODECS[name][1].partition(":")
    return getattr(importlib.import_module(module), attribute)


def codec_for_wire_id(wire_id: int) -> type[Codec]:
    """The class that wrote a block whose header says `wire_id`.

    Raises
    ------
    LayoutMismatchError
        For a number that this version does not know.
    """
    name = name_of_wire_id(wire_id)
    if name is None:
        raise LayoutMismatchError(f"codec number {wire_id} is not known to this version; known: {', '.join(CODECS)}")
    return codec_class(name)


def name_of_wire_id(wire_id: int) -> str | None:
    """Name of the codec with this number, without loading it; None for a number that this version does not know."""
    return next((name for name, (number, _) in CODECS.items() if number == wire_id), None)


def create(name: str, layout: KVLayout, profile: Any = None, **options: Any) -> Codec:
    """A codec for caches of `layout`.

    Parameters
    ----------
    name : str
        One of `names()`.
    profile : Profile, optional
        Needed by codecs with `uses_profile`, not looked at by others.
    **options
        Fields of the codec's `Config`.

    Raises
    ------
    ConfigError
        For an unknown name or option, or an impossible value.
    """
    cls = codec_class(name)
    known = [f.name for f in fields(cls.Config)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(f"codec {name!r} has no option {', '.join(unknown)}; known: {', '.join(known) or 'none'}")
    try:
        config = cls.Config(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"codec {name!r} cannot take the options {options}: {error}") from error
    return cls(layout, profile, config)


def __getattr__(attribute: str) -> Any:
    if attribute in _LAZY:
        return getattr(importlib.import_module(_LAZY[attribute]), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
