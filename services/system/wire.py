"""The command line as a client of the two services."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import grpc

from kvstore.errors import ConcertinaError, ConfigError, error_for_status

OPTIONS = [("grpc.max_receive_message_length", 64 << 20), ("grpc.enable_retries", 0)]


@contextlib.contextmanager
def channel(address: str) -> Iterator[grpc.Channel]:
    """A channel; what the peer answers with an error is raised as one of ours."""
    with grpc.insecure_channel(address, options=OPTIONS) as opened:
        try:
            yield opened
        except grpc.RpcError as error:
            raise translated(error, address) from error


def translated(error: grpc.RpcError, address: str) -> ConcertinaError:
    """The exception for a failed call."""
    name = error.code().name
    message = error.details() or name
    return error_for_status(name, f"{address} does not answer: {message}" if name == "UNAVAILABLE" else message)


def credential(path: str | None) -> list[tuple[str, str]]:
    """Metadata that carries the bearer token in the file `path`; none without a file. Raises ConfigError for an unreadable one."""
    if not path:
        return []
    try:
        return [("authorization", f"Bearer {Path(path).read_text().strip()}")]
    except OSError as error:
        raise ConfigError(f"--credential {path} cannot be read: {error.strerror}") from error
