"""The one table from errors to errno."""

from __future__ import annotations

import errno

import pytest

from manta.errors import (
    BY_CODE,
    Absent,
    CacheBroken,
    Conflict,
    Corrupt,
    Denied,
    InUse,
    Invalid,
    MantaError,
    NoSpace,
    NotRunning,
    Superseded,
    Throttled,
    Unavailable,
)
from manta.fuse.errno import errno_of

EXPECTED: dict[type[MantaError], int] = {
    Absent: errno.ENOENT,
    Denied: errno.EACCES,
    Invalid: errno.EINVAL,
    NoSpace: errno.ENOSPC,
    InUse: errno.EBUSY,
    Conflict: errno.EBUSY,
    Superseded: errno.ESTALE,
    Unavailable: errno.EIO,
    Corrupt: errno.EIO,
    CacheBroken: errno.EIO,
    NotRunning: errno.EIO,
    MantaError: errno.EIO,
}


@pytest.mark.parametrize("kind", BY_CODE.values(), ids=lambda kind: kind.code)
def test_every_error_has_its_number(kind: type[MantaError]) -> None:
    assert errno_of(kind("x")) == EXPECTED[kind]


def test_a_kind_of_an_error_has_its_number() -> None:
    assert errno_of(Throttled("x", 3.0)) == errno.EIO

    class Masked(Denied):
        pass

    assert errno_of(Masked("x")) == errno.EACCES


@pytest.mark.parametrize("error", [RuntimeError(), KeyError("x"), OSError(errno.ENOENT, "x"), KeyboardInterrupt()])
def test_what_nobody_foresaw_is_an_input_output_error(error: BaseException) -> None:
    assert errno_of(error) == errno.EIO


def test_no_error_says_that_a_call_is_not_implemented() -> None:
    """The kernel would never ask again, for the life of the mount."""
    assert errno.ENOSYS not in {errno_of(kind("x")) for kind in BY_CODE.values()}
