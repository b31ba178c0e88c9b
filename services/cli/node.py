"""``concertina node``: one store node in this process, until SIGTERM."""

from __future__ import annotations

import argparse
import logging
import sys

from kvstore import node
from kvstore.settings import load, parse_size


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
    parser.add_argument("--page-bytes", metavar="SIZE", help="size of a page, a power of two (default 4KiB)")


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; one JSON line on stdout says when and where."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    names = ("redis", "prefix", "listen", "advertise", "metrics", "device", "policy", "id")
    sizes = {name: None if (text := getattr(args, name)) is None else parse_size(text) for name in ("arena", "page_bytes")}
    return node.run(load(node.NodeConfig, "node", **{name: getattr(args, name) for name in names}, **sizes))
