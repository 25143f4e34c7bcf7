"""The errors that Manta's parts raise to each other, here and only here.

Every message is a sentence for a person: what was asked, what happened, what to do. No errno lives here: `manta.fuse.errno`
has the only table that turns these into numbers, and `manta.control.protocol` carries them over the control API by their
`code`.
"""

from __future__ import annotations


class MantaError(Exception):
    """Base of every error that a person may see. `code` is stable and goes over the control API and into metrics."""

    code = "error"

    @property
    def message(self) -> str:
        return str(self.args[0]) if self.args else self.code


class Invalid(MantaError):
    """The request itself is wrong: a malformed name, an impossible option, a directory that cannot be mounted on."""

    code = "invalid"


class Absent(MantaError):
    """What was asked for does not exist: a repo, a revision, a path, a blob, a mount."""

    code = "absent"


class Denied(MantaError):
    """The origin or the kernel refuses: gated or private without rights, a bad token, missing privileges."""

    code = "denied"


class Unavailable(MantaError):
    """It may exist and may be allowed, but could not be had in time: origin unreachable, offline mode, deadline passed."""

    code = "unavailable"


class Unreachable(Unavailable):
    """The origin could not be asked at all, or said nothing: no name, no connection, no answer. What `manta.hub.circuit` counts."""


class Throttled(Unavailable):
    """The origin asked us to slow down (HTTP 429). `retry_after_s` is how long it asked us to wait."""

    code = "throttled"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Corrupt(MantaError):
    """Bytes did not match their digest or their declared size."""

    code = "corrupt"


class NoSpace(MantaError):
    """The cache disk is full, or its size limit leaves no room."""

    code = "no_space"


class CacheBroken(MantaError):
    """The cache directory failed: an I/O error, a read-only or vanished directory."""

    code = "cache_broken"


class InUse(MantaError):
    """Something else holds it: another daemon the cache directory, a mount the target, an open file the blob."""

    code = "in_use"


class Conflict(InUse):
    """What has this name already is something else than what was asked for."""

    code = "conflict"


class Superseded(MantaError):
    """The kernel should look the name up again: what it called the file by is not what it should open now. Readers never see it, since
    the kernel does so by itself; where it has no name to look up (/proc/PID/fd), it is not said twice."""

    code = "superseded"


class NotRunning(MantaError):
    """No daemon answers for this cache directory."""

    code = "not_running"


BY_CODE: dict[str, type[MantaError]] = {
    kind.code: kind
    for kind in (
        MantaError,
        Invalid,
        Absent,
        Denied,
        Unavailable,
        Corrupt,
        NoSpace,
        CacheBroken,
        InUse,
        Conflict,
        Superseded,
        NotRunning,
    )
}
"""Error classes by code. `Throttled` and `Unreachable` arrive at clients of the control API as `Unavailable`: they cannot act on it."""
