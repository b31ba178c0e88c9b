"""What a client shows to nodes, and what it asks of them: its token, TLS, a certificate of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from kvstore.credentials import read_token
from kvstore.errors import ConfigError

from .config import ClientConfig

#: Value of `ClientConfig.tls_ca` for the authorities that this machine trusts anyway.
SYSTEM_CA = "system"


@dataclass(frozen=True, slots=True)
class Security:
    """Made by `of`; without arguments it stands for plain text and no credential.

    Parameters
    ----------
    token : str
        Sent with every call; empty for none.
    tls : grpc.ChannelCredentials or None
        None for plain text.
    server_name : str
        Name that a node's certificate must have; empty for the host in its address.
    """

    token: str = ""
    tls: grpc.ChannelCredentials | None = None
    server_name: str = ""

    @classmethod
    def of(cls, config: ClientConfig) -> Security:
        """From a client's settings. Raises ConfigError for a file that cannot be read."""
        token = read_token(config.credential) if config.credential else ""
        if not config.tls_ca:
            return cls(token)
        roots = None if config.tls_ca == SYSTEM_CA else _read("tls_ca", config.tls_ca)
        chain, key = (_read(name, path) if path else None for name, path in (("tls_cert", config.tls_cert), ("tls_key", config.tls_key)))
        return cls(token, grpc.ssl_channel_credentials(roots, key, chain), config.tls_name)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Metadata of every call."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    def channel(self, address: str, options: tuple[tuple[str, Any], ...]) -> grpc.aio.Channel:
        """A channel to a node."""
        if self.tls is None:
            return grpc.aio.insecure_channel(address, options=options)
        named = (("grpc.ssl_target_name_override", self.server_name),) if self.server_name else ()
        return grpc.aio.secure_channel(address, self.tls, options=(*options, *named))


def _read(name: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"client setting {name}: {path} cannot be read: {error.strerror}") from error
