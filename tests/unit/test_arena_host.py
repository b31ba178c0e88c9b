"""How a process's C library hands memory out, seen from outside: its resident memory."""

import subprocess
import sys

import pytest

CHILD = """
import os
import sys
import threading
from pathlib import Path
from kvstore.arena import give_freed_memory_back, keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

def burst():
    pieces = [b"x" * (1 << 20) for _ in range(200)]
    kept.extend(pieces[50::50])  # in use between the others

keep_freed_memory()
before, kept = resident(), []
threads = [threading.Thread(target=burst) for _ in range(int(sys.argv[1]))]
for thread in threads:
    thread.start()
    thread.join()
if not threads:
    burst()
print(before, resident(), give_freed_memory_back(), resident())
"""


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_freed_memory_is_kept_and_given_back_when_asked(threads: int) -> None:
    command = [sys.executable, "-c", CHILD, str(threads)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    before, kept, can, after = child.stdout.split()
    if can == "True":
        assert int(kept) - int(before) > 150
        assert int(after) - int(before) < 30
    else:
        assert after == kept
