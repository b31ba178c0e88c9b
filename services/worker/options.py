"""What a worker is told at its start; the typed `args` of `services.worker.app:build` under KubeRay."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

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
        Worker actors.
    address : str
        ``host:port`` that callers use, for the membership.
    metrics : str
        ``host:port`` of the first replica's metrics page; the others, and all with port 0, take a free port on that host.
    internal_host : str or None
        Address that a replica's own server is bound to; None leaves it to Serve, which binds every interface for the proxies of
        other machines.
    tenants : str or None
        File of token digests, see `services.worker.tenants`.
    max_requests : int
        Requests that one replica works on at a time; more wait in the proxy.
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
    address: str = ""
    metrics: str = "127.0.0.1:0"
    internal_host: str | None = None
    tenants: str | None = None
    max_requests: int = Field(default=64, ge=1, le=4096)

    @field_validator("tenants")
    @classmethod
    def _readable(cls, path: str | None) -> str | None:
        """Fail before anything is started; the actor reads the file again."""
        if path is None:
            return None
        Tenants.load(path)
        return str(Path(path).absolute())
