"""What `up` passes on to every node it starts: where to spill, whom to trust, and how to prove itself."""

from __future__ import annotations

import argparse
from pathlib import Path

from kvstore.errors import ConfigError
from kvstore.node import NodeConfig
from kvstore.settings import load, parse_size

#: Options of ``concertina node`` that name a file.
FILES = ("credentials", "tls_cert", "tls_key", "tls_client_ca")


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `up`."""
    parser.add_argument("--spill", metavar="DIR", help="let nodes keep on disk what their arenas have no room for, each in a folder of DIR")
    parser.add_argument("--spill-bytes", metavar="SIZE", help="bytes that each node's folder may hold")
    parser.add_argument("--credentials", metavar="FILE", help="nodes ask for a credential of this JSON of token digests and tenants")
    parser.add_argument("--tls-cert", metavar="FILE", help="PEM of the nodes' certificate chain (default: plain text)")
    parser.add_argument("--tls-key", metavar="FILE", help="PEM of its key")
    parser.add_argument("--tls-client-ca", metavar="FILE", help="PEM; clients of nodes must show a certificate that it vouches for")


def arguments(args: argparse.Namespace) -> tuple[str, ...]:
    """Arguments of a node's command line, checked; all but ``--spill``, which differs from node to node.

    Workers and the other commands are clients of these nodes: what they show is in their settings, ``CONCERTINA_CLIENT__CREDENTIAL``
    and ``CONCERTINA_CLIENT__TLS_CA``, which are in the environment of `up` and passed on by it.

    Raises
    ------
    ConfigError
        For options that do not fit together, a file that is not there, or clients that could not speak to such nodes.
    """
    spill_bytes = parse_size(args.spill_bytes) if args.spill_bytes else 0
    files = {name: str(Path(path).absolute()) for name in FILES if (path := getattr(args, name))}
    NodeConfig(spill=args.spill or "", spill_bytes=spill_bytes, **files)
    for name, path in files.items():
        if not Path(path).is_file():
            raise ConfigError(f"--{name.replace('_', '-')} {path}: no such file")
    if files:
        _check_clients(files)
    sizes = ["--spill-bytes", str(spill_bytes)] if spill_bytes else []
    return tuple(sizes + [word for name, path in files.items() for word in (f"--{name.replace('_', '-')}", path)])


def _check_clients(files: dict[str, str]) -> None:
    from kvstore.client import ClientConfig

    client = load(ClientConfig, "client")
    if "credentials" in files and not client.credential:
        raise ConfigError("--credentials: workers need a token too; set CONCERTINA_CLIENT__CREDENTIAL to a file that holds it")
    if "tls_cert" in files and not client.tls_ca:
        raise ConfigError("--tls-cert: workers must know whom to trust; set CONCERTINA_CLIENT__TLS_CA to the authority's PEM file")
