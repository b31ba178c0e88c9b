"""Real systems for the integration tests: brought up by the command line, in a state directory of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

MARK = "CONCERTINA_UP"


class Cli:
    """``concertina`` as a user types it, with `state` as XDG_STATE_HOME."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.environment = {**os.environ, "XDG_STATE_HOME": str(state)}

    def start(self, *arguments: str, **options) -> subprocess.Popen:
        command = [sys.executable, "-m", "services.cli", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        return subprocess.Popen(command, env=self.environment, text=True, stdin=subprocess.DEVNULL, **pipes)

    def run(self, *arguments: str, timeout_s: float = 240) -> subprocess.CompletedProcess:
        process = self.start(*arguments)
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.communicate()
            raise
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def json(self, *arguments: str, timeout_s: float = 240):
        done = self.run(*arguments, "--json", timeout_s=timeout_s)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def marker(self, name: str) -> str:
        return json.loads((self.state / "concertina" / name / "system.json").read_text())["marker"]


def marked(prefix: str) -> list[psutil.Process]:
    """Living processes whose mark begins with `prefix`, found without the help of what is tested."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK, "").startswith(prefix):
                found.append(process)
        except psutil.Error:
            continue
    return found


def valkeys(state: Path) -> list[psutil.Process]:
    """Valkeys that were started below `state`."""
    return [p for p in psutil.process_iter() if "valkey-server" in (line := " ".join(_words(p))) and str(state) in line]


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def until(condition, timeout_s: float = 30.0, what: str = "condition"):
    """Wait until `condition()` is true and give its value."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not come within {timeout_s} s"
        time.sleep(0.05)
    return value
