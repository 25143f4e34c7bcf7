"""The driver as a process: what is made of what, the two sockets, its start and its end. The composition root.

Start: the lock on the state directory (one driver per node and name), the state file, the sockets, the first reconciliation, and the
kubelet is told last. End (SIGTERM, SIGINT): the registration's socket goes first, then no call is taken any more, and those under way are
ended. Mounts stay: they do not need the driver.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import grpc.aio

from manta.errors import Denied, InUse, Unavailable
from manta_csi import __version__
from manta_csi.controller import Controller
from manta_csi.daemon import Daemon
from manta_csi.identity import Identity
from manta_csi.logs import fields
from manta_csi.mounttable import is_shared
from manta_csi.node import Node
from manta_csi.proto import csi_pb2_grpc, registration_pb2_grpc
from manta_csi.publisher import Publisher
from manta_csi.reconciliation import Reconciler
from manta_csi.registration import Registration
from manta_csi.settings import Settings
from manta_csi.state import State
from manta_csi.threads import Threads

log = logging.getLogger(__name__)

CALLS_MAX = 256
"""Calls under way; more are answered RESOURCE_EXHAUSTED, and the kubelet comes again. It starts at most 110 pods."""

REQUEST_BYTES_MAX = 4 * 1024 * 1024
"""gRPC's own default, said here: a request is a few kilobytes."""

LOCK_S = 20.0
"""How long the driver before may still be leaving."""

GRACE_S = 10.0
"""For calls under way at the end, and as long again for what they had begun. A pod's own grace is 30 s by default."""

FIRST_LOOK_S = 3.0
"""For the first reconciliation, before anything is served. A daemon that does not answer is no reason not to unpublish."""

SOCKETS_S = 10.0
"""Between two looks whether the sockets are still there: somebody may empty the kubelet's directory."""


