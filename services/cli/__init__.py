"""The command line: one file a command, found through `COMMANDS` and imported only when it is run.

A command module has ``configure(parser)``, which adds its arguments, and ``run(args) -> int``, which does the work and returns
the exit code: 0 done, 1 failed, 2 wrong usage. Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys

from kvstore.errors import ConcertinaError, ConfigError, InvalidInputError

#: Command -> (module, one line of help). The order is that of ``concertina --help``.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("services.cli.demo", "watch the main job run, from an empty machine to a killed node, in a minute"),
    "up": ("services.cli.up", "bring a whole system up on this machine"),
    "down": ("services.cli.down", "take a system down again"),
    "status": ("services.cli.status", "show endpoints, nodes and memory of a running system"),
    "top": ("services.cli.top", "watch nodes and workers of a running system, live"),
    "console": ("services.cli.console", "serve a web page that watches a running system"),
    "generate": ("services.cli.generate", "ask the model of a running system"),
    "blocks": ("services.cli.blocks", "list, pin, evict or clear the blocks of the store"),
    "plan": ("services.cli.plan", "plan memory: what a model's KV cache takes under each codec"),
    "worker": ("services.cli.worker", "run inference workers in a Ray of their own"),
    "node": ("services.cli.node", "run one store node and join a cluster"),
    "replay": ("services.cli.replay", "replay a request trace through an eviction policy"),
    "calibrate": ("services.cli.calibrate", "learn a model's profile for the transform codec from text"),
    "evaluate": ("services.cli.evaluate", "measure what a codec does to a model's output"),
    "bench": ("services.cli.bench", "run a benchmark and print one JSON object"),
}


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``concertina``; prints a typed error as one line that names the mend."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="concertina", description="A KV cache for LLM inference that squeezes before it forgets.")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    wanted = next((a for a in argv if not a.startswith("-")), None)
    for name, (module, summary) in COMMANDS.items():
        sub = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == wanted:
            command = importlib.import_module(module)
            command.configure(sub)
            sub.add_argument("--json", action="store_true", help="print one JSON object on stdout")
            sub.set_defaults(run=command.run)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except ConcertinaError as error:
        usage = isinstance(error, (ConfigError, InvalidInputError))
        if args.json:
            print(json.dumps({"error": {"reason": error.reason, "message": str(error)}}))
        print(f"concertina {args.command}: {error}", file=sys.stderr)
        return 2 if usage else 1
    except KeyboardInterrupt:
        return 130
