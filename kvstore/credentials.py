"""Who calls: bearer tokens and client certificates to tenants.

The file is one JSON object. A key is the SHA-256 of a token in hexadecimal, so that the file holds no secret, or ``san:`` and a name
among the subject alternative names of a client's certificate. A value is the tenant, or an object that also says who may see to
everybody's blocks::

    {"9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08": "team-a",
     "san:team-b.example": "team-b",
     "60303ae22b998861bce3b28f33eec1be758a213c86c93c076dbe9f558c11c752": {"tenant": "operators", "admin": true}}
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import AuthenticationError, ConfigError, PermissionDeniedError

MAX_FILE_BYTES = 16 << 20
SAN = "san:"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose call it is: `tenant` is empty where credentials are not asked for; an `admin` may see to everybody's blocks."""

    tenant: str = ""
    admin: bool = False

    def require_admin(self, what: str) -> None:
        """Raises PermissionDeniedError for anybody else."""
        if not self.admin:
            raise PermissionDeniedError(f"{what} takes a credential with `admin`; {self.tenant!r} has none, ask the operator")


#: Everybody, where no credentials are asked for: one tenant, who may do all.
ANYBODY = Caller("", admin=True)


class Credentials:
    """Answers which caller a call comes from.

    Parameters
    ----------
    callers : dict or None
        By digest or by ``san:NAME``, as in the file. None asks for no credential: every call is `ANYBODY`'s.
    """

    def __init__(self, callers: dict[str, Caller] | None = None) -> None:
        self._callers = callers

    @property
    def required(self) -> bool:
        return self._callers is not None

    @classmethod
    def load(cls, path: str | None) -> Credentials:
        """From a file, or open to all without one. Raises ConfigError for a file that is missing or wrong."""
        if not path:
            return cls()
        try:
            if Path(path).stat().st_size > MAX_FILE_BYTES:
                raise ConfigError(f"credentials file {path} is larger than {MAX_FILE_BYTES} bytes")
            entries = json.loads(Path(path).read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"credentials file {path} cannot be read: {error}; it must be JSON of tokens and tenants") from error
        if not isinstance(entries, dict) or not entries:
            raise ConfigError(f"credentials file {path} must be one JSON object of token digests and tenants, with at least one entry")
        return cls({_key(path, key): _caller(path, value) for key, value in entries.items()})

    def caller(self, metadata: Iterable[tuple[str, Any]], names: Iterable[str] = ()) -> Caller:
        """Whose call this is.

        A token is hashed before it is looked up, so the time of the lookup tells nothing of the tokens that exist.

        Parameters
        ----------
        metadata : iterable of (str, str or bytes)
            Of the call; ``authorization: Bearer TOKEN`` counts more than a certificate.
        names : iterable of str
            Subject alternative names of the peer's verified certificate.

        Raises
        ------
        AuthenticationError
            Where credentials are asked for and there is none, or one that nobody knows.
        """
        if self._callers is None:
            return ANYBODY
        header = next((value for name, value in metadata if name.lower() == "authorization"), None)
        if header is not None:
            return self._of_token(header if isinstance(header, str) else "")
        found = next((self._callers[SAN + name] for name in names if SAN + name in self._callers), None)
        if found is None:
            raise AuthenticationError("this service asks for a credential; send the metadata `authorization: Bearer TOKEN`")
        return found

    def _of_token(self, header: str) -> Caller:
        scheme, _, token = header.partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise AuthenticationError("this service asks for a credential; send the metadata `authorization: Bearer TOKEN`")
        found = self._callers.get(hashlib.sha256(token.strip().encode()).hexdigest())  # type: ignore[union-attr]
        if found is None:
            raise AuthenticationError("the token is not known here; ask the operator for one that is in the credentials file")
        return found


def read_token(path: str) -> str:
    """The token in a file, without the white space around it. Raises ConfigError for one that is not there, empty or no line of text."""
    try:
        token = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"credential file {path} cannot be read: {error}") from error
    if not token or not token.isascii() or not token.isprintable() or len(token) > 4096:
        raise ConfigError(f"credential file {path} must hold one token of printable characters")
    return token


def _key(path: str, key: str) -> str:
    if not _DIGEST.fullmatch(key) and not (key.startswith(SAN) and len(key) > len(SAN)):
        raise ConfigError(f"credentials file {path}: {key[:12]!r}… is no SHA-256 in lower-case hexadecimal (64 digits) nor san:NAME")
    return key


def _caller(path: str, value: Any) -> Caller:
    entry = {"tenant": value} if isinstance(value, str) else value
    if not isinstance(entry, dict) or not set(entry) <= {"tenant", "admin"} or not isinstance(entry.get("admin", False), bool):
        raise ConfigError(f'credentials file {path}: {value!r} must be a tenant or {{"tenant": NAME, "admin": true}}')
    tenant = entry.get("tenant")
    if not isinstance(tenant, str) or not _TENANT.fullmatch(tenant):
        raise ConfigError(f"credentials file {path}: tenant {tenant!r} must be 1 to 64 letters, digits, dots, dashes or underscores")
    return Caller(tenant, entry.get("admin", False))
