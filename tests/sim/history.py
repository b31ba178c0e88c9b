"""What was written, what was served, what was promised; and whether the one follows from the other.

The checker knows every byte that was ever given to the store. A served block must be one that was published under that namespace and
key before, whole or cut at a layer. Violations are collected, never raised: a fault hides no other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from kvstore.block import EncodedBlock

#: How much later than its deadline a call may return: steps of the loop cost no virtual time.
SLACK_S = 1e-6


@dataclass(slots=True)
class History:
    """The record of one run.

    Attributes
    ----------
    violations : list of str
        What must never happen and did.
    flips : int
        Bits that the network or a memory fault changed; without any, nothing may ever look corrupt.
    counts : Counter
        Events by kind, for the summary.
    """

    now: Callable[[], float]
    violations: list[str] = field(default_factory=list)
    flips: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    _written: dict[tuple[bytes, bytes], set[bytes]] = field(default_factory=dict)
    _trace: Any = field(default_factory=lambda: blake2b(digest_size=16))

    def note(self, kind: str, *details: Any) -> None:
        """Add an event to the trace."""
        self.counts[kind] += 1
        self._trace.update(f"{self.now():.9f} {kind} {details}\n".encode())

    @property
    def trace(self) -> str:
        """Digest of all events so far."""
        return self._trace.hexdigest()

    def violation(self, text: str) -> None:
        """Record what must never happen."""
        self.violations.append(f"{self.now():.3f} s: {text}")

    def wrote(self, block: EncodedBlock) -> None:
        """A block was handed to the store: from now on it may be served, whole or cut at a layer."""
        blobs = self._written.setdefault((block.header.namespace, block.header.key), set())
        blobs.update(block.truncate(fidelity).to_bytes() for fidelity in block.fidelities)

    def known(self, namespace: bytes, key: bytes, blob: bytes) -> bool:
        """Whether these bytes were written under that name."""
        return blob in self._written.get((namespace, key), ())

    def served(self, keys: Sequence[bytes], namespace: bytes, bound: float, blocks: Sequence[EncodedBlock]) -> None:
        """Judge the answer to a fetch of `keys`, root first."""
        self.note("served", len(keys), len(blocks))
        for position, block in enumerate(blocks):
            header = block.header
            self.counts["blocks served"] += 1
            if position >= len(keys) or header.key != keys[position] or header.namespace != namespace:
                self.violation(f"block {position} of a fetch is another than the one asked for")
            elif not self.known(namespace, header.key, block.to_bytes()):
                self.violation(f"block {position} has bytes that nobody wrote under its key")
            elif position and header.parent != keys[position - 1]:
                self.violation(f"block {position} does not continue the one before it")
            own, prefix = header.rows[header.present - 1].distortion, header.provenance.distortion
            if bound and max(own.keys, own.values, prefix.keys, prefix.values) > bound:
                self.violation(f"block {position} is less exact than asked for")

    def ended(self, what: str, began: float, deadline_s: float) -> None:
        """Judge the time that a call with a deadline took."""
        late = self.now() - began - deadline_s
        self.note(what)
        if late > SLACK_S:
            self.violation(f"{what} returned {late:.3f} s after its deadline of {deadline_s:g} s")