async def serve(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT. Raises InUse where another driver serves, Denied where the directories cannot be made, Unavailable
    where a socket was removed from below it."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    _make_directories(settings)
    lock = await _lock(settings.state_dir / "lock", stop)
    if lock < 0:
        return
    try:
        await _serve(settings, stop)
    finally:
        os.close(lock)


async def _serve(settings: Settings, stop: asyncio.Event) -> None:
    daemon = Daemon(settings.control_socket)
    state = State(settings.state_dir, Threads("manta-state", 2))
    if trouble := state.load():
        log.error("%s What is published is read from mountinfo and from the daemon.", trouble)
    publisher = Publisher(daemon, state, token_policy=settings.token_policy)
    kubelet_dir = str(settings.kubelet_dir.resolve())
    if not is_shared(kubelet_dir):
        log.warning(
            "%s is no shared mount: what is mounted below it is seen by nobody outside. In a pod it needs mountPropagation Bidirectional.",
            kubelet_dir,
        )
    reconciler = Reconciler(publisher, daemon, state, kubelet_dir)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(publisher.finish, GRACE_S)

        def add(server: grpc.aio.Server) -> None:
            csi_pb2_grpc.add_IdentityServicer_to_server(
                Identity(daemon, settings.driver_name, controller=settings.test_controller), server
            )
            csi_pb2_grpc.add_NodeServicer_to_server(Node(publisher, settings.node_id, settings.kubelet_dir), server)
            if settings.test_controller:
                log.warning("--test-controller: this driver invents volumes, which is for csi-sanity only")
                csi_pb2_grpc.add_ControllerServicer_to_server(Controller(), server)

        sockets = [settings.endpoint]
        # What was published before is known before the kubelet asks about it.
        with suppress(TimeoutError):
            async with asyncio.timeout(FIRST_LOOK_S):
                await reconciler.once()
        await stack.enter_async_context(_listening(settings.endpoint, add))
        await stack.enter_async_context(_task(reconciler.run))
        if settings.events:
            from manta_csi.events import Announcer

            await stack.enter_async_context(_task(Announcer(daemon, settings.driver_name, settings.node_id).run))
        if settings.registration_socket is not None:
            registration = Registration(settings.driver_name, settings.endpoint)
            await stack.enter_async_context(
                _listening(
                    settings.registration_socket,
                    lambda server: registration_pb2_grpc.add_RegistrationServicer_to_server(registration, server),
                )
            )
            sockets.append(settings.registration_socket)
        log.info(
            "serving",
            extra=fields(
                driver=settings.driver_name,
                version=__version__,
                endpoint=settings.endpoint,
                node=settings.node_id,
                volumes=len(state),
            ),
        )
        await _until(stop, sockets)
    log.info("ended; the volumes stay mounted")


async def _until(stop: asyncio.Event, sockets: list[Path]) -> None:
    there = {path: _inode(path) for path in sockets}
    while not stop.is_set():
        try:
            async with asyncio.timeout(SOCKETS_S):
                await stop.wait()
        except TimeoutError:
            for path, inode in there.items():
                if _inode(path) != inode:
                    raise Unavailable(
                        f"The socket {path} was removed or replaced by somebody: the driver ends, to be started anew by its supervisor."
                    ) from None


def _inode(path: Path) -> int:
    try:
        return path.lstat().st_ino
    except OSError:
        return 0


@asynccontextmanager
async def _task(run: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    task = asyncio.ensure_future(run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task], timeout=GRACE_S)


@asynccontextmanager
async def _listening(path: Path, add: Callable[[grpc.aio.Server], None]) -> AsyncIterator[None]:
    """A gRPC server on a unix socket, for root alone. An older socket is one of a driver that is no more: we hold the lock."""
    server = grpc.aio.server(
        maximum_concurrent_rpcs=CALLS_MAX,
        options=[("grpc.max_receive_message_length", REQUEST_BYTES_MAX), ("grpc.so_reuseport", 0)],
    )
    add(server)
    try:
        path.unlink(missing_ok=True)
        server.add_insecure_port(f"unix:{path}")
        path.chmod(0o600)
    except (OSError, RuntimeError) as error:
        raise Denied(f"The socket {path} cannot be made: {error}.") from error
    await server.start()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        await server.stop(GRACE_S)


def _make_directories(settings: Settings) -> None:
    needed = [settings.endpoint.parent, settings.state_dir]
    if settings.registration_socket is not None:
        needed.append(settings.registration_socket.parent)
    for directory in needed:
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o750)
        except OSError as error:
            raise Denied(
                f"The directory {directory} cannot be made: {error.strerror}. The driver runs as root on the node."
            ) from error


async def _lock(path: Path, stop: asyncio.Event) -> int:
    """The lock's descriptor: released by the kernel with the process. -1 where the driver is told to end before it has it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Denied(f"The lock {path} cannot be opened: {error.strerror}.") from error
    deadline = asyncio.get_running_loop().time() + LOCK_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            pass
        if stop.is_set() or asyncio.get_running_loop().time() > deadline:
            os.close(descriptor)
            if stop.is_set():
                return -1
            raise InUse(
                f"Another CSI driver holds {path} and did not end within {LOCK_S:g} s: only one may serve a node."
            )
        await asyncio.sleep(0.1)


async def probe(endpoint: Path, *, ready: bool, timeout_s: float) -> str:
    """Asks the driver's Probe. Returns what is wrong, a sentence, or nothing."""
    from manta_csi.proto import csi_pb2

    try:
        async with grpc.aio.insecure_channel(f"unix:{endpoint}") as channel:
            answer = await csi_pb2_grpc.IdentityStub(channel).Probe(csi_pb2.ProbeRequest(), timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        return f"No CSI driver answers at {endpoint} within {timeout_s:g} s ({error.code().name})."
    if ready and not answer.ready.value:
        return "The CSI driver answers, and the Manta daemon behind it does not."
    return ""
