"""``python -m services.profiles.child PARENT COMMAND …``: become `COMMAND`, politely, and not longer than the process PARENT lives.

Linux ends a process with its parent when asked to (`man 2 prctl`, PR_SET_PDEATHSIG), and keeps that over an exec; so even a worker
that is killed leaves no calibration behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
#: All that serves requests goes first.
NICE = 15


def main(parent: int, command: list[str]) -> None:
    """Does not return."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)  # it ended before we asked
    os.setpriority(os.PRIO_PROCESS, 0, max(NICE, os.getpriority(os.PRIO_PROCESS, 0)))  # Ray may have raised the worker's own
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory runs out, it is this process that ends, and not the worker
    os.execv(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
