"""The daemon: the composition root. Builds everything, opens the one nursery, offers the control API, ends in order.

One daemon owns a cache directory, its workers, and one FUSE filesystem whose directories are the mounts. `run` is called by `manta daemon`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Container, Iterator
from pathlib import Path

import trio

from manta import __version__
from manta.cache import descriptors
from manta.cache.layout import node_id
from manta.cache.metadata import MetadataStore, decode_snapshot
from manta.cache.pins import Pins
from manta.cache.store import Blob, Store
from manta.config import Config, parse_address
from manta.control.http import Answer
from manta.control.metrics import MetricsServer
from manta.control.metrics import listen as listen_for_metrics
from manta.control.protocol import (
    Bound,
    CacheListing,
    CacheSelection,
    FileTransfer,
    GcRequest,
    Job,
    Mount,
    MountRequest,
    PageLink,
    Peers,
    PrefetchRequest,
    Publication,
    Quota,
    Removal,
    Running,
    Source,
    Status,
    VerifyRequest,
)
from manta.control.server import ControlServer
from manta.errors import Absent, Corrupt, InUse, MantaError, NotRunning, Unavailable
from manta.fetch.fetcher import Fetcher
from manta.fetch.scheduler import Priority
from manta.fetch.sealer import Sealer
from manta.fetch.sources import Provenance
from manta.fetch.swarm import Swarm
from manta.fetch.transfer import Transfer
from manta.fetch.workers import WorkerPool
from manta.fs.filesystem import Filesystem
from manta.fs.journal import Journal, NoJournal, Recovered
from manta.fuse.rootmount import RootMount, detach_stale, first_of, make, refuse_if_held
from manta.hub.catalog import Catalog
from manta.hub.circuit import Circuits
from manta.hub.huggingface import HuggingFaceHub
from manta.hub.identity import Identity
from manta.hub.neighbours import Neighbours
from manta.hub.origin import Access, default_access, origin_of
from manta.keeper import RESTART
from manta.model.ids import BlobId, parse_target
from manta.model.snapshot import Snapshot
from manta.operations.failures import Failures
from manta.operations.housekeeping import Housekeeping
from manta.operations.jobs import Jobs
from manta.operations.keeping import Keeping
from manta.operations.mounts import Mounted, Mounts
from manta.operations.peers import PeerView
from manta.operations.publications import Publications
from manta.operations.remote_keeping import RemoteKeeping
from manta.operations.room import Room
from manta.operations.sharing import Sharing
from manta.operations.verification import Verification
from manta.operations.volumes import volumes
from manta.operations.warming import Warming
from manta.operations.watchdog import Watchdog
from manta.swarm.auth import PAGE_SECONDS_MAX, sign_page
from manta.swarm.keys import check, read_keys
from manta.telemetry import logs
from manta.telemetry.events import PeerSource, Telemetry
from manta.telemetry.metrics import CONTENT_TYPE, QuotaLeft, State

log = logging.getLogger(__name__)

LINGER_SECONDS = 1.0
"""An ephemeral daemon stays this long without a mount, a job or a client: a script that unmounts and mounts again finds it still there."""

DISK_SECONDS_MAX = 2.0
"""A disk that does not say in this time how much is free is left out of the metrics: they are looked at when disks fail."""


KEPT = frozenset({"fuse", "journal"})
"""What a keeper holds: the connection to the kernel, and what the next daemon must know."""


class Daemon:
    """Everything that runs, and the control API over it. `run` builds it and returns when it is told to stop."""

    def __init__(self, config: Config, store: Store, ephemeral: bool, keeping: Keeping) -> None:
        self._config = config
        self._store = store
        self._ephemeral = ephemeral
        self._keeping = keeping
        self.handing_over = False
        """Whether it ends to be followed by another, which takes over its mounts."""
        self._followed = False
        """Whether it was told to end by a signal, and another follows all the same: in a container, whose keeper is not told."""
        self._started = time.time()
        self._asking_disk = trio.CapacityLimiter(1)  # one that hangs takes one thread, not one per scrape
        self._direct = os.geteuid() != 0
        self._telemetry = Telemetry()
        self._failures = Failures()
        self._stopping = trio.Event()
        self._hurrying = trio.Event()
        self._watchdog: Watchdog
        self._stirred = trio.Event()  # something ended that may have been the last
        self._metadata = MetadataStore(store.layout.meta)
        self._pins = Pins(store.layout.pins)
        self._room = Room(store, self._pins, config.cache, self._mounted_blobs, self._telemetry)
        self._workers = WorkerPool(config.fetch.workers, self._telemetry)
        self._sealer = Sealer(
            self._workers, self._failed, lambda transfer: self._forget_pages(transfer.blob.id), self._telemetry
        )
        self._hub = HuggingFaceHub(config.hub, self._latest_access)
        self._circuits = Circuits()
        self._swarm = self._join()
        self._fetcher = Fetcher(
            store,
            self._workers,
            None if config.hub.offline else self._hub,
            config.fetch,
            self._failed,
            self._sealer.grown,
            self._circuits,
            self._room,
            self._provenances,
            self._telemetry,
            self._swarm,
            config.swarm.download_rate,
        )
        self._peer_view = PeerView(config.swarm)
        # Built in `run`, where there is a nursery.
        self._mounts: Mounts
        self._publications: Publications
        self._warming: Warming
        self._jobs: Jobs
        self._identity: Identity
        self._filesystem: Filesystem
        self._housekeeping: Housekeeping
        self._control: ControlServer
        self._root: RootMount
        self._journal: Journal
        self._nursery: trio.Nursery

    # Life ------------------------------------------------------------------------------------------------------------

    async def run(self, ready: _Readiness, watchdog: Watchdog) -> None:
        """Serves until stopped. Raises what keeps it from starting. `watchdog` is started when the end begins."""
        self._watchdog = watchdog
        token = trio.lowlevel.current_trio_token()

        def told(again: bool) -> None:
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(self._stop, again)

        watchdog.heed_signals(told)
        config = self._config
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._identity = Identity(await trio.to_thread.run_sync(default_access))
            catalog = Catalog(
                self._hub,
                self._metadata,
                nursery,
                offline=config.hub.offline,
                timeout_s=config.hub.timeout_s,
                owner=self._identity.access,
                circuit=self._circuits.of(origin_of(self._hub.endpoint)),
                neighbours=self._neighbours(),
                latest=self._identity.latest,
            )
            journal, recovered = await self._open_journal()
            self._journal = journal
            self._mounts = Mounts(
                catalog,
                self._store,
                None if self._direct else config.mount_root,
                self._mount_gone,
                journal,
                self._identity,
            )
            self._publications = Publications(self._mounts, self._identity, self._keep, self._fetcher.forget)
            self._warming = Warming(nursery, self._fetcher, self._store, self._failures.add)
            self._filesystem = Filesystem(
                self._mounts.folder,
                self,
                self._telemetry,
                fill=config.fetch.fill,
                onward=self._begin_next_part if config.fetch.fill and self._swarm is not None else None,
                complete_bytes_max=config.fuse.complete_at_open,
                journal=journal,
                whole=self._mounts.opens_whole,
            )
            self._root = RootMount(
                self._filesystem,
                config.fuse,
                f"manta:{config.instance_dir.name}",
                config.instance_dir,
                self._failures.add_general,
                self._unmounted,
            )
            verification = Verification(
                self._store, self._metadata, self._workers, self._fetcher, self._forget_pages, self._telemetry
            )
            self._jobs = Jobs(nursery, catalog, self._fetcher, self._store, verification, self._stir)
            self._housekeeping = Housekeeping(
                self._store, self._metadata, self._pins, config.cache, self._room, self._mounted_blobs, self._telemetry
            )
            self._control = ControlServer(self, config.socket_path)
            await nursery.start(self._fetcher.run)
            nursery.start_soon(self._workers.run)
            self._begin_sharing(catalog)
            nursery.start_soon(self._sealer.run, self._fetcher)
            nursery.start_soon(self._room.run, self._fetcher)
            nursery.start_soon(self._identity.follow)
            listener = None
            try:
                if not self._direct and (recovered is None or not await self._take_over(recovered)):
                    detach_stale(config.mount_root)
                    await make(config.mount_root)
                    await self._mount(config.mount_root)
                    await self._have_it_kept()
                listener = await self._control.listen()
                nursery.start_soon(self._control.serve, listener)
                nursery.start_soon(self._root.watch, self._drop_unbound)
                await self._serve_metrics()
                nursery.start_soon(self._keeping.watch)
                self._keeping.ready()
                ready.announce(None)
                log.info("manta %s serves %s, pid %d", __version__, config.cache.dir, os.getpid())
                await self._until_stopped()
            finally:
                self._watchdog.start()
                # Also where it fails in a way that nobody foresaw: the next one goes on.
                followed = self.handing_over or self._followed or not self._stopping.is_set()
                leaving = self._survives and followed
                if not leaving and not self.handing_over:
                    self._keeping.stopping()
                with trio.CancelScope(shield=True):
                    if leaving:
                        await self._root.leave()
                    else:
                        await self._root.end(self._hurrying)
                        await self._let_go()
                    if listener is not None:
                        await listener.aclose()
                        config.socket_path.unlink(missing_ok=True)
                nursery.cancel_scope.cancel()

    async def _until_stopped(self) -> None:
        """Returns when told to stop, or, when ephemeral, with the last mount, job and client."""
        while not self._stopping.is_set():
            self._stirred = trio.Event()
            with trio.move_on_after(LINGER_SECONDS) as idle:
                await first_of(self._stopping, self._stirred)
            if idle.cancelled_caught and self._ephemeral and not self._busy:
                log.info("nothing is mounted any more: leaving")
                self._stopping.set()

    @property
    def _busy(self) -> bool:
        return bool(len(self._mounts) or self._jobs.running or self._control.connected)

    def _stop(self, again: bool) -> None:
        """A signal came."""
        if not self._stopping.is_set() and self._keeping.kind == "store" and len(self._mounts):
            self._followed = True
        self._stopping.set()
        if again:
            self._hurrying.set()

    def _stir(self) -> None:
        self._stirred.set()

    def _failed(self, provenance: Provenance, error: MantaError) -> None:
        self._failures.add(provenance, error)
        self._telemetry.gave_up(error)

    # Other nodes -----------------------------------------------------------------------------------------------------

    def _join(self) -> Swarm | None:
        """The other nodes, where the configuration names any. Raises what makes that impossible."""
        config = self._config.swarm
        if not config.peers:
            return None

        def keys() -> tuple[bytes, ...]:
            return read_keys(config.key_file, os.environ)

        check(config, keys())
        return Swarm(config, node_id(self._store.layout), str(self._config.cache.dir), keys, self._telemetry)

    def _neighbours(self) -> Neighbours | None:
        swarm = self._swarm
        return None if swarm is None else Neighbours(swarm.ask_owner, swarm.ask_any, decode_snapshot)

    def _begin_sharing(self, catalog: Catalog) -> None:
        if self._swarm is None:
            return
        sharing = Sharing(
            self._swarm,
            self._fetcher,
            self._store,
            catalog,
            self._metadata,
            lambda: self._identity.access,
            self._mounted_snapshots,
            __version__,
            self._started,
        )
        swarm = self._swarm
        self._peer_view = PeerView(
            self._config.swarm, sharing, lambda until: sign_page(swarm.keys, until - PAGE_SECONDS_MAX)
        )
        sharing.page = self._peer_view.page_json
        self._nursery.start_soon(swarm.run, self._fetcher, sharing.answer)

    def _begin_next_part(self, provenance: Provenance) -> None:
        """Begins with the next part of a model that is cut into parts, when one is being read and not only looked at (`ONWARD_SHARE`).

        Nodes that start together take what each owns of a part from the origin and then give it to each other: at a part's end the
        origin's link would be idle, and at the next one's beginning theirs.
        """
        snapshot = next(
            (s for s in self._mounted_snapshots() if (s.repo, s.commit) == (provenance.repo, provenance.commit)), None
        )
        entry = None if snapshot is None else snapshot.next_part(provenance.entry.path)
        if entry is None or entry.blob is None:
            return
        with contextlib.suppress(MantaError):  # whoever opens it is told what is wrong
            transfer = self._fetcher.open(Provenance(provenance.repo, provenance.commit, entry, provenance.access))
            transfer.want_whole(Priority.FILL)
            self._fetcher.close(transfer)

    def _mounted_snapshots(self) -> Iterator[Snapshot]:
        for mounted in self._mounts:
            yield from mounted.scope.held.values()

    async def _serve_metrics(self) -> None:
        """Where the configuration says so, beside the control socket. What keeps it from that keeps nobody from reading."""
        address = parse_address(self._config.daemon.metrics)
        if address is None:
            return
        try:
            listeners = await listen_for_metrics(address)
        except MantaError as e:
            log.error("%s", e.message)
            self._failures.add_general(e)
            return
        log.info("metrics are served at %s", address)
        self._nursery.start_soon(MetricsServer(self.metrics).serve, listeners)

    # The FUSE mount --------------------------------------------------------------------------------------------------

    async def _open_journal(self) -> tuple[Journal, Recovered | None]:
        """What the next daemon will know; and what the one before left, where that can be taken over."""
        left = self._keeping.inherited
        if left.keys() >= KEPT:
            try:
                return Journal.open(left["journal"])
            except Corrupt as e:
                log.error("%s", e.message)
        await self._let_go()
        for name in KEPT & left.keys():
            os.close(left[name])
        config = self._config.fuse
        if self._direct or self._keeping.kind == "none" or config.session == "pyfuse3" or "resend" in config.without:
            return NoJournal(), None
        return Journal.create(), None

    async def _take_over(self, recovered: Recovered) -> bool:
        """Goes on with the mounts of the daemon before. False where that cannot be: they have ended then."""
        fd = self._keeping.inherited["fuse"]

        async def restore() -> None:
            await self._mounts.restore(recovered, self._access)
            for mounted in self._mounts:
                self._warming.begin(mounted)
            self._filesystem.recover(recovered)

        try:
            await self._root.take_over(self._config.mount_root, self._nursery, fd, recovered.session or b"", restore)
        except MantaError as e:
            log.error("the mounts of the daemon before end: %s", e.message)
            os.close(fd)
            with contextlib.suppress(MantaError):
                await self._keeping.remove("fuse")
            self._journal.rewrite()
            return False
        self._telemetry.metrics.announce(self._root.session)
        log.info("took over %d mounts and %d open files", len(self._mounts), self._filesystem.open_files)
        return True

    async def _mount(self, directory: Path) -> None:
        await self._root.mount(directory, self._nursery)
        self._telemetry.metrics.announce(self._root.session)

    async def _have_it_kept(self) -> None:
        """Has the keeper hold what the next daemon needs; where it does not, the status says so."""
        if self._root.survival_refusal or self._keeping.kind == "none":
            return
        fd, state = self._root.state
        self._journal.session(state)
        try:
            await self._keeping.deposit("journal", self._journal.fd)
            await self._keeping.deposit("fuse", fd)
        except Unavailable as e:
            log.warning("%s", e.message)

    async def _let_go(self) -> None:
        """Has the keeper forget what it holds: nobody is to take it over."""
        for name in sorted(KEPT & self._keeping.kept):
            try:
                await self._keeping.remove(name)
            except Unavailable as e:
                log.warning("%s", e.message)

    @property
    def _survives(self) -> bool:
        return not self._survival_refusal

    @property
    def _survival_refusal(self) -> str:
        """Why the mounts end with this daemon, as a clause or a sentence; empty where they do not."""
        if refusal := self._root.survival_refusal:
            return refusal
        if self._keeping.kind == "none":
            return "no keeper holds them (`manta daemon --unkept`, or a supervisor that keeps no descriptors)"
        if not self._keeping.kept >= KEPT:
            return self._keeping.problem or "the keeper does not hold them yet"
        return self._journal.lost or ""

    def _unmounted(self) -> None:
        """The filesystem was unmounted by somebody else, or the kernel has ended the connection."""
        if self._direct:
            for mounted in self._mounts:
                self._mounts.remove(mounted.id)  # fusermount3 -u
        elif not self._stopping.is_set():
            log.warning("the filesystem was unmounted from outside: leaving")
            self._stopping.set()

    def abort(self) -> None:
        """See `RootMount.abort`. Any thread, so that the watchdog can: what hangs may have kept the keeper from hearing of the end too."""
        if self._followed and self._survives:
            return
        self._root.abort()
        if not self.handing_over:
            self._keeping.stopping()

    def _drop_unbound(self) -> None:
        """Ends mounts whose binding is gone."""
        if not self._direct:
            self._mounts.drop_unbound(self._root.bound(self._config.mount_root), trio.current_time())

    def _mount_gone(self, mounted: Mounted) -> None:
        """Nobody asks by its token any more, or for the whole of its files, unless another mount shows them."""
        self._warming.end(mounted.id)
        if mounted.scope.access != self._identity.access:
            self._fetcher.forget(mounted.scope.access)
        shown = self._mounts.blobs()
        for transfer in list(self._fetcher.active):
            blob = transfer.blob.id
            if blob not in shown and any(blob in snapshot.contents.blobs for snapshot in mounted.scope.held.values()):
                self._fetcher.stop_background(str(blob))
        if not self._direct:
            self._root.forget_name(mounted.id)
        self._stir()

    def _mounted_blobs(self) -> Container[BlobId]:
        return self._mounts.blobs()

    def _forget_pages(self, blob: BlobId) -> None:
        """What the kernel has cached of a blob may be wrong: it must ask again."""
        self._root.forget_pages(self._filesystem.numbers_of(blob))

    def _provenances(self, blob: BlobId) -> Iterator[Provenance]:
        return self._mounts.provenances(blob)

    # What the filesystem needs ---------------------------------------------------------------------------------------

    def open(self, provenance: Provenance) -> Transfer:
        blob = provenance.entry.blob
        if blob is not None and self._identity.is_released(provenance.access):
            # The kernel knows the file by its content, and the mount in which it was found last has ended.
            provenance = next(self._mounts.provenances(blob), provenance)
        return self._fetcher.open(provenance)

    def close(self, transfer: Transfer) -> None:
        self._fetcher.close(transfer)

    def failed(self, transfer: Transfer, error: MantaError) -> None:
        self._failures.add(transfer.sources.best, error)

    def cached_bytes(self, provenance: Provenance) -> tuple[int, bool]:
        info = self._store.find(provenance.entry.blob) if provenance.entry.blob is not None else None
        return (info.cached, info.sealed) if info is not None else (0, False)

    def cached(self) -> Iterator[BlobId]:
        return (info.id for info in self._store.listing())

    def hold(self, blob: BlobId) -> Blob:
        if (info := self._store.find(blob)) is None:
            raise Absent(f"{blob} is not in the cache.")
        return self._store.open_blob(blob, info.size)

    def totals(self) -> tuple[int, int]:
        return self._mounts.totals()

    # The control API -------------------------------------------------------------------------------------------------

    async def status(self) -> Status:
        now = trio.current_time()
        pauses = self._fetcher.pauses()
        active = list(self._fetcher.active)
        rates = {t.blob.id: self._telemetry.file_rate(t.blob.id) for t in active}
        return Status(
            version=__version__,
            pid=os.getpid(),
            started=self._started,
            cache_dir=str(self._store.directory),
            runtime_dir=str(self._config.instance_dir),
            endpoint=self._hub.endpoint,
            offline=self._config.hub.offline,
            fuse=self._root.session,
            fuse_why=self._root.why,
            native_refusal=self._root.native_refusal,
            survival_refusal=self._survival_refusal,
            ephemeral=self._ephemeral,
            mounts=[self._mounts.describe(mounted, self._failures, rates) for mounted in self._mounts],
            transfers=[
                FileTransfer(
                    str(t.blob.id),
                    t.name,
                    t.blob.size,
                    t.blob.cached_bytes,
                    rate=rates[t.blob.id].bytes_per_second,
                    waiting=self._telemetry.waiting(t.blob.id),
                    source=rates[t.blob.id].origin,
                )
                for t in active
            ],
            cache_bytes=self._store.cached_bytes,
            cache_limit=self._config.cache.size,
            disk_free=self._room.disk_free(),
            origin_rate=self._fetcher.origin_meter.rate(now),
            origin_bytes=self._fetcher.origin_meter.total,
            read_bytes=self._telemetry.tally.bytes,
            workers=len(self._workers.pids),
            errors=self._failures.all(),
            problems=[
                *filter(None, (self._pins.problem, self._room.problem, self._keeping.problem, self._peer_view.problem)),
                *self._circuits.reasons(),
            ],
            sources=[
                Source(
                    origin=source.origin,
                    rate=rate,
                    bytes=source.meter.total,
                    connections=source.in_flight,
                    failures=source.failures,
                    throttled_until=time.time() + pauses[source.origin] if source.origin in pauses else 0.0,
                    node=source.node if isinstance(source, PeerSource) else "",
                )
                for source, rate in self._telemetry.sources()
            ],
            quotas=[Quota(q.kind, q.remaining, q.limit or 0, q.reset_s) for q in self._hub.quotas.values()],
            connections_allowed=self._fetcher.connections_allowed,
            connections_in_use=self._fetcher.connections_in_use,
            reads_waiting=self._telemetry.waiting(),
            open_files=self._filesystem.open_files,
            keeper=self._keeping.describe(),
            swarm=self._peer_view.summary(),
        )

    async def metrics(self) -> Answer:
        disk_free: int | None = None
        with trio.move_on_after(DISK_SECONDS_MAX), contextlib.suppress(MantaError):
            disk_free, _ = await trio.to_thread.run_sync(
                self._store.disk_space, abandon_on_cancel=True, limiter=self._asking_disk
            )
        state = State(
            cache_bytes=self._store.cached_bytes,
            cache_limit=self._config.cache.size,
            disk_free=disk_free,
            connections_allowed=self._fetcher.connections_allowed,
            connections_in_use=self._fetcher.connections_in_use,
            open_files=self._filesystem.open_files,
            known_inodes=self._filesystem.known_inodes,
            mounts=len(self._mounts),
            transfers=sum(1 for _ in self._fetcher.active),
            reads_waiting=self._telemetry.waiting(),
            hub_throttles=self._hub.throttles,
            quotas=[QuotaLeft(q.kind, q.remaining, q.limit) for q in self._hub.quotas.values()],
            workers=[*self._workers.processes, *(self._swarm.processes if self._swarm is not None else ())],
            swarm=self._peer_view.for_metrics(),
            volumes=volumes(
                self._mounts,
                self._store,
                [transfer.blob.id for transfer in self._fetcher.active],
                lambda blob: self._telemetry.file_rate(blob).bytes_per_second,
                self._telemetry.waiting_by_blob(),
            ),
            volumes_total=sum(mounted.request.pod is not None for mounted in self._mounts),
        )
        return Answer(200, CONTENT_TYPE, self._telemetry.metrics.rendered(state))

    async def peers(self) -> Peers:
        return self._peer_view.here()

    async def cluster(self) -> Peers:
        return await self._peer_view.cluster()

    async def page(self) -> PageLink:
        return self._peer_view.page()

    async def mount(self, request: MountRequest) -> Mount:
        self._refuse_when_stopping()
        mounted = await self._mounts.create(request, self._access(request, ""))
        await self._mounts.pin(mounted, self._keep)
        if self._direct:
            try:
                with trio.CancelScope(shield=True):
                    await self._mount(Path(request.directory))
                await trio.lowlevel.checkpoint()
            except MantaError:
                self._mounts.remove(mounted.id)
                raise
            except trio.Cancelled:  # nobody waits for it any more
                with trio.CancelScope(shield=True):
                    await self._root.end(self._hurrying)
                raise
            mounted.confirmed = True
        self._warming.begin(mounted)
        return self._mounts.describe(mounted, self._failures)

    def _access(self, request: MountRequest, publication: str) -> Access:
        """Who asks the hub for a mount. Raises Invalid."""
        if publication or request.anonymous:
            return self._identity.of_pod(request.token, anonymous=request.anonymous)
        return self._identity.of(request.token)

    async def _keep(self, mounted: Mounted) -> None:
        """What it shows is kept under its target's name until that is unpinned."""
        contents = self._mounts.contents(mounted)
        if contents is not None:
            await self._housekeeping.keep(mounted.request.target, contents.blobs)

    async def publish(self, name: str, request: MountRequest) -> Mount:
        self._refuse_when_stopping()
        mounted = await self._publications.publish(name, request)
        self._warming.begin(mounted)
        return self._mounts.describe(mounted, self._failures)

    async def publications(self) -> list[Publication]:
        return list(self._publications)

    async def publication(self, name: str) -> Mount:
        return self._mounts.describe(self._publications[name], self._failures)

    async def publication_bound(self, name: str, bound: Bound) -> Mount:
        return await self.bound(self._publications[name].id, bound)

    async def unpublish(self, name: str) -> Mount:
        return await self.unmount(self._publications[name].id)

    async def bound(self, mount_id: str, bound: Bound) -> Mount:
        mounted = self._mounts.bound(mount_id, bound.directory)
        if not self._direct:
            # Now, so that an unmount right after this is not taken for a binding that we cannot see.
            self._drop_unbound()
        return self._mounts.describe(mounted, self._failures)

    async def unmount(self, mount_id: str) -> Mount:
        mounted = self._mounts[mount_id]
        described = self._mounts.describe(mounted, self._failures)
        if self._direct:
            await self._root.end(self._hurrying)
        else:
            self._mounts.remove(mount_id)
        return described

    async def prefetch(self, request: PrefetchRequest) -> Job:
        self._refuse_when_stopping()
        return await self._jobs.prefetch(parse_target(request.target), self._identity.of(request.token))

    async def job(self, job_id: str) -> Job:
        return self._jobs[job_id]

    async def cancel_job(self, job_id: str) -> Job:
        return self._jobs.cancel(job_id)

    async def cache(self) -> CacheListing:
        return await self._housekeeping.listing()

    async def verify(self, request: VerifyRequest) -> Job:
        self._refuse_when_stopping()
        if request.names:
            blobs = sorted(await self._housekeeping.select(request.names))
        else:
            blobs = sorted(info.id for info in self._store.listing())
        return self._jobs.verify(blobs, full=request.full, repair=self._identity.access if request.repair else None)

    async def pin(self, selection: CacheSelection) -> CacheListing:
        return await self._housekeeping.pin(selection.names)

    async def unpin(self, selection: CacheSelection) -> CacheListing:
        return await self._housekeeping.unpin(selection.names)

    async def remove(self, selection: CacheSelection) -> Removal:
        return await self._housekeeping.remove(selection.names)

    async def collect(self, request: GcRequest) -> Removal:
        return await self._housekeeping.collect(request.size, dry_run=request.dry_run)

    async def shut_down(self) -> Status:
        status = await self.status()
        self._stopping.set()
        return status

    async def restart(self) -> Running:
        self._refuse_when_stopping()
        if self._keeping.kind == "none":
            raise InUse(
                "This daemon has no keeper that would start another one. `manta umount` what is mounted, and `manta mount` it again:"
                " that starts a new daemon."
            )
        if len(self._mounts) and (refusal := self._survival_refusal):
            raise InUse(
                f"What is mounted would not survive a restart: {refusal.rstrip('.')}. `manta umount` it first, then `manta restart`."
            )
        log.info("handing over to another daemon")
        self.handing_over = True
        self._stopping.set()
        return Running(__version__, os.getpid(), self._started)

    def _latest_access(self, access: Access) -> Access:
        return self._identity.latest(access)

    def _refuse_when_stopping(self) -> None:
        if self._stopping.is_set():
            raise NotRunning("The daemon is shutting down. Try again in a moment.")


