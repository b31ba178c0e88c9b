"""What is known of a running system, as one JSON file that survives the command that wrote it.

It is written before each process is started, so that `down` finds everything even after a crash of `up`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kvstore.errors import ConfigError, NotFoundError
from kvstore.settings import state_dir

DEFAULT_NAME = "default"
STARTING, UP = "starting", "up"
_CONSOLE = "console.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """One process: which part it is, and when it began (seconds since the epoch), since pids are used again."""

    part: str
    pid: int
    started: float


@dataclass(slots=True)
class SystemRecord:
    """One system.

    Parameters
    ----------
    name : str
    marker : str
        Value of ``CONCERTINA_UP`` in the environment of each of its processes.
    phase : str
        `STARTING` until all parts are ready, then `UP`.
    owner : ProcessRecord or None
        The `up` that starts it or, in the foreground, stays with it.
    processes : list of ProcessRecord
        In the order of their start.
    inference : str or None
        ``host:port`` of the workers' gRPC.
    http : str or None
        URL of their HTTP.
    """

    name: str
    marker: str
    phase: str = STARTING
    owner: ProcessRecord | None = None
    processes: list[ProcessRecord] = field(default_factory=list)
    inference: str | None = None
    http: str | None = None
    redis: str | None = None
    model: str | None = None
    codec: str | None = None

    @property
    def directory(self) -> Path:
        """Holds the record, the logs and Valkey's files."""
        return directory_of(self.name)

    @property
    def logs(self) -> Path:
        return self.directory / "logs"

    @property
    def redis_directory(self) -> Path:
        """Valkey's own, where `up` starts one."""
        return (self.directory / "redis").resolve()

    @property
    def ports(self) -> set[int]:
        """Ports on this machine that it has or is about to have."""
        return {int(port) for text in (self.inference, self.http, self.redis) if text and (port := _port_of(text))}

    @property
    def scratch(self) -> Path:
        """Holds a directory for each Ray; short, because of the sockets below it."""
        return Path("/tmp") / f"cct-{self.marker[-8:]}"

    def save(self) -> None:
        """Write at once or not at all."""
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = self.directory / "system.json.new"
        draft.write_text(json.dumps(dataclasses.asdict(self), indent=1))
        draft.replace(self.directory / "system.json")

    def remove(self) -> None:
        """Forget the system: its record, logs and scratch files."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        shutil.rmtree(self.directory, ignore_errors=True)


def new_record(name: str) -> SystemRecord:
    """An empty record with a marker of its own."""
    return SystemRecord(name=name, marker=f"{name}-{secrets.token_hex(4)}")


def directory_of(name: str) -> Path:
    """Raises ConfigError for a name that is no good as one."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"--name {name!r} must be 1 to 40 letters, digits, dots, dashes or underscores")
    return state_dir() / name


def load(name: str) -> SystemRecord | None:
    """The record of `name`; None where there is none. Raises ConfigError for a file that is damaged."""
    path = directory_of(name) / "system.json"
    try:
        values = json.loads(path.read_text())
        values["processes"] = [ProcessRecord(**p) for p in values["processes"]]
        values["owner"] = ProcessRecord(**values["owner"]) if values["owner"] else None
        return SystemRecord(**values)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is damaged ({error}); end its processes yourself and remove {path.parent}") from error


def note_console(system: SystemRecord, url: str | None) -> None:
    """Write down where the web page of `system` is, beside its record, by the process that serves it; None when it ends."""
    path = system.directory / _CONSOLE
    if url is None:
        path.unlink(missing_ok=True)
    elif path.parent.is_dir():
        path.write_text(json.dumps({"url": url, "pid": os.getpid()}))


def console_of(system: SystemRecord) -> str | None:
    """Its web page, if one is being served."""
    try:
        noted = json.loads((system.directory / _CONSOLE).read_text())
        os.kill(noted["pid"], 0)
        return noted["url"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def require(name: str) -> SystemRecord:
    """The record of a system that is up. Raises NotFoundError, naming those that are."""
    record = load(name)
    if record is None:
        others = names()
        hint = f"running: {', '.join(others)} (choose one with --name)" if others else "start one with `concertina up`"
        raise NotFoundError(f"no system {name!r} is running; {hint}")
    return record


def names() -> list[str]:
    """Names of all recorded systems."""
    return sorted(path.parent.name for path in state_dir().glob("*/system.json"))


@contextlib.contextmanager
def lock(name: str, wait: bool = False) -> Iterator[None]:
    """Only one `up` or `down` of a name at a time; with `wait`, in turn. Raises ConfigError where another one is at work."""
    state_dir().mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(os.open(state_dir() / f".{name}.lock", os.O_RDWR | os.O_CREAT, 0o600), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ConfigError(f"another `up` or `down` of {name!r} is at work; wait for it, or use another --name") from None
        yield


def _port_of(text: str) -> str:
    """The port in ``host:port`` or in ``scheme://host:port/db``; empty where there is none."""
    port = text.rpartition("://")[2].partition("/")[0].rpartition(":")[2]
    return port if port.isdigit() else ""
