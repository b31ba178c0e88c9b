"""Quotas of tenants, as one small value in the metadata: ``{subject: bytes}``.

A subject is a tenant, as its credential names it, or a namespace in hexadecimal where nodes ask for no credentials.
"""

from __future__ import annotations

import json

from kvstore.errors import InvalidInputError

from .base import Metadata

#: Name of the value.
QUOTAS = "quotas"
#: Subjects that may have a quota; also the most that a node's record speaks of.
MAX_SUBJECTS = 64
_MAX_SUBJECT_CHARS = 64


def parse_quotas(data: bytes | None) -> dict[str, int]:
    """The quotas in the metadata's value, bytes by subject. Raises InvalidInputError for a value that we did not write."""
    try:
        found = json.loads(data or b"{}")
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"the quotas in the metadata are no JSON: {error}") from error
    if not isinstance(found, dict) or not all(type(size) is int and size >= 0 for size in found.values()) or len(found) > MAX_SUBJECTS:
        raise InvalidInputError(f"quotas are an object of at most {MAX_SUBJECTS} subjects with a number of bytes each")
    return found


async def read_quotas(metadata: Metadata) -> dict[str, int]:
    """The quotas as they are now. Raises what the metadata raises, and InvalidInputError like `parse_quotas`."""
    return parse_quotas(await metadata.get_value(QUOTAS))


async def set_quota(metadata: Metadata, subject: str, size_bytes: int | None) -> dict[str, int]:
    """Bound what `subject` may hold in the cluster, or with None bound it no more; all quotas after that.

    Two operators who do this in the same moment may undo each other: the last one counts.

    Raises
    ------
    InvalidInputError
        For an empty or long subject, a negative size, or one subject too many; and what `read_quotas` raises.
    """
    if not subject or len(subject) > _MAX_SUBJECT_CHARS or not subject.isprintable():
        raise InvalidInputError(f"a quota's subject is a tenant or a namespace in hexadecimal, at most {_MAX_SUBJECT_CHARS} letters")
    quotas = await read_quotas(metadata)
    quotas.pop(subject, None)
    if size_bytes is not None:
        quotas[subject] = size_bytes
    encoded = json.dumps(quotas, sort_keys=True).encode()
    parse_quotas(encoded)
    await metadata.set_value(QUOTAS, encoded)
    return quotas