# Start -------------------------------------------------------------------------------------------------------------------


class _Readiness:
    """Tells whoever started the daemon how that went: one line of JSON on a descriptor, once."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd

    def announce(self, error: MantaError | None) -> None:
        if self._fd is None:
            return
        answer = {"ok": True} if error is None else {"code": error.code, "message": error.message}
        with contextlib.suppress(OSError):  # who asked may be gone
            os.write(self._fd, json.dumps(answer).encode() + b"\n")
        os.close(self._fd)
        self._fd = None


def _error_of(group: BaseException) -> MantaError | None:
    """The first of our errors in a group that a nursery raised."""
    if isinstance(group, MantaError):
        return group
    if isinstance(group, BaseExceptionGroup):
        for inner in group.exceptions:
            if (found := _error_of(inner)) is not None:
                return found
    return None


def _keeping(config: Config) -> Keeping:
    """Who keeps: one that lives apart where the configuration names it, else who started this process. Raises InUse."""
    if config.daemon.keeper:
        return RemoteKeeping.find(Path(config.daemon.keeper))
    return Keeping.from_environment()


def run(config: Config, *, ephemeral: bool, ready_fd: int | None) -> int:
    """Runs a daemon until it is stopped. Returns the exit code: 0, 1 after saying what kept it from starting, or RESTART.

    `ephemeral`: leave with the last mount. `ready_fd`: a descriptor to announce the start on; it is closed.
    """
    logs.configure(config.daemon.log_level, "json" if config.daemon.log_format == "json" else "text")
    ready = _Readiness(ready_fd)
    try:
        config.make_instance_dir()
        with contextlib.ExitStack() as end, _keeping(config) as keeping:
            if os.geteuid() == 0 and not keeping.inherited:
                # Before the cache is locked, because whose mount it is may want to lock it meanwhile.
                refuse_if_held(config.mount_root)
            with Store(
                config.cache.dir,
                descriptors_max=descriptors.allowance(),
                journal=config.instance_dir / "condemned.json",
            ) as store:
                daemon = Daemon(config, store, ephemeral, keeping)
                # Outside of the store too: a disk may be slow to close it.
                watchdog = end.enter_context(Watchdog(daemon.abort))
                trio.run(daemon.run, ready, watchdog)
    except BaseException as e:
        error = _error_of(e)
        if error is None:
            log.exception("the daemon failed")
            error = Unavailable(f"The daemon failed unexpectedly ({type(e).__name__}); its log has the details.")
            ready.announce(error)
            if isinstance(e, Exception):
                return 1
            raise
        log.error("%s", error.message)
        ready.announce(error)
        return 1
    return RESTART if daemon.handing_over else 0
