"""The Triton kernel that fits affine groups, interpreted on the CPU, against the torch code that it stands for."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.settings import environment

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

#: Runs in a process of its own: Triton decides on import whether it interprets.
PROGRAM = """
import torch
from kvstore.codecs import create, triton_fit
from tests.codec_support import LAYOUTS, make_tensors

for name in ("int4", "int2"):
    for layout in (LAYOUTS[key] for key in ("mha", "gqa fp16", "mqa fp32", "no rope, odd head", "wide head")):
        codec = create(name, layout)
        for tokens in (1, 33):
            keys, values, _ = make_tensors(layout, tokens)
            keys[0], values[0] = 0, -3.0
            keys[1, :, :, 0], values[1, :, 0] = torch.finfo(layout.dtype).max, torch.finfo(layout.dtype).min
            for x in (codec._by_channel(keys), codec._by_token(codec._rotated(values))):
                want_fit, want_codes = codec._fit(x)
                fit, codes = triton_fit.fit(x, codec.bits, codec.refits)
                assert fit.shape == want_fit.shape and codes.shape == want_codes.shape
                if codec.refits:
                    assert (fit != want_fit).float().mean() < 0.01 and (codes != want_codes).float().mean() < 0.01
                else:
                    assert torch.equal(fit.view(torch.int16), want_fit.view(torch.int16)) and torch.equal(codes, want_codes)
print("equal")
"""


def test_the_interpreted_kernel_fits_as_torch_does() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment(TRITON_INTERPRET="1"), capture_output=True, text=True, timeout=300, check=False,
        cwd=ROOT,
    )  # fmt: skip
    assert done.stdout.strip() == "equal", done.stderr[-2000:]
