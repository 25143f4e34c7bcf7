"""Fetches all of what some mounts show, from their beginning on and behind what anybody reads. Here and only here. In the trio thread.

Unlike a prefetch job it belongs to its mount: it begins again with the daemon, ends with the mount, and does not give up meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import trio

from manta.cache.store import Store
from manta.control.protocol import SMALL_BYTES_MAX
from manta.errors import MantaError
from manta.fetch.fetcher import Fetcher
from manta.fetch.sources import Provenance
from manta.model.snapshot import FileEntry
from manta.operations.mounts import Mounted

log = logging.getLogger(__name__)

FILES_AT_ONCE = 4
"""Of one mount: a file's chunks come side by side anyway, and a node may have begun with many volumes."""

PAUSE_S = 5.0
PAUSE_S_MAX = 300.0
"""Between attempts at what could not be had: doubled from PAUSE_S. What readers want does not wait for this."""


class Warming:
    """`failed` hears why a file could not be had."""

    def __init__(
        self, nursery: trio.Nursery, fetcher: Fetcher, store: Store, failed: Callable[[Provenance, MantaError], None]
    ) -> None:
        self._nursery = nursery
        self._fetcher = fetcher
        self._store = store
        self._failed = failed
        self._scopes: dict[str, trio.CancelScope] = {}

    def begin(self, mounted: Mounted) -> None:
        """Where the mount was asked for so, and not yet begun."""
        if mounted.request.prefetch == "background" and mounted.target is not None and mounted.id not in self._scopes:
            self._scopes[mounted.id] = trio.CancelScope()
            self._nursery.start_soon(self._warm, mounted, self._scopes[mounted.id])

    def end(self, mount_id: str) -> None:
        """The mount is gone. What has come stays."""
        if (scope := self._scopes.pop(mount_id, None)) is not None:
            scope.cancel()

    async def _warm(self, mounted: Mounted, scope: trio.CancelScope) -> None:
        pause_s = PAUSE_S
        with scope:
            while not await self._all(mounted):
                await trio.sleep(pause_s)
                pause_s = min(2 * pause_s, PAUSE_S_MAX)
            log.info("mount %s: all of it is in the cache", mounted.id)

    async def _all(self, mounted: Mounted) -> bool:
        """Whether everything is there, after trying each file once."""
        target, commit = mounted.target, mounted.commit
        assert target is not None
        assert commit is not None
        try:
            snapshot = await mounted.scope.snapshot(target.repo, commit)
        except MantaError as e:
            log.warning("mount %s: nothing is fetched in the background for now: %s", mounted.id, e.message)
            return False
        # What programs read first comes first.
        entries = sorted(snapshot.below(target.subfolder), key=lambda entry: (entry.size > SMALL_BYTES_MAX, entry.path))
        left = iter([entry for entry in entries if entry.size and entry.blob is not None])
        missed = 0

        async def fetch(entries: Iterator[FileEntry]) -> None:
            nonlocal missed
            for entry in entries:
                missed += not await self._fetch(Provenance(target.repo, commit, entry, mounted.scope.access))

        async with trio.open_nursery() as nursery:
            for _ in range(FILES_AT_ONCE):
                nursery.start_soon(fetch, left)
        return not missed

    async def _fetch(self, provenance: Provenance) -> bool:
        blob = provenance.entry.blob
        assert blob is not None
        if (info := self._store.find(blob)) is not None and info.sealed:
            return True
        transfer = None
        try:
            transfer = self._fetcher.open(provenance)
            await transfer.complete()
        except MantaError as e:
            self._failed(provenance, e)
            return False
        finally:
            if transfer is not None:
                self._fetcher.close(transfer)
        return True
