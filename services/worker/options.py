"""What a worker is told at its start; the typed `args` of `services.worker.app:build` under KubeRay."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from services.worker.tenants import Tenants


class WorkerArgs(BaseModel):
    """Arguments of the application. An unknown one is an error.

    Parameters
    ----------
    model : str
        Directory or hub name; empty for the default model.
    redis : str or None
        URL of the cluster's metadata; None runs without a store.
    engine : str
        Name in `services.engine.ENGINES`.
    codec : str
        Codec that new blocks are written with; blocks of any codec are read. One that needs a profile begins when there is one, and
        int8 stands in for it until then.
    profile : str or None
        File of a profile to use, instead of one that is found or made.
    ratio : float or None
        What the codec is asked to reach, where it can be asked.
    device : str
        ``cpu`` or ``cuda``; each replica has one GPU of its own.
    replicas : int
        Worker actors, at first where their number changes.
    min_replicas, max_replicas : int or None
        Bounds between which their number follows the requests; without them it stays.
    target_requests : float
        Requests, waiting or running, that one replica should have for their number to stay.
    drain_s : float
        Seconds that a replica which is to end has for the requests it works on.
    address : str
        ``host:port`` that callers use for gRPC, for the membership.
    http : str
        URL that callers use for HTTP, for the membership.
    metrics : str
        ``host:port`` of the first replica's metrics page; the others, and all with port 0, take a free port on that host.
    internal_host : str or None
        Address that a replica's own server is bound to; None leaves it to Serve, which binds every interface for the proxies of
        other machines.
    tenants : str or None
        File of token digests, see `services.worker.tenants`.
    generation : int
        Means nothing in itself: replicas of another one are replaced by new ones, which serve before the old ones go.
    max_requests : int
        Requests that one replica takes from the proxy; more than its engine's batch and queue, so that the engine is what
        refuses, and knows when to try again. More wait in the proxy, four times as many at most.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = ""
    redis: str | None = None
    engine: str = "transformers"
    codec: str = "transform"
    profile: str | None = None
    ratio: float | None = Field(default=None, gt=1.0, le=1000.0)
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda)$")
    replicas: int = Field(default=1, ge=1, le=1024)
    min_replicas: int | None = Field(default=None, ge=1, le=1024)
    max_replicas: int | None = Field(default=None, ge=1, le=1024)
    target_requests: float = Field(default=8.0, gt=0, le=4096)
    drain_s: float = Field(default=10.0, ge=0, le=3600)
    address: str = ""
    http: str = ""
    metrics: str = "127.0.0.1:0"
    internal_host: str | None = None
    tenants: str | None = None
    generation: int = Field(default=0, ge=0)
    max_requests: int = Field(default=96, ge=1, le=4096)

    @model_validator(mode="after")
    def _ordered(self) -> WorkerArgs:
        """The bounds of the number of replicas have it between them."""
        if not (self.min_replicas or self.replicas) <= self.replicas <= (self.max_replicas or self.replicas):
            raise ValueError(f"replicas {self.replicas} must be from min_replicas to max_replicas")
        return self

    @field_validator("tenants")
    @classmethod
    def _readable(cls, path: str | None) -> str | None:
        """Fail before anything is started; the actor reads the file again."""
        if path is None:
            return None
        Tenants.load(path)
        return str(Path(path).absolute())
