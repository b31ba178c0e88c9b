"""Outcome of one block in a call; the numbers are those of `BlockStatus` on the wire (a contract test compares them)."""

from __future__ import annotations

from enum import IntEnum


class Status(IntEnum):
    """What became of a block."""

    OK = 1
    NOT_FOUND = 2
    RESOURCE_EXHAUSTED = 3
    DATA_LOSS = 4
    ALREADY_EXISTS = 5
    BUSY = 6
