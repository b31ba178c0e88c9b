"""What goes wrong, as callers see it: status, message, and beside them a stable reason and a delay after which to try again."""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from kvstore.errors import ConcertinaError, status_name

DOMAIN = "concertina"
#: Status -> seconds after which a caller should try again, where nothing better is known.
RETRY_S = {"UNAVAILABLE": 1.0, "RESOURCE_EXHAUSTED": 2.0}


class Details(str):
    """The message of an error together with what `google.rpc.Status` has beside it.

    A str, because that is all that Serve carries of an error from a replica to its proxy. `services.worker.proxy` puts the rest on
    the wire; where that is not installed the message alone arrives.

    Parameters
    ----------
    message : str
    reason : str
        For `google.rpc.ErrorInfo`.
    retry_s : float or None
        For `google.rpc.RetryInfo`.
    """

    reason: str
    retry_s: float | None

    def __new__(cls, message: str, reason: str, retry_s: float | None = None) -> Details:
        made = super().__new__(cls, message)
        made.reason, made.retry_s = reason, retry_s
        return made

    def __reduce__(self) -> tuple:
        return Details, (str(self), self.reason, self.retry_s)

    def trailer(self, code: grpc.StatusCode, metadata: dict[str, str] | None = None) -> tuple[str, bytes]:
        """The entry of gRPC's trailing metadata that carries all of it; `metadata` goes into ErrorInfo."""
        parts = [error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=metadata)]
        if self.retry_s is not None:
            delay = duration_pb2.Duration()
            delay.FromMilliseconds(round(1000 * self.retry_s))
            parts.append(error_details_pb2.RetryInfo(retry_delay=delay))
        status = status_pb2.Status(code=code.value[0], message=str(self))
        for part in parts:
            packed = any_pb2.Any()
            packed.Pack(part)
            status.details.append(packed)
        return "grpc-status-details-bin", status.SerializeToString()


def describe(error: BaseException, retry_s: float | None = None) -> tuple[str, Details]:
    """Name of the gRPC status of `error`, and its details. What we did not raise on purpose is not shown to callers.

    `retry_s` is what is known of the delay; it counts only where trying again may help.
    """
    code = status_name(error)
    message = str(error) if code != "INTERNAL" else f"{type(error).__name__} in the worker; see its log"
    reason = error.reason if isinstance(error, ConcertinaError) else ConcertinaError.reason
    return code, Details(message, reason, (retry_s or RETRY_S[code]) if code in RETRY_S else None)
