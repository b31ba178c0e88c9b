"""``concertina console``: a running system as a web page, until Ctrl-C."""

from __future__ import annotations

import argparse
import json
import signal
import sys

from services.system import record
from services.system.checks import check_listen


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", default=record.DEFAULT_NAME, help="name of the system (%(default)s)")
    parser.add_argument("--redis", metavar="URL", help="cluster to watch instead, by its metadata")
    parser.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="address; port 0 for a free one (%(default)s)")


def run(args: argparse.Namespace) -> int:
    host, port = check_listen(args.listen, "--listen")
    system = None if args.redis else record.require(args.name)
    from services.console.server import ConsoleServer
    from services.console.watch import Watch

    redis = args.redis or (system.redis if system else None) or ""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ConsoleServer((host, port), args.redis or args.name, Watch(redis)) as server:
        url = f"http://{host}:{port}"
        print(json.dumps({"console": url}) if args.json else f"console of {args.name}: {url}", flush=True)
        if system:
            record.note_console(system, url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("concertina console: ended", file=sys.stderr)
        finally:
            if system:
                record.note_console(system, None)
    return 0
