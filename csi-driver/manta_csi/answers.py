"""How a call is answered, here and only here: errors become codes and sentences, and each call is logged without what it carried.

Requests are never formatted: they hold secrets.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable
from typing import Any, TypeVar

import grpc
import grpc.aio

from manta.errors import MantaError
from manta_csi.logs import fields, redacted
from manta_csi.refusals import code, detail

log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")


async def answer(
    context: grpc.aio.ServicerContext[Any, Any],
    call: str,
    work: Awaitable[_Answer],
    *,
    volume: str = "",
    target: str = "",
) -> _Answer:
    """What `work` returns; or the call is aborted with what it raised."""
    began = time.monotonic()

    def told(**more: object) -> dict[str, object]:
        shown = {"call": call, "volume": ascii(volume[:128])[1:-1], "target": ascii(target[:512])[1:-1]}
        return fields(**shown, milliseconds=round(1000 * (time.monotonic() - began)), **more)

    try:
        result = await work
    except MantaError as error:
        status, sentence = code(error), redacted(detail(error))
        log.warning("%s", sentence, extra=told(code=status.name))
        await context.abort(status, sentence)
    except Exception as error:
        log.exception("%s failed", call, extra=told(code="INTERNAL"))
        await context.abort(
            grpc.StatusCode.INTERNAL,
            f"The CSI driver failed ({type(error).__name__}), which is a defect; its log has the trace.",
        )
    log.debug("answered", extra=told(code="OK"))
    return result
