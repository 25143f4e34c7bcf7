"""The daemon's own access to the hub, as it changes while the daemon runs, here and only here.

People log in anew (`hf auth login`), log out, and tokens of a browser login are renewed every few hours. A mount must go on with the new
token and not need to be made again. So the daemon's access stays one value for its whole life, which mounts hold and what they have been
shown is noted under; which token goes to the hub for it is looked up when the hub is asked (`latest`).

So with the tokens that mounts came with: a mount's reads ask by a value that says whose they are (`hold`), not by a token. What its pod has
now is looked up when the hub is asked, and nothing once the mount has ended, wherever the value is still noted.
Used by the daemon and, as a function, by `manta.hub.huggingface` and `manta.hub.catalog`. Belongs to the trio thread.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable

import trio

from manta.errors import Invalid, MantaError
from manta.hub.origin import POD, Access, default_access

log = logging.getLogger(__name__)

FOLLOW_S = 5.0
"""How often the saved token is looked at: a small file, read in a thread. A person who logs in tries again after about as long."""

TOKENS_MAX = 16
"""Former tokens of the daemon's own that are known as such: commands that still have one mean the daemon's user."""


_NOBODY = Access(holder=POD)


class Identity:
    """`access` is the daemon's own, with the token that it had at its start. `read` finds the present one, in a thread."""

    def __init__(self, access: Access, read: Callable[[], Access] = default_access) -> None:
        self.access = access
        self._read = read
        self._own: OrderedDict[Access, None] = OrderedDict({access: None})
        self._latest = access
        self._problem = ""  # why the saved token could not be had
        self._held: dict[str, Access] = {}

    def of(self, token: str) -> Access:
        """The access of a command that came with `token`. Without one, or with one of the daemon's own, it is the daemon's."""
        given = Access(token)
        return self.access if not token or given in self._own else given

    def of_pod(self, token: str, *, anonymous: bool) -> Access:
        """The access of a pod: by its token, or `anonymous`, by none; otherwise by the daemon's own. A token of a pod is the pod's, also
        where the daemon happens to have the same. Raises Invalid for a token that none can be, and for one that is not to be used."""
        if token and anonymous:
            raise Invalid("A request with a token cannot be anonymous: leave one of the two away.")
        return Access(token, POD) if token or anonymous else self.access

    def hold(self, mount: str, access: Access) -> Access:
        """What the reads of `mount` ask by from now on, until `release`: the same value whatever `access` is the next time."""
        self._held[mount] = access
        return Access(holder=mount)

    def release(self, mount: str) -> None:
        """The mount has ended: nobody asks by its token any more."""
        self._held.pop(mount, None)

    def is_released(self, access: Access) -> bool:
        """Whether it is of a mount that has ended."""
        return access.holder not in {"", POD} and access.holder not in self._held

    def latest(self, access: Access) -> Access:
        """With what to ask the hub now on behalf of `access`."""
        if access.holder not in {"", POD}:
            access = self._held.get(access.holder, _NOBODY)
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
