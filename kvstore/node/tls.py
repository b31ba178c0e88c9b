"""TLS of the node's gRPC: the server's credentials, and the names in a client's certificate."""

from __future__ import annotations

from pathlib import Path

import grpc

from kvstore.errors import ConfigError

from .config import NodeConfig


def server_credentials(config: NodeConfig) -> grpc.ServerCredentials | None:
    """What the server proves itself with, and whether clients must; None for plain text.

    Raises
    ------
    ConfigError
        For a file that cannot be read or is no PEM.
    """
    if not config.tls_cert:
        return None
    chain, key = _pem("--tls-cert", config.tls_cert), _pem("--tls-key", config.tls_key)
    roots = _pem("--tls-client-ca", config.tls_client_ca) if config.tls_client_ca else None
    return grpc.ssl_server_credentials([(key, chain)], roots, require_client_auth=roots is not None)


def names_of_peer(context: grpc.aio.ServicerContext) -> list[str]:
    """Subject alternative names of the client's verified certificate; none without one."""
    found = context.auth_context().get("x509_subject_alternative_name", ())
    return [name.decode(errors="replace") for name in found]


def _pem(option: str, path: str) -> bytes:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be read: {error.strerror}") from error
    if b"-----BEGIN " not in data:
        raise ConfigError(f"{option} {path} is no PEM file")
    return data
