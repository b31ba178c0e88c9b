"""The flagship codec: calibrated transform, nested quantizers, rANS. `codec` has the picture.

Modules: `groups` (order of values) → `moments`, `fit`, `models` (what calibration learns) → `projection` (values ↔ coefficients) →
`ladder`, `kernels`, `rate`, `coder`, `payload` (coefficients ↔ bytes) → `codec`.
"""

from __future__ import annotations

from typing import Any

__all__ = ["TransformCodec"]


def __getattr__(name: str) -> Any:
    if name == "TransformCodec":
        from .codec import TransformCodec

        return TransformCodec
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
