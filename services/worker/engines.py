"""From a worker's arguments to its engine."""

from __future__ import annotations

from kvstore.client import ClientConfig, KvClient
from kvstore.codecs import Profile, codec_class
from kvstore.errors import ConfigError
from kvstore.metrics import Metrics
from kvstore.settings import load
from services.engine import engine_class
from services.engine.base import Engine
from services.engine.config import EngineConfig
from services.model import resolve_model
from services.profiles.keeper import FALLBACK, ProfileKeeper, Wanted

from .options import WorkerArgs


def create_engine(args: WorkerArgs, metrics: Metrics) -> Engine:
    """The engine that `args` name, not started.

    Raises
    ------
    ConfigError
        For an unknown engine or codec, or a model that is none.
    """
    later = codec_class(args.codec).uses_profile
    engine = engine_class(args.engine)
    config = EngineConfig(
        model=str(resolve_model(args.model)),
        device=args.device,
        codec=FALLBACK if later else args.codec,
        codec_options={} if later else _options(args),
    )
    store = load(ClientConfig, "client", redis_url=args.redis) if args.redis else None
    return engine(config, store, metrics)


def create_keeper(args: WorkerArgs, engine: Engine) -> ProfileKeeper:
    """What finds, makes and shares the profiles of `engine`; to be started after it.

    Raises
    ------
    ConfigError
        For a profile that cannot be read, or a codec that has none.
    """
    profile = None
    if args.profile:
        if not codec_class(args.codec).uses_profile:
            raise ConfigError(f"--profile is of no use to codec {args.codec!r}; use --codec transform")
        profile = Profile.load(args.profile)
    wanted = Wanted(str(resolve_model(args.model)), args.codec, _options(args), profile)
    # A client of its own, so that no block waits in a queue behind a profile; its bounds are those of something large and not urgent.
    store = load(ClientConfig, "client", redis_url=args.redis, put_timeout_s=30.0, rpc_timeout_s=10.0) if args.redis else None
    return ProfileKeeper(engine, wanted, KvClient(store) if store else None)


def _options(args: WorkerArgs) -> dict[str, float]:
    return {"ratio": args.ratio} if args.ratio else {}
