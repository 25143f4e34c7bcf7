"""Asks the hub where a blob's bytes are, by way of the workers. Here and only here. In the daemon's trio thread.

Every answer costs the hub's quota, so a blob is asked for once and the location reused; what the hub says about its quota holds for the
whole node. Used by `manta.fetch.fetcher`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import trio

from manta.errors import Corrupt, MantaError, Throttled, Unavailable
from manta.fetch.retry import ATTEMPTS_MAX, PAUSE_SECONDS, PAUSE_SECONDS_MAX, REFUSALS_MAX
from manta.fetch.sources import Provenance, Sources
from manta.fetch.throttle import Throttles
from manta.fetch.workers import Workers
from manta.hub.origin import Location, Origin, origin_of
from manta.hub.quota import spent_for_s
from manta.wire.messages import Failed, Located

log = logging.getLogger(__name__)

LOCATING_MAX = 16
"""Requests for locations under way: each costs the hub's quota, and a person who opens 1,000 files at once does not need them all now."""

FIRST_ANSWER_SECONDS_MAX = 4.0
"""The first request gets this long, later ones the full deadline: a hub answers in 0.1 to 0.5 s, so that a request without an answer after
this is lost more often than late."""


class Locator:
    """`throttles` is told which origin wants to be left alone, and heeded."""

    def __init__(self, workers: Workers, origin: Origin, deadline_s: float, throttles: Throttles) -> None:
        self._workers = workers
        self._origin = origin
        self._deadline_s = deadline_s
        self._throttles = throttles
        self._asking = trio.CapacityLimiter(LOCATING_MAX)

    def origin_to_ask(self, sources: Sources) -> str:
        """Which origin `ask` would ask."""
        return origin_of(self._request(sources.best)[0])

    async def ask(self, sources: Sources, wanted: Callable[[], bool], paused: Callable[[float], None]) -> Location:
        """The location of the blob that `sources` lead to; the best of them is asked about first.

        Raises what the hub says of the first where every provenance is refused (Denied, Absent, Corrupt), Unavailable when it does not
        answer or no worker can be had, Throttled when it asks for a pause and nothing is `wanted` any more. `paused` hears until when each
        pause is.
        """
        attempts = 0
        refusals: dict[Provenance, MantaError] = {}
        while True:
            provenance = sources.best
            url, headers = self._request(provenance)
            await self._await_pause(origin_of(url), wanted, paused)
            deadline_s = self._deadline_s if attempts else min(self._deadline_s, FIRST_ANSWER_SECONDS_MAX)
            async with self._asking:
                answer = await self._workers.locate(url, headers, deadline_s)
            try:
                return self._read(provenance, url, answer)
            except Throttled:
                # It does not count towards giving up: waiting is what the hub asked for, and readers have their own deadline.
                continue
            except (Unavailable, Corrupt) as e:
                # What contradicts the tree may be as much of an accident as no answer.
                attempts += 1
                if attempts < (ATTEMPTS_MAX if isinstance(e, Unavailable) else REFUSALS_MAX):
                    await trio.sleep(min(PAUSE_SECONDS * 2 ** (attempts - 1), PAUSE_SECONDS_MAX))
                    continue
                if isinstance(e, Unavailable):
                    raise
                refusals[provenance] = e
            except MantaError as e:
                refusals[provenance] = e
            attempts = 0
            if not sources.demote(provenance) or sources.best in refusals:
                raise next(iter(refusals.values()))

    def _request(self, provenance: Provenance) -> tuple[str, dict[str, str]]:
        request = self._origin.location_request(
            provenance.repo, provenance.commit, provenance.entry.path, provenance.access
        )
        return request.url, dict(request.headers)

    async def _await_pause(self, origin: str, wanted: Callable[[], bool], paused: Callable[[float], None]) -> None:
        while (until := self._throttles.until(origin, trio.current_time())) is not None:
            paused(until)
            await trio.sleep_until(until)
            if not wanted():
                raise Throttled(f"{origin} asked for a pause, and nobody waits for this file any more.", 0.0)

    def _read(self, provenance: Provenance, url: str, answer: Located | Failed) -> Location:
        """What `answer` to `url` says; a pause that it asks for holds for the node from now on. Raises the named errors."""
        if isinstance(answer, Failed):
            raise Unavailable(f"{provenance}: {answer.message}. Try again; `manta doctor` checks the way to the hub.")
        now, origin = trio.current_time(), origin_of(url)
        if spent_s := spent_for_s(answer.headers):
            self._throttles.pause(origin, now + spent_s)
        try:
            return self._origin.parse_location(
                provenance.repo,
                provenance.commit,
                provenance.entry,
                provenance.access,
                status=answer.status,
                url=answer.url,
                headers=answer.headers,
                now=time.time(),
            )
        except Throttled as e:
            self._throttles.pause(origin, now + max(e.retry_after_s, PAUSE_SECONDS))
            log.warning("the hub asks for a pause of %.0f s: %s", e.retry_after_s, e.message)
            raise
