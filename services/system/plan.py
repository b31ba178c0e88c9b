"""What `up` is asked for, checked within a moment and before anything is started."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from services.system import checks, node_options

#: Tried first; a free one is taken where another program has it.
INFERENCE_PORT, REDIS_PORT = 9000, 6379


@dataclass(frozen=True, slots=True)
class Plan:
    """A system to bring up.

    Parameters
    ----------
    name : str
    model : Path or None
        None for a store alone.
    nodes, workers : int
    min_workers, max_workers : int or None
        Bounds between which the number of workers follows the requests.
    arena_bytes : int
        Of each node.
    codec : str
    profile : str or None
        File; None leaves it to the workers to find or make one.
    ratio : float or None
    policy : str
        Empty for the node's default.
    redis : str or None
        URL of a running one; None starts a Valkey.
    device, engine : str
    tenants : str or None
    spill : Path or None
        Holds a folder for each node.
    node_arguments : tuple of str
        Further arguments of every node.
    """

    name: str
    model: Path | None
    nodes: int = 2
    workers: int = 1
    min_workers: int | None = None
    max_workers: int | None = None
    arena_bytes: int = 256 << 20
    codec: str = "transform"
    profile: str | None = None
    ratio: float | None = None
    policy: str = ""
    redis: str | None = None
    device: str = "cpu"
    engine: str = "transformers"
    tenants: str | None = None
    spill: Path | None = None
    node_arguments: tuple[str, ...] = ()

    def node_id(self, number: int) -> str:
        """Name of a node in the cluster."""
        return f"{self.name}-node-{number}"

    def node_command(self, number: int, redis: str) -> list[str]:
        """Command line of one node; nodes take turns with the GPUs."""
        device = f"cuda:{number % max(1, checks.gpu_count())}" if self.device == "cuda" else self.device
        command = ["node", "--redis", redis, "--id", self.node_id(number), "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]
        command += ["--arena", str(self.arena_bytes), "--device", device]
        command += ["--policy", self.policy] if self.policy else []
        command += ["--spill", str(self.spill / self.node_id(number))] if self.spill else []
        return _concertina([*command, *self.node_arguments])

    def worker_command(self, redis: str, listen: str, scratch: Path) -> list[str]:
        """Command line of the worker process, which holds all replicas."""
        command = ["worker", "--redis", redis, "--model", str(self.model), "--listen", listen, "--workers", str(self.workers)]
        command += ["--codec", self.codec, "--device", self.device, "--engine", self.engine, "--scratch", str(scratch)]
        command += ["--min-workers", str(self.min_workers)] if self.min_workers else []
        command += ["--max-workers", str(self.max_workers)] if self.max_workers else []
        command += ["--ratio", str(self.ratio)] if self.ratio else []
        command += ["--profile", self.profile] if self.profile else []
        return _concertina(command + (["--tenants", self.tenants] if self.tenants else []))


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments that say what a system is made of."""
    parser.add_argument("--model", default="", metavar="DIR|HUB-NAME", help="model to serve (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--nodes", type=int, default=2, metavar="N", help="store nodes (%(default)s)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="worker actors, one a GPU; 0 for the store alone (%(default)s)")
    parser.add_argument("--min-workers", type=int, metavar="N", help="let the number of workers follow the requests, not below this")
    parser.add_argument("--max-workers", type=int, metavar="N", help="nor above this (default: --workers)")
    parser.add_argument("--arena", default="256MiB", metavar="SIZE", help="memory for blocks of each node (%(default)s)")
    parser.add_argument("--codec", default="transform", help="codec that new blocks are written with (%(default)s)")
    parser.add_argument("--profile", metavar="FILE", help="profile for the codec (default: found, or made in the background)")
    parser.add_argument("--ratio", type=float, help="compression ratio that the codec is asked for, where it can be")
    parser.add_argument("--policy", default="", help="eviction policy of the nodes (default: theirs)")
    parser.add_argument("--redis", metavar="URL", help="use this Redis or Valkey instead of starting one")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for arenas and model (%(default)s)")
    parser.add_argument("--engine", default="transformers", help="what runs the model (%(default)s)")
    parser.add_argument("--tenants", metavar="FILE", help="JSON of token digests and tenants; calls then need a bearer token")
    node_options.configure(parser)


def plan(args: argparse.Namespace) -> Plan:
    """The checked plan. Raises ConfigError for the first thing that can never work."""
    checks.check_count("--nodes", args.nodes, 1)
    checks.check_count("--workers", args.workers, 0)
    checks.check_device(args.device, max(args.workers, args.max_workers or 0))
    arena_bytes = checks.check_arena(args.arena, args.nodes, args.device)
    checks.check_redis(args.redis)
    checks.check_ratio(args.ratio)
    checks.check_codec(args.codec)
    checks.check_profile(args.profile)
    if args.policy:
        checks.check_policy(args.policy)
    checks.check_tenants(args.tenants)
    model = None
    if args.workers:
        checks.check_replicas(args.workers, args.min_workers, args.max_workers)
        checks.check_engine(args.engine)
        model = checks.local_model(args.model)
    return Plan(
        name=args.name,
        model=model,
        nodes=args.nodes,
        workers=args.workers,
        min_workers=args.min_workers,
        max_workers=args.max_workers,
        arena_bytes=arena_bytes,
        codec=args.codec,
        profile=str(Path(args.profile).absolute()) if args.profile else None,
        ratio=args.ratio,
        policy=args.policy,
        redis=args.redis,
        device=args.device,
        engine=args.engine,
        tenants=str(Path(args.tenants).absolute()) if args.tenants else None,
        spill=Path(args.spill).absolute() if args.spill else None,
        node_arguments=node_options.arguments(args),
    )


def _concertina(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "services.cli", *arguments]
