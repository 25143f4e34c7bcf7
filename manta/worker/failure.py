"""Why an order failed, as an exception inside the worker; `manta.worker.service` turns it into a Failed message."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from manta.wire.messages import Reason


class OrderFailed(Exception):
    """`message` is a clause for a sentence, without signed URLs and without tokens. The rest is as in `manta.wire.messages.Failed`."""

    def __init__(
        self,
        reason: Reason,
        message: str,
        status: int = 0,
        retry_after_s: float = 0.0,
        *,
        unreachable: bool = False,
        behind: bool = False,
        holders: Sequence[str] = (),
        origin: str = "",
    ) -> None:
        super().__init__(message)
        self.reason: Reason = reason
        self.message = message
        self.status = status
        self.retry_after_s = retry_after_s
        self.unreachable = unreachable
        self.behind = behind
        self.holders = holders
        self.origin = origin


def disk_failure(e: OSError) -> OrderFailed:
    """What an error of the cache file means for the order."""
    if e.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return OrderFailed("no_space", f"the cache disk is full ({os.strerror(e.errno)})")
    return OrderFailed("cache_broken", f"the cache disk failed ({os.strerror(e.errno or errno.EIO)})")
