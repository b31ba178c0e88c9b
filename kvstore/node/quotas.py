"""Bounds on what tenants may hold in the whole cluster.

The bounds are one small value in the metadata, ``{subject: bytes}``. A subject is a tenant, as its credential names it, or a
namespace in hexadecimal where nodes ask for no credentials. Every node counts what it holds of each, publishes that with its record, and
makes a tenant that is over its bound give up its own oldest blocks before it takes another: nobody else's go for them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping

from kvstore.errors import InvalidInputError

from .table import Entry

#: Name of the bounds in the metadata.
QUOTAS = "quotas"
#: Subjects that may have a bound; also the most that a node's record speaks of.
MAX_SUBJECTS = 64
#: Oldest blocks of a subject that one walk over the table finds.
BATCH = 64


def subjects_of(entry: Entry) -> tuple[str, str]:
    """Both names under which a block may be bounded."""
    return entry.owner, entry.header.namespace.hex()


def parse_quotas(data: bytes | None) -> dict[str, int]:
    """The bounds in the metadata's value. Raises InvalidInputError for a value that we did not write."""
    try:
        found = json.loads(data or b"{}")
    except ValueError as error:
        raise InvalidInputError(f"the quotas in the metadata are no JSON: {error}") from error
    if not isinstance(found, dict) or not all(type(size) is int and size >= 0 for size in found.values()) or len(found) > MAX_SUBJECTS:
        raise InvalidInputError(f"quotas are an object of at most {MAX_SUBJECTS} subjects with a number of bytes each")
    return found


class QuotaTable:
    """The bounds, what this node holds of each subject, and what the others said that they hold."""

    def __init__(self) -> None:
        self.limits: dict[str, int] = {}
        self._held: Counter[str] = Counter()
        self._elsewhere: Counter[str] = Counter()
        self._oldest: dict[str, list[tuple[float, Entry]]] = {}

    def count(self, entry: Entry, size_bytes: int) -> None:
        """Bytes of `entry` came (or went, where negative)."""
        for subject in subjects_of(entry):
            if subject:
                self._held[subject] += size_bytes
                if not self._held[subject]:
                    del self._held[subject]

    def hear(self, limits: dict[str, int], elsewhere: Iterable[Mapping[str, int]]) -> None:
        """Take the bounds as they are now, and what each other node holds."""
        self.limits = limits
        self._elsewhere = Counter()
        for usage in elsewhere:
            self._elsewhere.update({subject: size for subject, size in usage.items() if subject in limits})

    def usage(self) -> dict[str, int]:
        """Bytes held here of each subject that has a bound."""
        return {subject: self._held[subject] for subject in self.limits if self._held[subject]}

    def over(self, subjects: Iterable[str], more_bytes: int) -> str | None:
        """The subject among these that `more_bytes` would take over its bound, None if none."""
        for subject in subjects:
            limit = self.limits.get(subject)
            if limit is not None and self._held[subject] + self._elsewhere[subject] + more_bytes > limit:
                return subject
        return None

    def victim(self, subject: str, entries: Iterable[Entry]) -> Entry | None:
        """The subject's block here that was used longest ago, of one chain the last one first; None where all are held.

        `entries`, all blocks of the node, are walked once for `BATCH` answers.
        """
        for walk in (False, True):
            if walk:
                mine = [entry for entry in entries if subject in subjects_of(entry) and not entry.holds]
                mine.sort(key=lambda entry: (entry.last_use, -entry.header.start))
                self._oldest = {subject: [(entry.last_use, entry) for entry in reversed(mine[:BATCH])]}
            found = self._oldest.get(subject, [])
            while found:
                last_use, entry = found.pop()
                if entry.generation and not entry.holds and entry.last_use == last_use:
                    return entry
        return None
