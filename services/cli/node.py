"""``concertina node``: one store node in this process, until SIGTERM."""

from __future__ import annotations

import argparse
import logging
import sys

from kvstore import node
from kvstore.settings import load, parse_size
from services.system.node_options import FILES

SIZES = ("arena", "page_bytes", "spill_bytes", "spill_host_bytes")


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command; what is not given comes from ``CONCERTINA_NODE__…`` or the default."""
    parser.add_argument("--redis", metavar="URL", help="metadata of the cluster to join, such as redis://127.0.0.1:6379/0")
    parser.add_argument("--prefix", metavar="TEXT", help="start of the names in Redis, where several systems share it (default concertina)")
    parser.add_argument("--listen", metavar="HOST:PORT", help="gRPC service; port 0 takes a free one (default 127.0.0.1:0)")
    parser.add_argument("--advertise", metavar="HOST", help="host under which others reach this node (default: that of --listen)")
    parser.add_argument("--metrics", metavar="HOST:PORT", help="page for Prometheus (default: none)")
    parser.add_argument("--arena", metavar="SIZE", help="memory for blocks (default 256MiB)")
    parser.add_argument("--device", metavar="cpu|cuda|cuda:N", help="where that memory is (default cpu)")
    parser.add_argument("--policy", metavar="NAME", help="eviction policy (default: the project's)")
    parser.add_argument("--id", metavar="NAME", help="name of the node (default: drawn)")
    parser.add_argument("--spill", metavar="DIR", help="directory for blocks that the arena has no room for; outlives it (default: none)")
    parser.add_argument("--spill-bytes", metavar="SIZE", help="bytes that the directory may hold, such as 20GiB")
    parser.add_argument("--spill-host-bytes", metavar="SIZE", help="host memory for the same, for an arena on a GPU (default 0)")
    parser.add_argument("--credentials", metavar="FILE", help="JSON of token digests and tenants; calls need a credential then")
    parser.add_argument("--tls-cert", metavar="FILE", help="PEM of the server's certificate chain (default: plain text)")
    parser.add_argument("--tls-key", metavar="FILE", help="PEM of its key")
    parser.add_argument("--tls-client-ca", metavar="FILE", help="PEM; clients must show a certificate that it vouches for (mutual TLS)")
    parser.add_argument("--page-bytes", metavar="SIZE", help="size of a page, a power of two (default 4KiB)")


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; one JSON line on stdout says when and where."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    names = ("redis", "prefix", "listen", "advertise", "metrics", "device", "policy", "id", "spill", *FILES)
    sizes = {name: None if (text := getattr(args, name)) is None else parse_size(text) for name in SIZES}
    config = load(node.NodeConfig, "node", **{name: getattr(args, name) for name in names}, **sizes)
    if config.exposed:
        logging.warning("%s is reached in plain text from other machines; give --tls-cert, or --listen 127.0.0.1:PORT", config.listen)
    return node.run(config)
