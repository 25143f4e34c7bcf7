"""What is put right after crashes: the plan, for every combination of what mountinfo, the state file and the daemon say; and its doing."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from manta.control.protocol import MountRequest, Pod, Publication
from manta_csi import reconciliation
from manta_csi.daemon import Daemon
from manta_csi.mounttable import is_gone
from manta_csi.publisher import Publisher
from manta_csi.reconciliation import Plan, Reconciler, plan
from manta_csi.state import Entry, State
from manta_csi.threads import Threads
from tests.csi.conftest import needs_root
from tests.csi.fake_daemon import FakeDaemon
from tests.csi.test_publisher import asked

T = "/k/pods/1/mount"
ENTRY = Entry("csi-a", "v", T, {"model": "org/name"})
PUBLICATION = Publication("csi-a", "1-org--name", T, Pod("u", "p", "n", "v"))
NOTHING = Plan([], [], [], [])


@pytest.mark.parametrize(
    ("entries", "publications", "mounted", "gone", "expected"),
    [
        ([], [], set(), set(), NOTHING),
        ([ENTRY], [PUBLICATION], {T}, set(), NOTHING),
        # Mounted, and the daemon has lost it.
        ([ENTRY], [], {T}, set(), Plan([], [], [], [T])),
        # The state file was lost.
        ([], [PUBLICATION], {T}, set(), Plan([Entry("csi-a", "v", T)], [], [], [])),
        # Nobody has it.
        ([], [PUBLICATION], set(), set(), Plan([], [("csi-a", T)], [], [])),
        # Unpublished while the daemon was away.
        ([ENTRY], [PUBLICATION], set(), {T}, Plan([], [("csi-a", T)], [], [])),
        ([ENTRY], [], set(), {T}, Plan([], [], [T], [])),
        # After a reboot the directory is there and nothing is mounted: the kubelet's turn.
        ([ENTRY], [PUBLICATION], set(), set(), NOTHING),
        ([ENTRY], [], set(), set(), NOTHING),
        # Another volume has the target by now.
        ([Entry("csi-b", "w", T)], [PUBLICATION], {T}, set(), Plan([], [("csi-a", T)], [], [T])),
        # Not ours: another driver's name, another kubelet's directory.
        ([], [Publication("mine", "1", T, None)], set(), set(), NOTHING),
        ([], [Publication("csi-a", "1", "/other/mount", None)], set(), set(), NOTHING),
    ],
)
def test_plan(
    entries: list[Entry], publications: list[Publication], mounted: set[str], gone: set[str], expected: Plan
) -> None:
    assert plan(entries, publications, mounted=mounted, gone=gone, kubelet_dir="/k") == expected


class Node:
    """Publisher, state and reconciler of one life of the driver."""

    def __init__(self, daemon: FakeDaemon, kubelet_dir: Path) -> None:
        self.daemon = Daemon(daemon.socket_path)
        self.state = State(kubelet_dir / "state", Threads("state", 2))
        assert self.state.load() == ""
        self.publisher = Publisher(self.daemon, self.state, token_policy="secret")
        self.reconciler = Reconciler(self.publisher, self.daemon, self.state, str(kubelet_dir))


def in_a_life(daemon: FakeDaemon, kubelet_dir: Path, work: Any) -> Any:
    async def main() -> Any:
        made: Coroutine[Any, Any, Any] = work(Node(daemon, kubelet_dir))
        return await made

    return asyncio.run(main())


@needs_root
def test_unpublished_while_the_daemon_was_dead(daemon: FakeDaemon, kubelet_dir: Path) -> None:
    request = asked(kubelet_dir)
    in_a_life(daemon, kubelet_dir, lambda node: node.publisher.publish(request))
    daemon.__exit__()

    async def unpublish(node: Node) -> None:
        await node.publisher.unpublish("v", request.target)
        assert node.publisher.owes.is_set()
        assert not await node.reconciler.once()

    in_a_life(daemon, kubelet_dir, unpublish)
    assert is_gone(request.target)
    assert list(daemon.publications) == [request.name]

    async def back(node: Node) -> None:
        assert len(node.state) == 1
        assert await node.reconciler.once()
        assert len(node.state) == 0

    with daemon:
        in_a_life(daemon, kubelet_dir, back)
        assert daemon.publications == {}


@needs_root
def test_the_loop_tells_what_is_owed_without_waiting_for_its_time(
    daemon: FakeDaemon, kubelet_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconciliation, "RETRY_S", 0.02)
    request = asked(kubelet_dir)

    async def life(node: Node) -> None:
        loop = asyncio.create_task(node.reconciler.run())
        await node.publisher.publish(request)
        daemon.__exit__()
        await node.publisher.unpublish("v", request.target)
        with daemon:
            async with asyncio.timeout(20):
                while daemon.publications or len(node.state):
                    await asyncio.sleep(0.01)
        loop.cancel()

    in_a_life(daemon, kubelet_dir, life)


@needs_root
def test_a_volume_that_the_daemon_lost_is_noticed_once(
    daemon: FakeDaemon, kubelet_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def life(node: Node) -> None:
        await node.publisher.publish(asked(kubelet_dir))
        daemon.publications.clear()
        await node.reconciler.once()
        await node.reconciler.once()

    in_a_life(daemon, kubelet_dir, life)
    assert len([record for record in caplog.records if "is dead" in record.message]) == 1


@needs_root
def test_a_publication_of_a_life_before_is_ended(daemon: FakeDaemon, kubelet_dir: Path) -> None:
    async def life(node: Node) -> None:
        request = asked(kubelet_dir)
        await node.publisher.publish(request)
        await node.publisher.unpublish("v", request.target)
        daemon._publish("csi-stray", MountRequest("org/name", str(kubelet_dir / "stray/mount")))
        assert await node.reconciler.once()

    in_a_life(daemon, kubelet_dir, life)
    assert daemon.publications == {}
