"""As many volumes as a full node has: nothing grows with them but what must."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from manta.testing import pods
from tests.csi.conformance.conftest import MANY, Checked

VOLUMES = 200


def threads(node: Checked, container: pods.Container) -> int:
    found = 0
    for pid in node.processes(container):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            found += len(os.listdir(f"/proc/{pid}/task"))
    return found


def test_two_hundred_volumes_need_no_more_processes_and_threads(node: Checked) -> None:
    first = node.volume(MANY[0], pod="first")
    node.kubelet.set_up(first)
    before = {name: len(node.processes(container)) for name, container in _containers(node).items()}
    volumes = [node.volume(MANY[number % len(MANY)], pod=f"serve-{number}") for number in range(VOLUMES)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(node.kubelet.set_up, volumes))
        full = {name: len(node.processes(container)) for name, container in _containers(node).items()}
        assert len(node.kubelet.mounts()) == VOLUMES + 1
        assert full == before
        assert threads(node, node.driver) < 100
        list(pool.map(node.kubelet.tear_down, volumes))
    node.kubelet.tear_down(first)
    assert all(node.gone(volume) for volume in (first, *volumes))
    node.clean()
    assert {name: len(node.processes(container)) for name, container in _containers(node).items()} == before


def _containers(node: Checked) -> dict[str, pods.Container]:
    return {"daemon": node.daemon, "csi": node.driver}
