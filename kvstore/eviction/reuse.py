"""How soon a block of a class is used again: a hazard learnt online, and the Gittins index that follows from it.

For every reuse class and age bucket the model counts uses (a block of that age was used again) and exposure (seconds that blocks of
the class spent at that age, whether they were used, are still waiting, or were forgotten). Hazard = uses / exposure, shrunk to what the
class's *traits* let expect: the hazard of all blocks at that age, times one factor for each trait, fitted in a few zones of age. So what
is learnt of one class serves all that share a trait with it, and there may be more classes than each could learn for itself. The
Gittins index of a block of age a is the best ratio of
"chance that it is used within a horizon" to "expected time it waits for that", over all horizons (Gittins, 1979; for caches see
Beckmann et al., LHD, NSDI'18, which takes one fixed horizon). It ranks blocks by hits per byte and second, and unlike the hazard of
the moment it looks past a pause.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from ..errors import InvalidInputError

#: Lower edges of the age buckets in seconds: 0, then steps of the square root of 2 from 1 s to 2.3 hours.
EDGES_S: tuple[float, ...] = (0.0, *(2.0 ** (i / 2) for i in range(27)))
_WIDTH_S = np.array([b - a for a, b in pairwise(EDGES_S)] + [EDGES_S[-1]])
_AGE_S = np.array(EDGES_S)
_BUCKETS = len(EDGES_S)
#: First buckets of the zones in which a trait has one factor: from 0, 23, 91, 362 and 1,448 seconds on.
_ZONES = np.array([0, 10, 14, 18, 22])
_ZONE_OF = np.searchsorted(_ZONES, np.arange(_BUCKETS), side="right") - 1
#: Sweeps over all traits in one fit, and the weight of "no effect" in each factor, in requests.
_SWEEPS, _NO_EFFECT_REQUESTS = 4, 5.0


def bucket(age_s: float) -> int:
    """Age bucket of an age in seconds, >= 0."""
    return bisect_right(EDGES_S, age_s) - 1


class ReuseModel:
    """Learns `values[class][bucket]`, the Gittins index in uses a second.

    Parameters
    ----------
    traits : sequence of sequences of int
        For each class the value of each of its traits, from 0 on; empty for a class that shares nothing with others.
    prior_requests : float
        Weight of what the traits let expect in a class's hazard, in requests: blocks that one request uses are one observation, not many.
    memory : float
        Share of the old counts that survives one `learn`.
    """

    def __init__(self, traits: Sequence[Sequence[int]], prior_requests: float = 20.0, memory: float = 1.0) -> None:
        self._alike = np.array([bool(of) for of in traits])  # by class
        columns = np.array([of for of in traits if of]).T
        self._traits = [(column, (np.arange(column.max() + 1)[:, None] == column).astype(np.float64)) for column in columns]
        self.prior_requests = prior_requests
        self.memory = memory
        shape = (len(traits), len(EDGES_S))
        self._requests = 0.0
        self._uses = np.zeros(shape, dtype=np.float32)
        self._forgotten = np.zeros(shape, dtype=np.float32)
        self._ends = np.zeros(shape, dtype=np.float32)
        self._others = np.zeros((2, 1, 1))  # of the shape of the others' lessons once there are any
        self._new_uses = array("f", bytes(4 * self._uses.size))  # class by class
        self._new_forgotten = array("f", bytes(4 * self._uses.size))
        self.values = [array("f", [1.0 / (edge + 1.0) for edge in EDGES_S]) for _ in traits]

    def used(self, cls: int, age_s: float, weight: float = 1.0) -> None:
        """Blocks of class `cls`, of together this weight, were used at this age."""
        self._new_uses[cls * _BUCKETS + bisect_right(EDGES_S, age_s) - 1] += weight

    def forgot(self, cls: int, age_s: float, weight: float = 1.0) -> None:
        """A block of the class reached this age and will be watched no longer."""
        self._new_forgotten[cls * _BUCKETS + bisect_right(EDGES_S, age_s) - 1] += weight

    def learn(self, waiting: np.ndarray, requests: int) -> None:
        """Set `values` from all counts, after `requests` more, and from the weight of the blocks that still wait, ``[class, bucket]``."""
        self._requests = self._requests * self.memory + requests
        for total, new in ((self._uses, self._new_uses), (self._forgotten, self._new_forgotten)):
            total *= self.memory
            total += np.array(new).reshape(total.shape)
            new[:] = array("f", bytes(4 * len(new)))
        self._ends[:] = self._uses + self._forgotten + waiting
        uses, ends = self._others + np.stack((self._uses, self._ends))
        beyond = np.cumsum(ends[:, ::-1], axis=1)[:, ::-1] - ends
        exposure_s = beyond * _WIDTH_S + ends * _WIDTH_S / 2
        request_uses = max(self._uses.sum() / self._requests, 0.1)
        prior_uses = self.prior_requests * request_uses
        prior_s = prior_uses / self._expected(uses, exposure_s, _NO_EFFECT_REQUESTS * request_uses)
        hazard = (uses + prior_uses) / (exposure_s + prior_s)
        self.values = [array("f", row.tobytes()) for row in gittins(hazard).astype(np.float32)]

    def _expected(self, uses: np.ndarray, exposure_s: np.ndarray, no_effect: float) -> np.ndarray:
        """Hazard that the traits of each class let expect: one factor a trait and zone of age, by iterative proportional fitting."""
        alike = self._alike
        pooled, pooled_s = uses.copy(), exposure_s.copy()
        pooled[alike], pooled_s[alike] = uses[alike].sum(0), exposure_s[alike].sum(0)
        base = (pooled + 0.02) / (pooled_s + 20.0 * (_AGE_S + 1.0))
        seen = np.add.reduceat(uses[alike], _ZONES, axis=1)
        awaited = np.add.reduceat((exposure_s * base)[alike], _ZONES, axis=1)
        risk = np.ones_like(seen)
        for _ in range(_SWEEPS):
            for value, members in self._traits:
                risk *= ((members @ seen + no_effect) / (members @ (awaited * risk) + no_effect))[value]
        base[alike] *= risk[:, _ZONE_OF]
        return base

    def lessons(self) -> bytes:
        """Own counts at the last `learn`, for the models of other nodes: uses and ends, float32, ``[2, class, bucket]``."""
        return np.stack((self._uses, self._ends)).astype("<f4").tobytes()

    def heed(self, lessons: Iterable[bytes]) -> None:
        """Count from the next `learn` on what other nodes learnt, in place of what was heeded before.

        Raises
        ------
        InvalidInputError
            For lessons of another shape, or counts that are negative or not finite; nothing is heeded then.
        """
        others = np.zeros((2, *self._uses.shape))
        for lesson in lessons:
            if len(lesson) != 4 * others.size:
                raise InvalidInputError(f"lessons of {len(lesson)} bytes do not fit a model of {4 * others.size}")
            counts = np.frombuffer(lesson, dtype="<f4").reshape(others.shape)
            if not (np.isfinite(counts).all() and (counts >= 0).all() and (counts[0] <= counts[1]).all()):
                raise InvalidInputError("lessons with impossible counts")
            others += counts
        self._others = others


def gittins(hazard: np.ndarray) -> np.ndarray:
    """Gittins index for a hazard that is constant within each age bucket.

    Parameters
    ----------
    hazard : array [class, bucket]
        Uses a second.

    Returns
    -------
    array [class, bucket]
        max over b > a of (S[a] - S[b]) / integral of S from a to b, with S the chance to be unused at an edge.
    """
    steps = hazard * _WIDTH_S
    zero = np.zeros((len(hazard), 1))
    survival = np.exp(-np.concatenate([zero, np.cumsum(steps, axis=1)], axis=1))
    drop = survival[:, :-1] - survival[:, 1:]
    spent = np.where(steps > 1e-9, drop / np.maximum(hazard, 1e-12), survival[:, :-1] * _WIDTH_S)
    waited = np.concatenate([zero, np.cumsum(spent, axis=1)], axis=1)
    best = np.zeros_like(hazard)
    for end in range(1, hazard.shape[1] + 1):  # the horizon
        gain = survival[:, :end] - survival[:, end : end + 1]
        cost = np.maximum(waited[:, end : end + 1] - waited[:, :end], 1e-12)
        np.maximum(best[:, :end], gain / cost, out=best[:, :end])
    return best
