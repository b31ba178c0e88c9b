"""Which tenant a request to a worker belongs to; the file is that of `kvstore.credentials`."""

from __future__ import annotations

from collections.abc import Iterable

from kvstore.credentials import Credentials

DEFAULT_TENANT = "default"


class Tenants:
    """Answers which tenant a call belongs to.

    Parameters
    ----------
    credentials : Credentials
        Where none are asked for, every call is tenant ``default``.
    """

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    @classmethod
    def load(cls, path: str | None) -> Tenants:
        """From a file, or open to all without one. Raises ConfigError for a file that is missing or wrong."""
        return cls(Credentials.load(path))

    def of(self, metadata: Iterable[tuple[str, str]]) -> str:
        """Tenant of a call by its gRPC metadata. Raises AuthenticationError where a credential is asked for and not known."""
        return self._credentials.caller(metadata).tenant or DEFAULT_TENANT
