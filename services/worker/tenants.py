"""Who calls: bearer tokens to tenants.

The file maps the SHA-256 of each token, in hexadecimal, to the name of its tenant, so that it holds no secret::

    {"9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08": "team-a"}
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from kvstore.errors import AuthenticationError, ConfigError

DEFAULT_TENANT = "default"
MAX_FILE_BYTES = 16 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Tenants:
    """Answers which tenant a call belongs to.

    Parameters
    ----------
    by_digest : dict or None
        SHA-256 of the token in lower-case hexadecimal → tenant. None asks for no credential: every call is tenant ``default``.
    """

    def __init__(self, by_digest: dict[str, str] | None = None) -> None:
        self._by_digest = by_digest

    @classmethod
    def load(cls, path: str | None) -> Tenants:
        """From a file, or open to all without one. Raises ConfigError for a file that is missing or wrong."""
        if not path:
            return cls()
        try:
            if Path(path).stat().st_size > MAX_FILE_BYTES:
                raise ConfigError(f"tenants file {path} is larger than {MAX_FILE_BYTES} bytes")
            entries = json.loads(Path(path).read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(f"tenants file {path} cannot be read: {error}") from error
        if not isinstance(entries, dict) or not entries:
            raise ConfigError(f"tenants file {path} must be one JSON object of token digests and tenants, with at least one entry")
        for digest, tenant in entries.items():
            if not _DIGEST.fullmatch(digest):
                raise ConfigError(f"tenants file {path}: {digest[:12]!r}… is no SHA-256 in lower-case hexadecimal (64 digits)")
            if not isinstance(tenant, str) or not _TENANT.fullmatch(tenant):
                raise ConfigError(f"tenants file {path}: tenant {tenant!r} must be 1 to 64 letters, digits, dots, dashes or underscores")
        return cls(entries)

    def of(self, metadata: Iterable[tuple[str, str]]) -> str:
        """Tenant of a call by its gRPC metadata.

        The token is hashed before it is looked up, so the time of the lookup tells nothing of the tokens that exist.

        Raises
        ------
        AuthenticationError
            Where credentials are asked for and there is none, or one that nobody knows.
        """
        if self._by_digest is None:
            return DEFAULT_TENANT
        header = next((value for name, value in metadata if name.lower() == "authorization"), "")
        scheme, _, token = header.partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise AuthenticationError("this service asks for a credential; send the metadata `authorization: Bearer TOKEN`")
        tenant = self._by_digest.get(hashlib.sha256(token.strip().encode()).hexdigest())
        if tenant is None:
            raise AuthenticationError("the token is not known here; ask the operator for one that is in the tenants file")
        return tenant
