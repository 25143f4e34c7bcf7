"""Which gRPC code an error becomes, here and only here, and the sentence that kubelet shows with it as an event.

To kubelet CANCELLED, DEADLINE_EXCEEDED, UNAVAILABLE, RESOURCE_EXHAUSTED and ABORTED are not final: it takes the volume for possibly
mounted and will unpublish it. After any other code it takes the volume for not mounted, and a republish that is answered so
costs a running pod its volume. So what may pass by itself is UNAVAILABLE, and a republish is answered with nothing else (`softened`).
"""

from __future__ import annotations

import grpc

from manta.errors import (
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
    Unavailable,
)

DETAIL_CHARACTERS_MAX = 1000
"""Of one sentence: the API server takes 1024 characters of an event's message, and kubelet writes some words before ours."""


class InProgress(MantaError):
    """Something is being done with the same target."""

    code = "in_progress"


class Unknown(MantaError):
    """No volume of ours is published at the path."""

    code = "unknown"


CODES: dict[type[MantaError], grpc.StatusCode] = {
    Invalid: grpc.StatusCode.INVALID_ARGUMENT,
    Absent: grpc.StatusCode.NOT_FOUND,
    Denied: grpc.StatusCode.PERMISSION_DENIED,
    Unknown: grpc.StatusCode.NOT_FOUND,
    Conflict: grpc.StatusCode.ALREADY_EXISTS,
    InProgress: grpc.StatusCode.ABORTED,
    NoSpace: grpc.StatusCode.RESOURCE_EXHAUSTED,
    # All of these may pass: the hub is away, the daemon is, or it is being replaced by another version.
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    NotRunning: grpc.StatusCode.UNAVAILABLE,
    CacheBroken: grpc.StatusCode.UNAVAILABLE,
    Corrupt: grpc.StatusCode.UNAVAILABLE,
    InUse: grpc.StatusCode.UNAVAILABLE,
    Superseded: grpc.StatusCode.UNAVAILABLE,
    MantaError: grpc.StatusCode.INTERNAL,
}

NOT_FINAL = {
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
}


def code(error: MantaError) -> grpc.StatusCode:
    """The code of an error: that of its class, or of the nearest one above it."""
    return next(CODES[kind] for kind in type(error).__mro__ if kind in CODES)


def detail(error: MantaError) -> str:
    """The sentence, on one line and no longer than an event may be."""
    text = " ".join(error.message.split())
    return text if len(text) <= DETAIL_CHARACTERS_MAX else f"{text[: DETAIL_CHARACTERS_MAX - 3]}..."


def softened(error: MantaError) -> MantaError:
    """What a republish says instead: the volume stays as it is, and kubelet asks again."""
    if code(error) in NOT_FINAL:
        return error
    return Unavailable(f"The volume stays mounted as it is. {error.message}")
