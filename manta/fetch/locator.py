"""Asks the hub where a blob's bytes are, by way of the workers. Here and only here. In the daemon's trio thread.

Every answer costs the hub's quota, so a blob is asked for once and the location reused; what the hub says about its quota holds for the
whole node. Used by `manta.fetch.fetcher`.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable
from urllib.parse import urlsplit

import trio

from manta.errors import Corrupt, Invalid, MantaError, Throttled, Unavailable
from manta.fetch.retry import ATTEMPTS_MAX, PAUSE_SECONDS, PAUSE_SECONDS_MAX, REFUSALS_MAX
from manta.fetch.sources import Provenance
from manta.fetch.throttle import HEARD_SECONDS_MAX, Throttles
from manta.fetch.transfer import Transfer
from manta.fetch.workers import Workers
from manta.hub.circuit import Circuits
from manta.hub.origin import Location, Origin, origin_of
from manta.hub.quota import spent_for_s
from manta.model.ids import BlobId
from manta.telemetry.events import Telemetry
from manta.wire.messages import Failed, Located

LOCATING_MAX = 16
"""Requests for locations under way: each costs the hub's quota, and a person who opens 1,000 files at once does not need them all now."""

FIRST_ANSWER_SECONDS_MAX = 4.0
"""The first request gets this long, later ones the full deadline: a hub answers in 0.1 to 0.5 s, so that a request without an answer after
this is lost more often than late."""


class Locator:
    """`throttles` and `circuits` are told which origin wants to be left alone or is out of reach, and heeded. `telemetry` hears of all.
    `shared` asks the node that asks the hub for all nodes; None: there are no others."""

    def __init__(
        self,
        workers: Workers,
        origin: Origin,
        deadline_s: float,
        throttles: Throttles,
        circuits: Circuits,
        elsewhere: Callable[[BlobId], Iterable[Provenance]],
        telemetry: Telemetry,
        shared: Callable[[Provenance], Awaitable[Location | None]] | None = None,
    ) -> None:
        self._shared = shared
        self.origin = origin_of(origin.endpoint)
        """Who is asked."""
        self._workers = workers
        self._origin = origin
        self._deadline_s = deadline_s
        self._throttles = throttles
        self._circuits = circuits
        self._elsewhere = elsewhere
        self._telemetry = telemetry
        self._asking = trio.CapacityLimiter(LOCATING_MAX)

    async def ask(self, transfer: Transfer, wanted: Callable[[], bool], *, shared: bool = True) -> Location:
        """The location of the transfer's blob; the best of its sources is asked about first. `shared`: another node may be asked.

        Raises what the hub says of the first where every provenance is refused (Denied, Absent, Corrupt), Unavailable when it does not
        answer or no worker can be had, Throttled when it asks for a pause and nothing is `wanted` any more.
        """
        sources, attempts = transfer.sources, 0
        refusals: dict[Provenance, MantaError] = {}
        while True:
            provenance = sources.best
            url, headers = self._request(provenance)
            if shared and self._shared is not None:
                shared = False  # once: then we ask ourselves
                try:
                    if (told := await self._shared(provenance)) is not None and self._believable(told):
                        sources.located_by = provenance
                        return told
                except Throttled as e:
                    pause_s = min(max(e.retry_after_s, PAUSE_SECONDS), HEARD_SECONDS_MAX)
                    self._throttles.pause(self.origin, trio.current_time() + pause_s, own=False)
            await self._until_it_may_be_asked(transfer, wanted)
            deadline_s = self._deadline_s if attempts else min(self._deadline_s, FIRST_ANSWER_SECONDS_MAX)
            began = trio.current_time()
            asked = self._telemetry.question(transfer.blob.id, transfer.name, self.origin)
            async with self._asking:
                answer = await self._workers.locate(url, headers, deadline_s)
            try:
                location = self._read(provenance, answer, began)
            except Throttled as e:
                asked.failed(e)
                # It does not count towards giving up: waiting is what the hub asked for, and readers have their own deadline.
                continue
            except (Unavailable, Corrupt) as e:
                asked.failed(e)
                # What contradicts the tree may be as much of an accident as no answer.
                attempts += 1
                transfer.trouble = answer.message if isinstance(answer, Failed) else e.message
                if attempts < (ATTEMPTS_MAX if isinstance(e, Unavailable) else REFUSALS_MAX):
                    await trio.sleep(min(PAUSE_SECONDS * 2 ** (attempts - 1), PAUSE_SECONDS_MAX))
                    continue
                if isinstance(e, Unavailable):
                    raise
                refusals[provenance] = e
            except MantaError as e:
                asked.failed(e)
                refusals[provenance] = e
            else:
                asked.answered(location.origin)
                sources.located_by = provenance
                return location
            attempts = 0
            if len(refusals) >= ATTEMPTS_MAX or not sources.turn_to(provenance, refusals, self._elsewhere):
                raise next(iter(refusals.values()))

    def _believable(self, told: Location) -> bool:
        """Whether that can be where the hub has bytes: as with the hub's own word, nothing unencrypted where it is not; and where it is,
        nowhere else but there. Whoever has the cluster's key must not send us to what only this machine can reach.
        """
        try:
            encrypted = told.origin.startswith("https:")
        except Invalid:
            return False
        if set(told.headers) - {"user-agent", "accept-encoding"}:
            return False
        return encrypted or (
            not self.origin.startswith("https:") and urlsplit(told.url).hostname == urlsplit(self.origin).hostname
        )

    def _request(self, provenance: Provenance) -> tuple[str, dict[str, str]]:
        request = self._origin.location_request(
            provenance.repo, provenance.commit, provenance.entry.path, provenance.access
        )
        return request.url, dict(request.headers)

    async def _until_it_may_be_asked(self, transfer: Transfer, wanted: Callable[[], bool]) -> None:
        """Returns when the hub is neither in a pause nor out of reach, or this is to be a probe."""
        while (until := self._throttles.until(self.origin, trio.current_time())) is not None:
            transfer.pause(until)
            await trio.sleep_until(until)
            if not wanted():
                raise Throttled(f"{self.origin} asked for a pause, and nobody waits for this file any more.", 0.0)
        circuit = self._circuits.of(self.origin)
        while not circuit.admits(trio.current_time()):  # noqa: ASYNC110 - it is pure and has nothing to wait on
            await trio.sleep(circuit.wait_s(trio.current_time()))

    def _read(self, provenance: Provenance, answer: Located | Failed, began: float) -> Location:
        """What `answer` to a question of `began` says; what it says of the hub holds for the node from now on. Raises the named errors."""
        now, circuit = trio.current_time(), self._circuits.of(self.origin)
        if isinstance(answer, Failed):
            advice = "Try again; `manta doctor` checks the way to the hub."
            if answer.unreachable:
                circuit.failed(began, now, f"{answer.message}. {advice}")
            raise Unavailable(f"{provenance}: {answer.message}. {advice}")
        circuit.answered(now)
        self._origin.note_headers(answer.headers)
        if spent_s := spent_for_s(answer.headers):
            self._throttles.pause(self.origin, now + spent_s)
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
            pause_s = max(e.retry_after_s, PAUSE_SECONDS)
            self._throttles.pause(self.origin, now + pause_s)
            self._telemetry.throttled(self.origin, pause_s, "location")
            raise
