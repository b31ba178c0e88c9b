"""Bounds on what tenants may hold in the whole cluster.

The bounds are in the metadata (`kvstore.metadata.subjects`). Every node counts what it holds of each subject, publishes that with its
record, and makes a tenant that is over its bound give up its own oldest blocks before it takes another: nobody else's go for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import groupby

from .table import Entry

#: Oldest blocks of a subject that one walk over the table finds.
BATCH = 64


def subjects_of(entry: Entry) -> tuple[str, str]:
    """Both names under which a block may be bounded."""
    return entry.owner, entry.header.namespace.hex()


class QuotaTable:
    """The bounds, what this node holds of each subject, and what the others said that they hold."""

    def __init__(self) -> None:
        self.limits: dict[str, int] = {}
        self._held: Counter[str] = Counter()
        self._elsewhere: Counter[str] = Counter()
        self._oldest: dict[str, list[tuple[float, Entry]]] = {}

    def count(self, entry: Entry, size_bytes: int) -> None:
        """Bytes of `entry` came (or went, where negative)."""
        self._count(subjects_of(entry), size_bytes)

    def came(self, entries: Iterable[Entry], page_bytes: int) -> None:
        """Count these blocks; those of one subject that stand side by side at once."""
        for (owner, namespace), run in groupby(entries, lambda entry: (entry.owner, entry.header.namespace)):
            self._count((owner, namespace.hex()), page_bytes * sum([entry.pages for entry in run]))

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

    def _count(self, subjects: Iterable[str], size_bytes: int) -> None:
        for subject in subjects:
            if subject:
                self._held[subject] += size_bytes
                if not self._held[subject]:
                    del self._held[subject]
