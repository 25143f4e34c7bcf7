"""Publish and unpublish, against a daemon that is faked and with real bind mounts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from manta.control.binding import bind
from manta.control.protocol import MountRequest
from manta.errors import Conflict, Denied, Invalid, MantaError, NotRunning, Unavailable
from manta_csi import mounttable
from manta_csi import publisher as publisher_module
from manta_csi.daemon import Daemon
from manta_csi.mounttable import MountTable, is_gone
from manta_csi.publisher import Publisher, Request, publication_name, target_of
from manta_csi.refusals import NOT_FINAL, InProgress, Unknown, code
from manta_csi.settings import TokenPolicy
from manta_csi.state import State
from manta_csi.threads import Threads
from tests.csi.conftest import needs_root
from tests.csi.fake_daemon import FakeDaemon

pytestmark = needs_root

TOKEN = "hf_" + "s" * 34
POD = {
    "csi.storage.k8s.io/pod.uid": "u",
    "csi.storage.k8s.io/pod.name": "p",
    "csi.storage.k8s.io/pod.namespace": "n",
    "csi.storage.k8s.io/ephemeral": "true",
}


def asked(
    kubelet_dir: Path, pod: str = "1", *, volume: str = "v", token: str = "", readonly: bool = False, **attributes: str
) -> Request:
    context = {**POD, "model": "org/name", **attributes}
    secrets = {"token": token} if token else {}
    return Request(volume, str(kubelet_dir / "pods" / pod / "mount"), readonly, 1, context, secrets)


def live(
    daemon: FakeDaemon,
    kubelet_dir: Path,
    work: Callable[[Publisher], Coroutine[Any, Any, Any]],
    policy: TokenPolicy = "secret",
) -> Any:
    """`work` in one life of the driver."""

    async def main() -> Any:
        state = State(kubelet_dir / "state", Threads("state", 2))
        assert state.load() == ""
        publisher = Publisher(Daemon(daemon.socket_path), state, token_policy=policy)
        result = await work(publisher)
        await publisher.finish(10)
        return result

    return asyncio.run(main())


def fails(daemon: FakeDaemon, kubelet_dir: Path, request: Request, policy: TokenPolicy = "secret") -> MantaError:
    with pytest.raises(MantaError) as failure:
        live(daemon, kubelet_dir, lambda publisher: publisher.publish(request), policy)
    return failure.value


def test_publish_again_and_after_a_restart_and_unpublish_again(daemon: FakeDaemon, kubelet_dir: Path) -> None:
    request = asked(kubelet_dir, prefetch="background", pin="true")

    async def twice(publisher: Publisher) -> None:
        await publisher.publish(request)
        await publisher.publish(request)

    live(daemon, kubelet_dir, twice)
    live(daemon, kubelet_dir, twice)
    assert daemon.made == 1
    assert (Path(request.target) / "config.json").read_text() == "org/name"
    assert [line for line in mounted(kubelet_dir) if line == request.target] == [request.target]
    [(wanted, mount)] = daemon.publications.values()
    assert (wanted.target, wanted.prefetch, wanted.pin, wanted.directory) == (
        "org/name",
        "background",
        True,
        request.target,
    )
    assert wanted.pod is not None
    assert (wanted.pod.namespace, wanted.pod.name, wanted.pod.volume) == ("n", "p", "v")

    async def away(publisher: Publisher) -> None:
        await publisher.unpublish("v", request.target)
        await publisher.unpublish("v", request.target)
        await publisher.unpublish("unknown", str(kubelet_dir / "pods/none/mount"))

    live(daemon, kubelet_dir, away)
    assert is_gone(request.target)
    assert daemon.publications == {}
    assert Path(mount.source).exists()


def mounted(directory: Path) -> list[str]:
    return [field for _, field in MountTable.read()._lines if field.startswith(str(directory))]


@pytest.mark.parametrize(
    "other",
    [{"revision": "v2"}, {"readonly": True}, {"volume": "w"}, {"pin": "true"}],
    ids=lambda other: next(iter(other)),
)
def test_the_same_target_with_other_arguments(daemon: FakeDaemon, kubelet_dir: Path, other: dict[str, Any]) -> None:
    live(daemon, kubelet_dir, lambda publisher: publisher.publish(asked(kubelet_dir)))
    error = fails(daemon, kubelet_dir, asked(kubelet_dir, **other))
    assert isinstance(error, Conflict)
    assert daemon.made == 1


def test_service_account_tokens_are_no_arguments(daemon: FakeDaemon, kubelet_dir: Path) -> None:
    for value in ("one", "two"):
        request = asked(kubelet_dir)
        request = replace(request, context={**request.context, "csi.storage.k8s.io/serviceAccount.tokens": value})
        live(daemon, kubelet_dir, partial(Publisher.publish, request=request))
    assert "serviceAccount" not in (kubelet_dir / "state/publications.json").read_text()


def test_whose_right_it_is(daemon: FakeDaemon, kubelet_dir: Path) -> None:
    daemon.rights["org/name"] = {TOKEN}
    assert isinstance(fails(daemon, kubelet_dir, asked(kubelet_dir)), Denied)
    assert isinstance(fails(daemon, kubelet_dir, asked(kubelet_dir, token="hf_other")), Denied)
    assert "node's token" in fails(daemon, kubelet_dir, asked(kubelet_dir), "node").message
    assert mounted(kubelet_dir) == []
    assert is_gone(str(kubelet_dir / "pods/1/mount"))
    assert '"entries":[]' in (kubelet_dir / "state/publications.json").read_text()
    live(daemon, kubelet_dir, lambda publisher: publisher.publish(asked(kubelet_dir, token=TOKEN)))
    daemon.rights["org/name"] = {"node"}
    live(daemon, kubelet_dir, lambda publisher: publisher.publish(asked(kubelet_dir, "2")), "node")
    assert TOKEN not in (kubelet_dir / "state/publications.json").read_text()
    assert TOKEN not in repr(asked(kubelet_dir, token=TOKEN))


def test_a_republish_is_never_answered_with_something_final(daemon: FakeDaemon, kubelet_dir: Path) -> None:
    live(daemon, kubelet_dir, lambda publisher: publisher.publish(asked(kubelet_dir, token=TOKEN)))
    daemon.rights["org/name"] = set()
    error = fails(daemon, kubelet_dir, asked(kubelet_dir, token=TOKEN))
    assert code(error) in NOT_FINAL
    assert "is gated" in error.message
    assert code(fails(daemon, kubelet_dir, asked(kubelet_dir, token="not a token"))) in NOT_FINAL
    assert code(fails(daemon, kubelet_dir, asked(kubelet_dir, retired="attribute"))) in NOT_FINAL
    daemon.__exit__()
    assert code(fails(daemon, kubelet_dir, asked(kubelet_dir, token=TOKEN))) in NOT_FINAL
    assert (kubelet_dir / "pods/1/mount/config.json").read_text() == "org/name"
    daemon.__enter__()
    daemon.rights.clear()
    live(daemon, kubelet_dir, lambda publisher: publisher.publish(asked(kubelet_dir, token=TOKEN)))


def test_a_wrong_attribute_is_final_before_anything_is_asked(daemon: FakeDaemon, kubelet_dir: Path) -> None:
    assert isinstance(fails(daemon, kubelet_dir, asked(kubelet_dir, modle="x")), Invalid)
    assert daemon.requests == []


def test_without_the_daemon(daemon: FakeDaemon, kubelet_dir: Path) -> None:
    live(daemon, kubelet_dir, lambda publisher: publisher.publish(asked(kubelet_dir)))
    daemon.__exit__()
    assert isinstance(fails(daemon, kubelet_dir, asked(kubelet_dir, "2")), NotRunning)
    live(daemon, kubelet_dir, lambda publisher: publisher.unpublish("v", str(kubelet_dir / "pods/1/mount")))
    assert is_gone(str(kubelet_dir / "pods/1/mount"))
    # Asked for again with another revision, before the daemon has heard of the end of the first.
    daemon.__enter__()
    live(daemon, kubelet_dir, lambda publisher: publisher.publish(asked(kubelet_dir, revision="v2")))
    [(wanted, _)] = daemon.publications.values()
    assert wanted.target == "org/name@v2"


def test_a_daemon_that_lost_everything_and_is_asked_again(daemon: FakeDaemon, kubelet_dir: Path) -> None:
    request = asked(kubelet_dir)
    live(daemon, kubelet_dir, lambda publisher: publisher.publish(request))
    daemon.publications.clear()
    mount, problem = live(daemon, kubelet_dir, lambda publisher: publisher.look("v", request.target))
    assert mount is None
    assert "delete the pod" in problem
    live(daemon, kubelet_dir, lambda publisher: publisher.publish(request))
    assert daemon.made == 2
    assert len(mounted(kubelet_dir)) == 1
    mount, problem = live(daemon, kubelet_dir, lambda publisher: publisher.look("v", request.target))
    assert (mount.size, problem) == (2000, "")


def test_stats_of_what_is_not_published(daemon: FakeDaemon, kubelet_dir: Path) -> None:
    request = asked(kubelet_dir)
    live(daemon, kubelet_dir, lambda publisher: publisher.publish(request))
    for volume, path in (("w", request.target), ("v", f"{request.target}/below"), ("v", str(kubelet_dir / "none"))):
        with pytest.raises(Unknown):
            live(daemon, kubelet_dir, partial(Publisher.look, volume=volume, path=path))
    daemon.read_errors = ["first", "The hub does not answer."]
    assert (
        live(daemon, kubelet_dir, lambda publisher: publisher.look("v", request.target))[1]
        == "The hub does not answer."
    )


def test_another_volume_s_target_is_left_alone(daemon: FakeDaemon, kubelet_dir: Path) -> None:
    request = asked(kubelet_dir)
    live(daemon, kubelet_dir, lambda publisher: publisher.publish(request))
    live(daemon, kubelet_dir, lambda publisher: publisher.unpublish("w", request.target))
    assert mounted(kubelet_dir) == [request.target]


def test_one_thing_at_a_time_with_a_target(
    daemon: FakeDaemon, kubelet_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "BUSY_S", 0.05)
    entered, release = threading.Event(), threading.Event()

    def hold(request: object) -> None:
        if str(request).startswith("PUT"):
            entered.set()
            release.wait(30)

    daemon.on_request = hold
    request = asked(kubelet_dir)

    async def work(publisher: Publisher) -> None:
        first = asyncio.create_task(publisher.run(publisher.publish(request)))
        await asyncio.to_thread(entered.wait, 10)
        with pytest.raises(InProgress):
            await publisher.publish(request)
        with pytest.raises(InProgress):
            await publisher.unpublish("v", request.target)
        first.cancel()  # the caller goes; what it began goes on
        with pytest.raises(asyncio.CancelledError):
            await first
        release.set()
        await publisher.finish(20)
        assert not publisher._locks

    try:
        live(daemon, kubelet_dir, work)
    finally:
        release.set()
    assert mounted(kubelet_dir) == [request.target]


def test_fifty_at_once(daemon: FakeDaemon, kubelet_dir: Path) -> None:
    requests = [asked(kubelet_dir, str(number), volume=f"v{number}") for number in range(50)]

    async def work(publisher: Publisher) -> None:
        await asyncio.gather(*(publisher.publish(request) for request in requests))
        assert len(mounted(kubelet_dir)) == 50
        await asyncio.gather(*(publisher.unpublish(request.volume, request.target) for request in requests))

    live(daemon, kubelet_dir, work)
    assert mounted(kubelet_dir) == []
    assert daemon.publications == {}


def test_a_mount_that_hangs(daemon: FakeDaemon, kubelet_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher_module, "BIND_S", 0.05)
    release = threading.Event()

    def hang(source: str, directory: str) -> None:
        release.wait(30)
        bind(source, directory)

    monkeypatch.setattr(mounttable, "bind", hang)
    request = asked(kubelet_dir)

    async def work(publisher: Publisher) -> None:
        with pytest.raises(Unavailable, match="did not end within"):
            await publisher.publish(request)
        with pytest.raises(InProgress, match="still hangs in the kernel"):
            await publisher.publish(request)
        await publisher.unpublish("v", request.target)  # does not wait for it
        assert is_gone(request.target)
        release.set()
        [attempt] = publisher._hanging.values()
        assert await asyncio.to_thread(attempt.ended.wait, 10)
        monkeypatch.setattr(mounttable, "bind", bind)
        monkeypatch.setattr(publisher_module, "BIND_S", 10.0)
        assert mounted(kubelet_dir) == []
        await publisher.publish(request)

    try:
        live(daemon, kubelet_dir, work)
    finally:
        release.set()
    assert mounted(kubelet_dir) == [request.target]


def test_another_filesystem_on_the_target(daemon: FakeDaemon, kubelet_dir: Path, tmp_path: Path) -> None:
    request = asked(kubelet_dir)
    (tmp_path / "theirs").mkdir()
    Path(request.target).mkdir(parents=True)
    bind(str(tmp_path / "theirs"), request.target)
    assert isinstance(fails(daemon, kubelet_dir, request), Conflict)
    with pytest.raises(MantaError, match="another filesystem"):
        live(daemon, kubelet_dir, lambda publisher: publisher.unpublish("v", request.target))
    assert mounted(kubelet_dir) == [request.target]


def test_a_daemon_without_root(daemon: FakeDaemon, kubelet_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = daemon._publish

    def direct(name: str, request: MountRequest) -> Any:
        return msgspec.structs.replace(made(name, request), source=request.directory)

    monkeypatch.setattr(daemon, "_publish", direct)
    assert "run it as root" in fails(daemon, kubelet_dir, asked(kubelet_dir)).message
    assert daemon.publications == {}


def test_names_and_targets() -> None:
    assert publication_name("a", "/t") != publication_name("a", "/u")
    assert len(publication_name("v" * 1000, "/t" * 1000)) < 128
    kubelet, real = Path("/var/lib/kubelet"), Path("/data/kubelet")
    assert target_of("/var/lib/kubelet/pods/1/mount/", kubelet, real) == "/data/kubelet/pods/1/mount"
    for path in (
        "/etc",
        "/var/lib/kubelet",
        "/var/lib/kubelet/../x",
        "/var/lib/kubelet/a//b",
        "pods/1",
        "/var/lib/kubelet/a\n",
    ):
        with pytest.raises(Invalid, match="--kubelet-dir"):
            target_of(path, kubelet, real)
