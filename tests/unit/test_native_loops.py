"""What is compiled: once a machine, never from a number that another file may change, and in bounded memory."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.codecs import names
from kvstore.settings import environment

ROOT = Path(__file__).resolve().parents[2]
MODULES = ["kernels.py", "entropy/rans.py", "transform/kernels.py", "transform/rows.py"]
#: Conversions between float formats have one right answer, so nothing compiled from them goes out of date.
TIMELESS = {"bits_of", "float_of", "narrowed", "widened"}


def is_compiled(function: ast.stmt) -> bool:
    return isinstance(function, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in function.decorator_list)


@pytest.mark.parametrize("module", MODULES)
def test_compiled_functions_use_no_name_of_another_module_of_ours(module):
    """numba's cache on disk looks at a function's own file alone: a constant from elsewhere would stay as it was."""
    tree = ast.parse((ROOT / "kvstore/codecs" / module).read_text())
    ours = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("kvstore"))
        for alias in node.names
    }
    compiled = [node for node in tree.body if is_compiled(node)]
    assert compiled
    for function in compiled:
        used = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}
        assert not used & (ours - TIMELESS), f"{function.name} must get these as arguments"


CODE_ALL = """
import json, sys
from kvstore.codecs import names
from tests.codec_support import LAYOUTS, make_codec, make_tensors

layout = LAYOUTS["gqa fp16"]
for name in names():
    codec = make_codec(name, layout)
    for start in (0, 64):
        keys, values, ids = make_tensors(layout, 24, 1, start)
        codec.decode(codec.encode(keys, values, start=start, tokens=ids), tokens=ids)
loops = [f for m in list(sys.modules.values()) if m.__name__.startswith("kvstore.codecs") for f in vars(m).values() if hasattr(f, "stats")]
print(json.dumps({f.py_func.__name__: sum(f.stats.cache_misses.values()) for f in loops}))
"""


def test_a_second_process_compiles_nothing(tmp_path):
    missed = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", CODE_ALL], env=environment(NUMBA_CACHE_DIR=str(tmp_path)), capture_output=True, text=True, timeout=300,
            check=True, cwd=ROOT,
        )  # fmt: skip
        missed.append(json.loads(done.stdout))
    assert sum(missed[0].values()) > 0 == sum(missed[1].values())


MEMORY = """
import json, torch
from pathlib import Path
from kvstore.codecs import KVSample, calibrate, codec_class, create, names
from kvstore.layout import KVLayout
from tests.codec_support import VOCABULARY, make_tensors, rope

def resident(key):
    return next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))

torch.set_num_threads(2)
layout, tokens, blocks = KVLayout(16, 2, 64, torch.bfloat16, rope(64)), 64, 64
samples = [KVSample(*make_tensors(layout, 48, i)[:2], 0, make_tensors(layout, 48, i)[2]) for i in range(4)]
profile = calibrate(layout, samples, torch.randn(VOCABULARY, 8), groups=8)
parts = [make_tensors(layout, tokens, 5, tokens * i) for i in range(blocks)]
keys, values, ids = (torch.stack(column) for column in zip(*parts))
out, extra = (torch.empty_like(keys), torch.empty_like(values)), {}
for name in names():
    codec = create(name, layout, profile)
    encoded = codec.encode(keys, values, start=[tokens * i for i in range(blocks)], tokens=ids)
    for _ in range(2):
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        codec.decode(encoded, tokens=ids, out=out)
        extra[name] = (resident("VmHWM") - before) / layout.raw_bytes(tokens * blocks)
print(json.dumps(extra))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak memory counter")
def test_decoding_takes_less_memory_beside_the_result_than_twice_the_result():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=300, check=True, cwd=ROOT)
    extra = json.loads(done.stdout)
    assert set(extra) == set(names()) and max(extra.values()) < 2.0, extra
