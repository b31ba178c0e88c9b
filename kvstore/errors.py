"""Every error that Concertina raises on purpose, and its place on the wire.

::

    ConcertinaError
    ├── ConfigError            a setting is wrong: unknown key, impossible size, missing file
    ├── InvalidInputError      a request or an argument is wrong; the caller must change it
    │   └── LayoutMismatchError  a profile, block or tensor belongs to another model or layout
    ├── CorruptBlockError      bytes that are no valid block (never served: a counted miss)
    ├── NotFoundError          the block, model or node is not there
    ├── CapacityError          full: the arena, a quota, a queue (retry after a while)
    ├── StaleLeaseError        the lease ended, or its node restarted
    ├── AuthenticationError    no credential, or one that nobody knows
    ├── PermissionDeniedError  a known credential that may not do this
    ├── DeadlineError          the deadline passed
    └── TransportError         a peer is gone or does not speak as it should

`reason` is the stable word that goes into ``google.rpc.ErrorInfo``; `retryable` says whether the same call may succeed later.
"""

from __future__ import annotations

from typing import ClassVar


class ConcertinaError(Exception):
    """Base of all errors raised on purpose."""

    reason: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False


class ConfigError(ConcertinaError):
    """A setting is unknown, malformed or impossible. The message names the setting and the mend."""

    reason = "BAD_CONFIG"


class InvalidInputError(ConcertinaError):
    """The caller gave something that can never work. The message names the mend."""

    reason = "INVALID_INPUT"


class LayoutMismatchError(InvalidInputError):
    """A tensor, profile or block was made for another model or layout."""

    reason = "LAYOUT_MISMATCH"


class CorruptBlockError(ConcertinaError):
    """Bytes that do not certify themselves as a block. Counted as a miss, never decoded."""

    reason = "CORRUPT_BLOCK"


class NotFoundError(ConcertinaError):
    """What was asked for is not there."""

    reason = "NOT_FOUND"


class CapacityError(ConcertinaError):
    """No room: arena, quota or queue is full."""

    reason = "NO_CAPACITY"
    retryable = True


class StaleLeaseError(ConcertinaError):
    """The lease has ended, or the node that gave it has restarted."""

    reason = "STALE_LEASE"


class AuthenticationError(ConcertinaError):
    """No credential came with the call, or one that is not known."""

    reason = "UNAUTHENTICATED"


class PermissionDeniedError(ConcertinaError):
    """The credential is known but does not allow this."""

    reason = "PERMISSION_DENIED"


class DeadlineError(ConcertinaError):
    """The deadline of a call passed before it was answered."""

    reason = "DEADLINE_EXCEEDED"
    retryable = True


class TransportError(ConcertinaError):
    """A peer is unreachable, went away, or broke the protocol."""

    reason = "UNAVAILABLE"
    retryable = True


#: Exception class -> name of the gRPC status code. Looked up along the class's MRO, so subclasses inherit.
STATUS_OF_ERROR: dict[type[ConcertinaError], str] = {
    ConfigError: "INVALID_ARGUMENT",
    InvalidInputError: "INVALID_ARGUMENT",
    CorruptBlockError: "DATA_LOSS",
    NotFoundError: "NOT_FOUND",
    CapacityError: "RESOURCE_EXHAUSTED",
    StaleLeaseError: "NOT_FOUND",
    AuthenticationError: "UNAUTHENTICATED",
    PermissionDeniedError: "PERMISSION_DENIED",
    DeadlineError: "DEADLINE_EXCEEDED",
    TransportError: "UNAVAILABLE",
    ConcertinaError: "INTERNAL",
}

#: Name of a gRPC status code -> exception class that a client raises for it.
ERROR_OF_STATUS: dict[str, type[ConcertinaError]] = {
    "INVALID_ARGUMENT": InvalidInputError,
    "OUT_OF_RANGE": InvalidInputError,
    "DATA_LOSS": CorruptBlockError,
    "NOT_FOUND": NotFoundError,
    "RESOURCE_EXHAUSTED": CapacityError,
    "UNAUTHENTICATED": AuthenticationError,
    "PERMISSION_DENIED": PermissionDeniedError,
    "DEADLINE_EXCEEDED": DeadlineError,
    "CANCELLED": DeadlineError,
    "UNAVAILABLE": TransportError,
}


def status_name(error: BaseException) -> str:
    """Name of the gRPC status code for `error`; ``INTERNAL`` for what we did not raise on purpose."""
    for cls in type(error).__mro__:
        if cls in STATUS_OF_ERROR:
            return STATUS_OF_ERROR[cls]
    return "INTERNAL"


def error_for_status(name: str, message: str) -> ConcertinaError:
    """The exception that a client raises when a peer answered with status `name`."""
    return ERROR_OF_STATUS.get(name, TransportError)(message)
