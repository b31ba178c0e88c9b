"""What operators set for single tenants, each kind as one small value in the metadata: ``{subject: number}``.

A subject is a tenant, as its credential names it, or a namespace in hexadecimal where nodes ask for no credentials.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvstore.errors import InvalidInputError

from .base import Metadata

#: Subjects that may have a setting of one kind; also the most that a node's record speaks of.
MAX_SUBJECTS = 64
_MAX_SUBJECT_CHARS = 64


@dataclass(frozen=True, slots=True)
class SubjectSetting:
    """One kind of setting.

    Parameters
    ----------
    name : str
        Of the value in the metadata.
    number : str
        What is set, for messages.
    is_valid : callable
        Whether a parsed JSON value is such a number.
    """

    name: str
    number: str
    is_valid: Callable[[Any], bool]

    def parse(self, data: bytes | None) -> dict[str, Any]:
        """The numbers in the metadata's value, by subject. Raises InvalidInputError for a value that we did not write."""
        try:
            found = json.loads(data or b"{}")
        except (ValueError, RecursionError) as error:
            raise InvalidInputError(f"the {self.name} in the metadata are no JSON: {error}") from error
        if not isinstance(found, dict) or not all(map(self.is_valid, found.values())) or len(found) > MAX_SUBJECTS:
            raise InvalidInputError(f"{self.name} are an object of at most {MAX_SUBJECTS} subjects with {self.number} each")
        return found

    async def read(self, metadata: Metadata) -> dict[str, Any]:
        """The numbers as they are now. Raises what the metadata raises, and InvalidInputError like `parse`."""
        return self.parse(await metadata.get_value(self.name))

    async def set(self, metadata: Metadata, subject: str, number: float | None) -> dict[str, Any]:
        """Set the number of `subject`, or with None lift it; all numbers after that.

        Two operators who do this in the same moment may undo each other: the last one counts.

        Raises
        ------
        InvalidInputError
            For an empty or long subject, a number out of range, or one subject too many; and what `read` raises.
        """
        if not subject or len(subject) > _MAX_SUBJECT_CHARS or not subject.isprintable():
            raise InvalidInputError(f"a subject is a tenant or a namespace in hexadecimal, at most {_MAX_SUBJECT_CHARS} letters")
        numbers = await self.read(metadata)
        numbers.pop(subject, None)
        if number is not None:
            numbers[subject] = number
        encoded = json.dumps(numbers, sort_keys=True).encode()
        self.parse(encoded)
        await metadata.set_value(self.name, encoded)
        return numbers


def _is_distortion(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


#: What a tenant may hold in the whole cluster.
QUOTAS = SubjectSetting("quotas", "a number of bytes", lambda value: type(value) is int and value >= 0)
#: The largest relative error of K and V that the ladder may give a tenant's blocks.
FLOORS = SubjectSetting("floors", "a relative error of at least 0", _is_distortion)
