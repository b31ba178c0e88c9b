"""How a process's C library hands memory out, seen from outside: its resident memory."""

import subprocess
import sys

CHILD = """
import os
from pathlib import Path
from kvstore.arena import give_freed_memory_back, keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

keep_freed_memory()
before = resident()
pieces = [b"x" * (1 << 20) for _ in range(200)]
kept = pieces[50::50]  # in use between the others
del pieces
print(before, resident(), give_freed_memory_back(), resident())
"""


def test_freed_memory_is_kept_and_given_back_when_asked():
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=120, check=True)
    before, kept, can, after = child.stdout.split()
    if can == "True":
        assert int(kept) - int(before) > 150
        assert int(after) - int(before) < 30
    else:
        assert after == kept
