"""From a worker's arguments to its engine."""

from __future__ import annotations

from kvstore.client import ClientConfig
from kvstore.metrics import Metrics
from services.engine import engine_class
from services.engine.base import Engine
from services.engine.config import EngineConfig
from services.model import resolve_model

from .options import WorkerArgs


def create_engine(args: WorkerArgs, metrics: Metrics) -> Engine:
    """The engine that `args` name, not started.

    Raises
    ------
    ConfigError
        For an unknown engine, or a model that is none.
    """
    engine = engine_class(args.engine)
    config = EngineConfig(
        model=str(resolve_model(args.model)),
        device=args.device,
        codec=args.codec,
        codec_options={"ratio": args.ratio} if args.ratio else {},
    )
    store = ClientConfig(redis_url=args.redis) if args.redis else None
    return engine(config, store, metrics)
