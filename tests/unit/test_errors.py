"""Both error tables: every error has a status, and a status comes back as an error of the same meaning."""

import grpc
import pytest

from kvstore import errors


def all_errors():
    found = [errors.ConcertinaError]
    for cls in found:
        found += cls.__subclasses__()
    return [c for c in found if c.__module__ == errors.__name__]


@pytest.mark.parametrize("cls", all_errors(), ids=lambda c: c.__name__)
def test_every_error_maps_to_a_real_status(cls):
    assert errors.status_name(cls("x")) in grpc.StatusCode.__members__
    assert cls.__name__ in errors.__doc__, "the tree in the docstring names every class"


@pytest.mark.parametrize("name", errors.ERROR_OF_STATUS)
def test_statuses_are_real(name):
    assert name in grpc.StatusCode.__members__


@pytest.mark.parametrize("name", ["INVALID_ARGUMENT", "DATA_LOSS", "NOT_FOUND", "RESOURCE_EXHAUSTED", "UNAUTHENTICATED",
                                  "PERMISSION_DENIED", "DEADLINE_EXCEEDED", "UNAVAILABLE"])  # fmt: skip
def test_round_trip(name):
    assert errors.status_name(errors.error_for_status(name, "m")) == name


def test_foreign_errors_are_internal():
    assert errors.status_name(ValueError()) == "INTERNAL"


def test_reasons_are_distinct():
    reasons = [c.reason for c in all_errors()]
    assert len(set(reasons)) == len(reasons)
