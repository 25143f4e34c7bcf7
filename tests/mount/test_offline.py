"""A hub that cannot be reached: what is cached mounts and reads, the rest fails soon with the reason, and comes back by itself."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from manta.testing import netns
from manta.testing.hub import Generated, HubProcess, HubSpec, RepoSpec, Text
from manta.testing.hub.standard import MODEL
from tests.mount.conftest import BIG, BIG_FILE
from tests.mount.node import Node, background, run, wait_until

pytestmark = pytest.mark.above_fuse

MIB = 1024 * 1024
SOON_S = 20.0
"""Within this a reader hears that the hub is out of reach: it takes 1.5 s, and a loaded machine its time. A reader's patience is 60 s."""


@dataclass(frozen=True)
class Outage:
    """A hub, and how to take it away and bring it back."""

    hub: HubProcess
    begin: Callable[[], object]
    end: Callable[[], object]


@contextmanager
def refused(spec: HubSpec) -> Iterator[Outage]:
    """Nothing listens any more."""
    with HubProcess(spec) as hub:

        def listen(accept: bool) -> None:
            hub.set_listening("hub", accept=accept)
            hub.set_listening("cdn", accept=accept)

        yield Outage(hub, lambda: listen(False), lambda: listen(True))


@contextmanager
def black_holed(spec: HubSpec) -> Iterator[Outage]:
    """Every packet is lost, those of open connections too: the hub's host has no way back to us."""
    if reason := netns.obstacle():
        pytest.skip(reason)
    with netns.namespace() as far, HubProcess(spec, prefix=far.command([]), host=far.address, port=8000) as hub:
        route = ["blackhole", f"{far.host_address}/32"]

        def change(verb: str) -> None:
            subprocess.run(far.command(["ip", "route", verb, *route]), check=True, timeout=20)

        yield Outage(hub, lambda: change("add"), lambda: change("del"))


OUTAGES = [pytest.param(refused, id="refused"), pytest.param(black_holed, id="black-holed", marks=pytest.mark.netns)]

SPEC = HubSpec(
    repos=[
        RepoSpec(
            id="manta/half",
            files={"config.json": Text("{}"), "sub/readme.md": Text("# half"), "weights.bin": Generated("half", 48 * MIB + 5)},
        ),
        RepoSpec(id="manta/none", files={f"{n}.bin": Generated(f"none{n}", MIB) for n in range(6)}),
    ]
)  # fmt: skip


def contents(directory: Path) -> str:
    """Names and digests of everything below `directory`, links followed."""
    return run('cd "$1" && find -L . -type f | LC_ALL=C sort | xargs -d "\\n" sha256sum', directory)


@pytest.mark.parametrize("how", ["refused", "name", "offline"])
def test_what_is_cached_mounts_and_reads_without_the_hub(hub: HubProcess, node: Node, how: str) -> None:
    node.environment["MANTA_HUB_TIMEOUT_S"] = "3"
    tree = node.mount(MODEL)
    expected = contents(tree)
    assert "config.json" in expected
    node.unmount_all()
    if how == "refused":
        hub.set_listening("hub", accept=False)
        hub.set_listening("cdn", accept=False)
    elif how == "name":
        node.environment["HF_ENDPOINT"] = "http://no-such-host.invalid"
    options = ["--offline"] if how == "offline" else []
    assert contents(node.mount(*options, MODEL)) == expected
    assert contents(node.mount(*options, f"{MODEL}@main")) == expected
    whole = node.mount(*options)
    assert contents(whole / MODEL) == expected
    assert contents(whole / f"{MODEL}@main") == expected
    for cache in (node.mount(*options, "--view", "hub-cache", MODEL), node.mount(*options, "--view", "hub-cache")):
        repo = cache / f"models--{MODEL.replace('/', '--')}"
        commit = run('cat "$1/refs/main"', repo)
        assert contents(repo / "snapshots" / commit) == expected
    mounts = node.status()["mounts"]
    assert len(mounts) == 5
    assert all(mount["stale"] for mount in mounts if mount["target"])


@pytest.mark.parametrize("outage", OUTAGES)
def test_an_outage_is_told_soon_and_ends_by_itself(outage: Callable[[HubSpec], AbstractContextManager[Outage]]) -> None:
    with outage(SPEC) as out, Node(out.hub.endpoint) as node:
        # An order that gets no connection is given up after this: what it waits for is nobody's time here.
        node.environment |= {"MANTA_FETCH_STALL_S": "2", "MANTA_HUB_TIMEOUT_S": "3", "MANTA_FETCH_FILL": "false"}
        half, none = node.mount("manta/half"), node.mount("manta/none")
        start = run('head -c 1000 "$1/weights.bin" | sha256sum', half)
        out.begin()
        with background("sha256sum", none / "0.bin"):
            wait_until(lambda: any("out of reach" in sentence for sentence in node.status()["problems"]), timeout_s=40)
        # What is not cached fails soon, however many ask; what is cached does not.
        began = time.monotonic()
        told = run('for n in 1 2 3 4 5; do cat "$1/$n.bin" > /dev/null & done; wait', none)
        assert told.count("Input/output error") == 5
        assert time.monotonic() - began < SOON_S
        assert run('head -c 1000 "$1/weights.bin" | sha256sum', half) == start
        assert run('cd "$1" && find . | wc -l', half).strip() == "5"
        assert "Input/output error" in run('tail -c 100 "$1/weights.bin" > /dev/null', half, code=None)
        began = time.monotonic()
        refused_mount = node.manta("mount", "manta/unknown", str(node.directory()), code=None)
        assert refused_mount.returncode not in {0, 2}
        assert "out of reach" in refused_mount.stderr
        assert time.monotonic() - began < SOON_S
        again = node.mount("manta/half")
        assert node.status()["mounts"][-1]["stale"]
        out.end()
        expected = out.hub.files("manta/half").files["weights.bin"].sha256
        wait_until(lambda: expected in run('sha256sum "$1/weights.bin"', half, code=None), timeout_s=30)
        wait_until(lambda: not any("out of reach" in sentence for sentence in node.status()["problems"]))
        assert "No such" not in run('cat "$1"/*.bin | wc -c', none)
        assert contents(again) == contents(half)


def test_a_reader_from_before_a_short_outage_loses_nothing_but_time(hub: HubProcess, node: Node) -> None:
    hub.set_bandwidth(20 * MIB)
    directory = node.mount(BIG)
    with background("sha256sum", directory / BIG_FILE) as reading:
        wait_until(lambda: node.status()["origin_bytes"] > MIB)
        hub.set_listening("hub", accept=False)
        hub.set_listening("cdn", accept=False)
        wait_until(lambda: any("out of reach" in sentence for sentence in node.status()["problems"]))
        hub.set_bandwidth(None)
        hub.set_listening("hub", accept=True)
        hub.set_listening("cdn", accept=True)
        assert reading.communicate(timeout=60)[0].split()[0] == hub.files(BIG).files[BIG_FILE].sha256
