"""Members by EndpointSlices, against a stub of the API."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from manta.swarm.discovery import ServiceAccount, discover
from manta.swarm.kubernetes import EndpointSlice, watch_service
from tests.swarm.fake_kubernetes import FakeKubernetes, endpoint, port
from tests.swarm.fake_member import run, until

Story = Callable[[FakeKubernetes, "Heard"], Awaitable[None]]


class Heard:
    def __init__(self) -> None:
        self.found: list[frozenset[str]] = []
        self.trouble = ""
        self.troubles: list[str] = []

    @property
    def now(self) -> set[str] | None:
        """The hosts that were found last."""
        return {address.removesuffix(":9402") for address in self.found[-1]} if self.found else None

    def tell(self, sentence: str) -> None:
        self.trouble = sentence
        self.troubles.append(sentence)


def watched(
    folder: Path, story: Story, *, before: Callable[[FakeKubernetes], None] = lambda _: None, **options: float
) -> None:
    """Runs `story` beside the discovery of the Service ai/manta."""

    async def whole() -> None:
        heard = Heard()
        async with FakeKubernetes(folder) as api:
            before(api)
            quick = {"retry_s": 0.02, "trouble_after_s": 0.05} | options
            watching = asyncio.create_task(
                watch_service("ai", "manta", heard.found.append, heard.tell, api.account, **quick)
            )
            try:
                await story(api, heard)
                assert not watching.done()
            finally:
                watching.cancel()
                with suppress(asyncio.CancelledError):
                    await watching

    run(whole)


def two_pods(api: FakeKubernetes) -> None:
    api.put("manta-1", [endpoint("10.0.0.1", ready=True), endpoint("10.0.0.2", ready=True)])


def test_pods_come_and_go(tmp_path: Path) -> None:
    async def story(api: FakeKubernetes, heard: Heard) -> None:
        await until(lambda: heard.now == {"10.0.0.1", "10.0.0.2"})
        api.put("manta-2", [endpoint("10.0.0.3", ready=True)])
        await until(lambda: heard.now == {"10.0.0.1", "10.0.0.2", "10.0.0.3"})
        api.put("other-1", [endpoint("10.9.9.9", ready=True)], service="other")
        api.put("manta-9", [endpoint("10.9.9.8", ready=True)], namespace="elsewhere")
        api.put("manta-1", [endpoint("10.0.0.2", ready=True)])
        await until(lambda: heard.now == {"10.0.0.2", "10.0.0.3"})
        api.delete("manta-2")
        await until(lambda: heard.now == {"10.0.0.2"})
        api.put("manta-1", None)
        await until(lambda: heard.now == set())
        assert (len(api.lists), len(api.watches)) == (1, 1)
        assert api.lists[0]["labelSelector"] == "kubernetes.io/service-name=manta"
        assert heard.trouble == ""

    watched(tmp_path, story, before=two_pods)


def test_it_is_what_peers_of_kind_kubernetes_means(tmp_path: Path) -> None:
    async def story() -> None:
        heard = Heard()
        async with FakeKubernetes(tmp_path) as api:
            two_pods(api)
            watching = asyncio.create_task(discover("kubernetes:ai/manta", heard.found.append, heard.tell, api.account))
            await until(lambda: heard.now == {"10.0.0.1", "10.0.0.2"})
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching

    run(story)


def test_a_service_that_nobody_is_behind_yet(tmp_path: Path) -> None:
    async def story(api: FakeKubernetes, heard: Heard) -> None:
        await until(lambda: heard.now == set())
        two_pods(api)
        await until(lambda: heard.now == {"10.0.0.1", "10.0.0.2"})

    watched(tmp_path, story)


def test_a_long_list_comes_in_pages(tmp_path: Path) -> None:
    def many(api: FakeKubernetes) -> None:
        api.page_size = 2
        for n in range(1, 6):
            api.put(f"manta-{n}", [endpoint(f"10.0.0.{n}", ready=True)])

    async def story(api: FakeKubernetes, heard: Heard) -> None:
        await until(lambda: heard.now == {f"10.0.0.{n}" for n in range(1, 6)})
        assert [query.get("continue") for query in api.lists] == [None, "2", "4"]
        assert all(query["limit"] == "500" for query in api.lists)

    watched(tmp_path, story, before=many)


def test_a_watch_that_ends_is_followed_by_one_from_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manta.swarm.kubernetes.RETRY_SECONDS_MIN", 0.0)

    async def story(api: FakeKubernetes, heard: Heard) -> None:
        await until(lambda: len(api.watches) == 1)
        assert api.watches[0]["allowWatchBookmarks"] == "True"
        assert 300 <= int(api.watches[0]["timeoutSeconds"]) <= 450
        api.bookmark()
        marked = str(api.version)
        api.put("other-1", None, service="other")
        api.end_watches()
        await until(lambda: len(api.watches) == 2)
        assert api.watches[1]["resourceVersion"] == marked
        api.delete("manta-1")
        await until(lambda: heard.now == set())
        assert len(api.lists) == 1

    watched(tmp_path, story, before=two_pods)


def test_watches_that_end_at_once_are_not_begun_again_without_a_pause(tmp_path: Path) -> None:
    async def story(api: FakeKubernetes, heard: Heard) -> None:
        for n in range(1, 4):
            await until(lambda n=n: len(api.watches) == n)  # type: ignore[misc]
            api.end_watches()
        assert len(api.lists) == 1
        assert heard.trouble == ""

    watched(tmp_path, story, before=two_pods)


@pytest.mark.parametrize("as_event", [True, False])
def test_a_version_that_is_forgotten_is_listed_anew(tmp_path: Path, as_event: bool) -> None:
    async def story(api: FakeKubernetes, heard: Heard) -> None:
        api.gone_as_event = as_event
        await until(lambda: len(api.watches) == 1)
        api.silent = True
        api.put("manta-1", [endpoint("10.0.0.7", ready=True)])
        api.forget()
        api.silent = False
        api.end_watches()
        await until(lambda: heard.now == {"10.0.0.7"})
        assert len(api.lists) == 2
        await until(lambda: len(api.watches) == 3)
        api.delete("manta-1")
        await until(lambda: heard.now == set())

    watched(tmp_path, story, before=two_pods)


def test_a_watch_that_is_silent_is_begun_again(tmp_path: Path) -> None:
    async def story(api: FakeKubernetes, heard: Heard) -> None:
        await until(lambda: len(api.watches) == 1)
        api.silent = True
        api.put("manta-1", [endpoint("10.0.0.7", ready=True)])
        await until(lambda: len(api.watches) == 2)
        api.silent = False
        await until(lambda: heard.now == {"10.0.0.7"})
        assert len(api.lists) == 1
        assert heard.troubles.count("") == len(heard.troubles)

    watched(tmp_path, story, before=two_pods, silence_s=0.2)


def test_while_the_api_is_away_those_known_stay(tmp_path: Path) -> None:
    async def story(api: FakeKubernetes, heard: Heard) -> None:
        await until(lambda: len(api.watches) == 1)
        await api.stop()
        await until(lambda: "cannot be asked" in heard.trouble)
        assert heard.now == {"10.0.0.1", "10.0.0.2"}
        api.put("manta-1", [endpoint("10.0.0.7", ready=True)])
        await api.start()
        await until(lambda: heard.now == {"10.0.0.7"})
        await until(lambda: heard.trouble == "")
        assert len(api.lists) == 1, "the watch goes on from where it was"

    watched(tmp_path, story, before=two_pods)


def test_a_connection_that_is_cut_is_no_trouble(tmp_path: Path) -> None:
    async def story(api: FakeKubernetes, heard: Heard) -> None:
        await until(lambda: len(api.watches) == 1)
        api.cut()
        await until(lambda: len(api.watches) == 2)
        api.delete("manta-1")
        await until(lambda: heard.now == set())
        assert set(heard.troubles) == {""}

    watched(tmp_path, story, before=two_pods, trouble_after_s=3600.0)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (403, ["ai/manta", "list and watch on endpointslices", "discovery.k8s.io", "namespace ai"]),
        (401, ["token", "401"]),
        (404, ["discovery.k8s.io/v1"]),
        (500, ["cannot be asked", "500"]),
    ],
)
def test_what_the_api_refuses_is_said_and_asked_again(tmp_path: Path, status: int, words: list[str]) -> None:
    def refusing(api: FakeKubernetes) -> None:
        two_pods(api)
        api.refuse = status

    async def story(api: FakeKubernetes, heard: Heard) -> None:
        await until(lambda: heard.trouble != "")
        assert all(word in heard.trouble for word in words)
        assert heard.trouble.endswith(".")
        assert heard.found == []
        api.refuse = None
        await until(lambda: heard.now == {"10.0.0.1", "10.0.0.2"})
        assert heard.trouble == ""

    watched(tmp_path, story, before=refusing)


def test_the_right_to_watch_that_is_taken_away_is_said(tmp_path: Path) -> None:
    async def story(api: FakeKubernetes, heard: Heard) -> None:
        await until(lambda: len(api.watches) == 1)
        api.refuse = 403
        api.end_watches()
        await until(lambda: "list and watch" in heard.trouble)
        assert heard.now == {"10.0.0.1", "10.0.0.2"}

    watched(tmp_path, story, before=two_pods)


def test_a_token_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    async def story(api: FakeKubernetes, heard: Heard) -> None:
        await until(lambda: len(api.watches) == 1)
        (tmp_path / "token").write_text("another-token")
        api.end_watches()
        await until(lambda: len(api.watches) == 2)
        assert api.tokens[-1] == "Bearer another-token"

    watched(tmp_path, story, before=two_pods)


def test_no_pod_is_said(tmp_path: Path) -> None:
    async def story() -> None:
        for environment in ({}, {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": "1"}):
            heard = Heard()
            account = ServiceAccount(tmp_path / "missing", environment)
            watching = asyncio.create_task(watch_service("ai", "manta", heard.found.append, heard.tell, account))
            await until(lambda heard=heard: "no pod with a service account" in heard.trouble)  # type: ignore[misc]
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching

    run(story)


def test_a_client_that_is_not_installed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes_asyncio", None)

    async def story(_api: FakeKubernetes, heard: Heard) -> None:
        await until(lambda: "install manta[kubernetes]" in heard.trouble)

    watched(tmp_path, story)


# Which endpoints count -----------------------------------------------------------------------------------------------


def addresses(endpoints: list[Any] | None, ports: list[Any] | None) -> set[str]:
    one = {"metadata": {"name": "x"}, "endpoints": endpoints, "ports": ports, "addressType": "IPv4"}
    return msgspec.convert(one, EndpointSlice).addresses()


@pytest.mark.parametrize(
    ("conditions", "counts"),
    [
        ({}, True),
        ({"ready": None}, True),
        ({"ready": True}, True),
        ({"ready": False}, False),
        ({"ready": False, "serving": None}, False),
        ({"ready": False, "serving": True, "terminating": True}, True),
        ({"ready": False, "serving": False, "terminating": True}, False),
    ],
)
def test_who_serves_counts(conditions: dict[str, bool | None], counts: bool) -> None:
    assert addresses([endpoint("10.0.0.1", **conditions)], [port(1)]) == ({"10.0.0.1:1"} if counts else set())


def test_endpoints_without_conditions_or_addresses() -> None:
    given = [{"addresses": ["10.0.0.1", "10.0.0.2"]}, {"addresses": []}, {"addresses": None, "conditions": None}]
    assert addresses(given, [port(1)]) == {"10.0.0.1:1"}
    assert addresses(None, [port(1)]) == set()
    assert addresses([endpoint("fd00::1")], [port(1)]) == {"[fd00::1]:1"}


@pytest.mark.parametrize(
    ("ports", "expected"),
    [
        ([port(7, "")], {"10.0.0.1:7"}),
        ([port(7, None, None)], {"10.0.0.1:7"}),
        ([port(7, "metrics"), port(8, "peer")], {"10.0.0.1:8"}),
        ([port(7, "metrics"), port(8, "http")], set()),
        ([port(7, "peer", "UDP"), port(8, "other")], {"10.0.0.1:8"}),
        ([], set()),
        (None, set()),
    ],
)
def test_the_port_is_the_one_named_peer_or_the_only_one(ports: list[Any] | None, expected: set[str]) -> None:
    assert addresses([endpoint("10.0.0.1")], ports) == expected


def test_a_service_without_the_port_is_said(tmp_path: Path) -> None:
    def unnamed(api: FakeKubernetes) -> None:
        api.put("manta-1", [endpoint("10.0.0.1")], [port(7, "metrics"), port(8, "http")])

    async def story(api: FakeKubernetes, heard: Heard) -> None:
        await until(lambda: "no port named 'peer'" in heard.trouble)
        api.put("manta-1", [endpoint("10.0.0.1")], [port(7, "metrics"), port(9402, "peer")])
        await until(lambda: heard.now == {"10.0.0.1"})
        assert heard.trouble == ""

    watched(tmp_path, story, before=unnamed)
