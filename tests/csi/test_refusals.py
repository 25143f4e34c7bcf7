"""Which code an error becomes, and what is final to the kubelet."""

from __future__ import annotations

import grpc
import pytest

from manta import errors
from manta_csi.refusals import CODES, NOT_FINAL, InProgress, Unknown, code, detail, softened


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errors.Invalid("x"), "INVALID_ARGUMENT"),
        (errors.Absent("x"), "NOT_FOUND"),
        (errors.Denied("x"), "PERMISSION_DENIED"),
        (errors.Conflict("x"), "ALREADY_EXISTS"),
        (InProgress("x"), "ABORTED"),
        (Unknown("x"), "NOT_FOUND"),
        (errors.NoSpace("x"), "RESOURCE_EXHAUSTED"),
        (errors.Throttled("x", 1.0), "UNAVAILABLE"),
        (errors.Unreachable("x"), "UNAVAILABLE"),
        (errors.InUse("x"), "UNAVAILABLE"),
        (errors.NotRunning("x"), "UNAVAILABLE"),
        (errors.MantaError("x"), "INTERNAL"),
    ],
)
def test_codes(error: errors.MantaError, expected: str) -> None:
    assert code(error).name == expected


def test_every_error_of_the_daemon_has_its_code() -> None:
    assert [kind for kind in errors.BY_CODE.values() if kind not in CODES] == []


@pytest.mark.parametrize("kind", [*errors.BY_CODE.values(), InProgress, Unknown])
def test_a_republish_is_never_answered_with_something_final(kind: type[errors.MantaError]) -> None:
    assert code(softened(kind("Ask for access."))) in NOT_FINAL
    assert "Ask for access." in softened(kind("Ask for access.")).message


def test_a_sentence_fits_into_an_event() -> None:
    assert detail(errors.Invalid("two\n  lines")) == "two lines"
    assert len(detail(errors.Invalid("x" * 5000))) == 1000
    assert grpc.StatusCode.OK not in CODES.values()
