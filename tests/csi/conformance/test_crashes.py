"""Drivers that are killed, daemons that are dead or hang: what is published stays readable, and what is to go goes."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from manta.testing.kubelet import NON_FINAL, Pod, persistent
from tests.csi.conformance.conftest import MODEL, Checked, outcome

SOON_S = 30.0
"""For what must not wait for a daemon that hangs. Far less than the kubelet's two minutes, far more than a busy machine needs."""


@contextmanager
def hung_daemon(node: Checked) -> Iterator[None]:
    """Every process of its container stands still."""
    pids = node.processes(node.daemon)
    for pid in pids:
        node.host_signal(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            node.host_signal(pid, signal.SIGCONT)


# The driver ---------------------------------------------------------------------------------------------------------


def test_a_driver_that_is_killed_knows_its_volumes_again(node: Checked) -> None:
    inline, static = node.volume(MODEL), persistent(Pod("serve-1"), "pv", "handle", {"model": MODEL})
    for volume in (inline, static):
        node.kubelet.set_up(volume)
    node.restart_driver()
    for volume in (inline, static):
        assert node.published(volume)
        assert node.read(volume)
        node.kubelet.republish(volume)
        assert node.published(volume)
        assert node.kubelet.stats(volume)["BYTES"].total > 0
        node.kubelet.tear_down(volume)
        assert node.gone(volume)


def test_a_driver_whose_state_file_is_gone_or_broken_still_unpublishes(node: Checked) -> None:
    volumes = [node.volume(MODEL, pod=f"serve-{number}") for number in range(2)]
    for volume, spoil in zip(volumes, (None, b"\x00not json{"), strict=True):
        node.kubelet.set_up(volume)
        node.driver.kill()
        for path in (node.kubelet.folder / "plugins").rglob("*"):
            if path.is_file():
                path.unlink()
                if spoil is not None:
                    path.write_bytes(spoil)
        node.start_driver()
        node.kubelet.restart()
        assert node.published(volume)
        assert outcome(lambda volume=volume: node.kubelet.republish(volume)) in {"OK", *NON_FINAL}  # type: ignore[misc]
        node.kubelet.tear_down(volume)
        assert node.gone(volume)


@pytest.mark.parametrize("seed", range(4))
def test_a_driver_that_is_killed_between_any_two_steps_leaves_nothing_half_done(node: Checked, seed: int) -> None:
    """At a random moment of a publish, and of an unpublish; the kubelet asks again."""
    chance = random.Random(seed)
    volume = node.volume(MODEL, pod=f"serve-{seed}")
    call = node.kubelet.begin_set_up(volume)
    time.sleep(chance.uniform(0, 0.06))
    node.driver.kill()
    outcome(call.result)
    node.start_driver()
    node.kubelet.restart()
    node.kubelet.set_up(volume)
    assert node.published(volume)
    assert node.publications() == 1
    call = node.kubelet.begin_tear_down(volume)
    time.sleep(chance.uniform(0, 0.03))
    node.driver.kill()
    outcome(call.result)
    node.start_driver()
    node.kubelet.restart()
    node.kubelet.tear_down(volume)
    assert node.gone(volume)
    node.clean()


def test_a_driver_that_is_killed_while_the_daemon_answers_is_followed_by_one_that_ends_it(node: Checked) -> None:
    """The daemon publishes, and nobody has heard of it: neither a republish nor an unpublish finds anything odd."""
    for again in (True, False):
        volume = node.volume(MODEL)
        with hung_daemon(node):
            call = node.kubelet.begin_set_up(volume)
            time.sleep(0.3)  # the request is in the daemon's socket
            node.driver.kill()
            outcome(call.result)
        node.start_driver()
        node.kubelet.restart()
        if again:
            node.kubelet.set_up(volume)
            assert node.published(volume)
        node.kubelet.tear_down(volume)
        assert node.gone(volume)
        node.clean()


def test_a_driver_that_is_told_to_end_leaves_its_volumes(node: Checked) -> None:
    volume = node.volume(MODEL)
    node.kubelet.set_up(volume)
    node.driver.signal(signal.SIGTERM)
    assert node.driver.wait() == 0
    assert node.published(volume)
    assert node.read(volume)
    assert list(node.kubelet.registry.iterdir()) == [], "a kubelet forgets the driver by its socket"
    node.start_driver()
    node.kubelet.restart()
    node.kubelet.tear_down(volume)


# The daemon ---------------------------------------------------------------------------------------------------------


def test_an_unpublish_without_a_daemon_is_done_and_the_next_daemon_has_nothing_left(node: Checked) -> None:
    volumes = [node.volume(MODEL, pod=f"serve-{number}") for number in range(3)]
    for volume in volumes:
        node.kubelet.set_up(volume)
    node.daemon.kill()
    node.kubelet.tear_down(volumes[0])
    assert node.gone(volumes[0])
    node.restart_driver()  # what it remembers is not in its memory alone
    node.kubelet.tear_down(volumes[1])
    assert node.gone(volumes[1])
    refused = outcome(lambda: node.kubelet.republish(volumes[2]))
    assert refused in NON_FINAL
    node.start_daemon()
    node.kubelet.tear_down(volumes[2])
    assert node.gone(volumes[2])
    node.clean()


def test_a_dead_mount_is_unpublished_and_published_anew(node: Checked) -> None:
    """The daemon ended without a keeper, so what is mounted answers "Transport endpoint is not connected"."""
    volume = node.volume(MODEL)
    node.kubelet.set_up(volume)
    node.daemon.kill()
    node.start_daemon()
    node.kubelet.republish(volume)
    assert node.published(volume)
    assert node.read(volume)
    node.daemon.kill()
    assert outcome(lambda: node.kubelet.stats(volume)) in {"OK", *NON_FINAL}
    node.kubelet.tear_down(volume)
    assert node.gone(volume)
    node.start_daemon()
    node.clean()


def test_a_daemon_that_hangs_keeps_nobody_from_unpublishing(node: Checked) -> None:
    """Nor from anything else that does not need it; and a publish ends within the kubelet's two minutes, not finally."""
    volumes = [node.volume(MODEL, pod=f"serve-{number}") for number in range(10)]
    for volume in volumes:
        node.kubelet.set_up(volume)
    waiting = [node.volume(f"org/many-{number:02d}", pod=f"new-{number}") for number in range(30)]
    with hung_daemon(node):
        for volume in waiting:
            node.kubelet.make_parent(volume)
        calls = [
            node.kubelet.begin("NodePublishVolume", node.kubelet.publish_fields(volume), timeout_s=3.0)
            for volume in waiting
        ]
        looking = node.kubelet.begin(
            "NodeGetVolumeStats",
            {"volume_id": volumes[0].volume_id, "volume_path": str(node.kubelet.target(volumes[0]))},
            timeout_s=3.0,
        )
        ending = [node.kubelet.begin_tear_down(volume, timeout_s=SOON_S) for volume in volumes[1:]]
        assert node.kubelet.call("NodeGetInfo", timeout_s=SOON_S).node_id
        assert node.kubelet.call("Probe", timeout_s=SOON_S) is not None
        assert [outcome(call.result) for call in ending] == ["OK"] * len(ending)
        for volume in volumes[1:]:
            node.kubelet.settle(volume)
            assert node.gone(volume)
        assert {outcome(call.result) for call in calls} <= NON_FINAL
        assert outcome(looking.result) in {"OK", *NON_FINAL}
    for volume in (volumes[0], *waiting):
        with contextlib.suppress(FileNotFoundError):
            node.kubelet.tear_down(volume)
        assert node.gone(volume)
    node.clean()


def test_a_publish_that_the_kubelet_gave_up_is_taken_up_again(node: Checked) -> None:
    volume = node.volume(MODEL)
    node.kubelet.make_parent(volume)
    with hung_daemon(node):
        call = node.kubelet.begin("NodePublishVolume", node.kubelet.publish_fields(volume), timeout_s=1.0)
        assert outcome(call.result) == "DEADLINE_EXCEEDED"
    deadline = time.monotonic() + SOON_S
    while (code := outcome(lambda: node.kubelet.republish(volume))) != "OK":
        assert code in NON_FINAL
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert node.published(volume)
    assert node.publications() == 1
    node.kubelet.tear_down(volume)
    assert node.gone(volume)
