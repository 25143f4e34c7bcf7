"""The daemon's own access to the hub, as it changes while the daemon runs, here and only here.

People log in anew (`hf auth login`), log out, and tokens of a browser login are renewed every few hours. A mount must go on with the new
token and not need to be made again. So the daemon's access stays one value for its whole life, which mounts hold and what they have been
shown is noted under; which token goes to the hub for it is looked up when the hub is asked (`latest`).
Used by the daemon and, as a function, by `manta.hub.huggingface`. Belongs to the trio thread.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable

import trio

from manta.errors import MantaError
from manta.hub.origin import Access, default_access

log = logging.getLogger(__name__)

FOLLOW_S = 5.0
"""How often the saved token is looked at: a small file, read in a thread. A person who logs in tries again after about as long."""

TOKENS_MAX = 16
"""Former tokens of the daemon's own that are known as such: commands that still have one mean the daemon's user."""


class Identity:
    """`access` is the daemon's own, with the token that it had at its start. `read` finds the present one, in a thread."""

    def __init__(self, access: Access, read: Callable[[], Access] = default_access) -> None:
        self.access = access
        self._read = read
        self._own: OrderedDict[Access, None] = OrderedDict({access: None})
        self._latest = access
        self._problem = ""  # why the saved token could not be had

    def of(self, token: str) -> Access:
        """The access of a command that came with `token`. Without one, or with one of the daemon's own, it is the daemon's."""
        given = Access(token)
        return self.access if not token or given in self._own else given

    def latest(self, access: Access) -> Access:
        """With what to ask the hub now on behalf of `access`."""
        return self._latest if access == self.access else access

    async def follow(self) -> None:
        """Looks for another token as long as it is not cancelled."""
        while True:
            await trio.sleep(FOLLOW_S)
            await self.look()

    async def look(self) -> None:
        """Takes the token that is saved now."""
        try:
            found = await trio.to_thread.run_sync(self._read, abandon_on_cancel=True)
        except MantaError as e:
            if e.message != self._problem:  # once, not every few seconds
                log.warning("%s The one from before stays in use.", e.message)
            self._problem = e.message
            return
        self._problem = ""
        if found != self._latest:
            log.info("the token for the hub has changed: %s instead of %s", found.fingerprint, self._latest.fingerprint)
            self._latest = found
            if not found.is_anonymous:
                self._own[found] = None
            if len(self._own) > TOKENS_MAX:
                self._own.popitem(last=False)
