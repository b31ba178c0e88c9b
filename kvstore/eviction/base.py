"""The contract of an eviction policy: it sees events and names victims; it never acts, and never touches a tensor.

The same object runs in a node (ids are block keys) and in the replay (ids are the trace's numbers). Peek is not act: `victim`
changes nothing; the owner carries the decision out and reports it with `removed` or `demoted`.

Prefix semantics: a block is worth nothing once its parent is gone, so a policy offers for dropping only *leaves*: resident blocks
with no resident child. Any block may be demoted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

BlockId = Hashable


@dataclass(frozen=True, slots=True)
class Request:
    """What a policy may know of a request: never its future, its output or its session.

    Parameters
    ----------
    seq : int
        Number in order of arrival; rises by at least one a request.
    now : float
        Seconds on any clock that does not go back.
    input_tokens : int
        Length of the prompt; 0 when not known.
    """

    seq: int
    now: float
    input_tokens: int = 0


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """A block as a policy sees it.

    Parameters
    ----------
    id, parent : hashable
        `parent` is None at the root.
    depth : int
        Number of ancestors in its chain.
    sizes : tuple of int
        Bytes (or units) kept at each rung, rung 0 = full first; one entry where there is no ladder.
    losses : tuple of float
        Share of the block's quality that is gone at each rung (0.0 at rung 0); same length as `sizes`.
    partial : bool
        The block is a prompt's last one and not full.
    """

    id: BlockId
    parent: BlockId | None
    depth: int
    sizes: tuple[int, ...] = (1,)
    losses: tuple[float, ...] = (0.0,)
    partial: bool = False


@dataclass(slots=True)
class Victim:
    """The cheapest loss: `rung` None drops the block, else demotes it to that rung. `value` is what it loses per byte."""

    id: BlockId
    rung: int | None = None
    value: float = 0.0


class EvictionPolicy(ABC):
    """Base of all policies; subclasses add a nested frozen ``Config`` dataclass and are built as ``cls(cls.Config())``."""

    name: ClassVar[str]
    #: Only the replay can run a policy that sees the future; it calls `foresee` before the first `access`.
    sees_future: ClassVar[bool] = False

    @dataclass(frozen=True, slots=True)
    class Config:
        """No settings."""

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()

    @abstractmethod
    def access(self, request: Request, blocks: Sequence[BlockInfo]) -> None:
        """A request used or inserted `blocks` (a chain, root first, each once). Those not resident become resident at rung 0.

        A block that is resident at a lower rung and given here keeps its rung, unless `promoted` is called.
        """

    def foresee(self, requests: Sequence[Sequence[BlockId]]) -> None:
        """Ids that each request is going to use, for policies that see the future; called once, by the replay only."""

    @abstractmethod
    def victim(self, now: float) -> Victim | None:
        """What to take next, or None when nothing may be taken. Changes nothing that a caller can see."""

    @abstractmethod
    def removed(self, id: BlockId) -> None:
        """The block left: evicted on our word, cleared, or lost. Unknown ids are ignored."""

    def demoted(self, id: BlockId, rung: int) -> None:
        """The block now stands at `rung`."""
        raise NotImplementedError(f"policy {self.name} keeps no ladder")

    def promoted(self, id: BlockId) -> None:
        """The block was written again in full and stands at rung 0."""

    def worth(self, request: Request, block: BlockInfo) -> float:
        """Value per byte of the block's next step if the request inserted it now, on the scale of `census`.

        What is worth less than the cluster's waterline would be the next to leave and need not be written. A policy that has no value
        for its blocks wants them all.
        """
        return float("inf")

    def census(self, now: float) -> tuple[np.ndarray, np.ndarray]:
        """Value per byte of the next step, and bytes in units of a block's full size, for each resident block (or a sample).

        The node's pressure report is made from it (`cluster.Pressure.of`); a policy that has no value for its blocks answers
        with empty arrays.
        """
        return np.empty(0), np.empty(0)

    def lessons(self) -> bytes:
        """What this policy learnt from its traffic, for those of other nodes; empty where nothing is learnt."""
        return b""

    def heed(self, lessons: Sequence[bytes]) -> None:
        """Take in the newest `lessons` of all other nodes, in place of those before.

        Raises
        ------
        InvalidInputError
            For bytes that are no lessons of this policy; nothing is heeded then.
        """

    @abstractmethod
    def hold(self, id: BlockId) -> None:
        """Name this block as no victim until `release` (pinned, leased or being written). Holds nest."""

    @abstractmethod
    def release(self, id: BlockId) -> None:
        """Undo one `hold`."""
