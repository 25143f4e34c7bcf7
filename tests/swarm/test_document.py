"""manta.swarm.document in a real browser: what it shows and refuses. The rest of it is data, see tests/operations/test_peers.py."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from manta.errors import Unavailable
from manta.swarm.document import CONTENT_SECURITY_POLICY, DOCUMENT, HEADERS
from manta.swarm.protocol import Exchange
from tests.operations.peer_state import FakePeerState, bitmap, blob, busy_swarm, member, node_id, report
from tests.swarm.browser import Browser, program
from tests.swarm.page_server import PageServer

needs_browser = pytest.mark.skipif(
    program() is None,
    reason="chromium is not installed (as root, bash deploy/bootstrap.sh dev installs it where apt has it)",
)

HOSTILE = (
    "evil/<img src=x onerror=alert(1)>/</script><script>document.title='owned'</script>.bin",
    "evil/\"' onload=x/\u202egnp.exe",
    "evil/javascript:alert(1)/\x1b[31m\r\nline\x00.bin",
)


@pytest.fixture
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


DRAWN = "document.querySelectorAll('#models canvas').length"


@needs_browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_shows_members_models_and_flows(browser: Browser, theme: str) -> None:
    browser.theme(theme)
    with PageServer() as server:
        browser.open(server.url)
        browser.wait_for(DRAWN)
        assert node_id(1)[:8] in browser.text("header")
        assert "as of" in browser.text("#state")
        figures = browser.text("#figures")
        assert "1.01" in figures
        assert "6 of 8" in figures
        assert "connection refused" in browser.text("#troubles")
        rows = browser.text("#nodes tbody").splitlines()
        assert len(rows) == 8
        assert "(here)" in rows[0]
        assert "up for 3 min" in rows[1]
        assert "0.6 ms" in rows[1]
        assert "down for 11 min" in rows[6]
        flows = browser.text("#flows").splitlines()
        assert flows[1].startswith("origin")
        assert "33.0 MB/s" in flows[1]
        assert "126 MB/s" in browser.text("#flows")
        models = browser.text("#models")
        for words in ("meta-llama/Llama-3.1-70B-Instruct", "model-00003-of-00005.safetensors", "7 of 7", "575 MB"):
            assert words in models, words
        assert browser.value("document.body.scrollWidth <= innerWidth")
        assert browser.complaints == []
        # A cell for every two chunks of 4 GiB; the first is on every node, the last on none: two colours.
        assert browser.value(f"{MAP}.width") == 256
        first, last = (browser.value(f"[...{MAP}.getContext('2d').getImageData({x}, 0, 1, 1).data]") for x in (0, 255))
        assert first[3] == last[3] == 255
        assert first != last


MAP = "document.querySelectorAll('#models canvas')[2]"


@needs_browser
def test_it_follows_what_changes_and_passes_on_the_query_it_was_opened_with(browser: Browser) -> None:
    state = FakePeerState(known=[member(2)], others={node_id(2): report(2)})
    with PageServer(state) as server:
        browser.open(f"{server.url}?until=5&mac=abc")
        browser.wait_for("document.body.innerText.includes('Nothing flows.')")
        assert {request for request in server.requests if "json" in request} == {"/page.json?until=5&mac=abc"}
        state.others[node_id(2)] = report(
            2, blob("a/b/c.bin"), exchanges=[Exchange(node=node_id(1), rate_in=5e6, rate_out=0.0)]
        )
        browser.wait_for("document.querySelector('#flows').innerText.includes('5.0 MB/s')")
        browser.wait_for("document.querySelector('#models').innerText.includes('c.bin')")
        state.others[node_id(2)] = Unavailable("It was unplugged.")
        browser.wait_for("document.querySelector('#troubles').innerText.includes('It was unplugged.')")
    assert browser.complaints == []


@needs_browser
def test_names_from_outside_are_text_and_nothing_else(browser: Browser) -> None:
    state = busy_swarm()
    own = [blob(name, id=f"sha256-{n:064x}") for n, name in enumerate(HOSTILE)]
    state.own = report(1, *own, version="<b>1</b>", address="<i>")
    state.others = {
        node_id(2): report(2, version="<b>2</b>", exchanges=[Exchange(node="<script>alert(2)</script>", rate_in=9e6)])
    }
    state.known[0] = member(2, problem="<u>down</u>")
    state.known[5] = member(7, "down", problem="<img src=x onerror=alert(3)>")
    state.problem = "<h1>big</h1>"
    with PageServer(state) as server:
        browser.open(server.url)
        browser.wait_for(DRAWN)
        shown = browser.value("document.body.innerText")
        for words in (
            "</script><script>document.title='owned'</script>.bin",
            "<h1>big</h1>",
            "<img src=x onerror=alert(3)>",
        ):
            assert words in shown, words
        assert browser.value("document.title") == "Manta swarm"
        assert browser.value("document.querySelectorAll('img, b + script, u, i').length") == 0
        assert browser.value("document.scripts.length") == 1
        assert not re.search("[\u202e\x1b\x00]", shown)
        # What it would not do by itself it does not do when told to: the policy holds.
        refused = "new Promise(r => { addEventListener('securitypolicyviolation', e => r(e.violatedDirective)); "
        for attack in (
            "document.body.append(Object.assign(document.createElement('script'), {text: 'document.title=1'}))",
        ):
            answer = browser.ask(
                "Runtime.evaluate", expression=f"{refused}{attack} }})", awaitPromise=True, returnByValue=True
            )
            assert "script-src" in answer["result"]["value"]
        assert browser.value("document.title") == "Manta swarm"
        assert {request.partition("?")[0] for request in server.requests} == {"/", "/page.json"}
    assert all("Content Security Policy" in complaint for complaint in browser.complaints)


@needs_browser
def test_it_says_when_its_link_is_old_when_nobody_answers_and_when_there_is_no_swarm(browser: Browser) -> None:
    with PageServer() as server:
        server.page_json = lambda: b'{"enabled": false}'  # type: ignore[method-assign]
        browser.open(server.url)
        browser.wait_for("document.querySelector('#state').innerText.includes('with nobody')")
        server.status = 500
        browser.wait_for("document.querySelector('#state').innerText.includes('the node answered 500')")
        server.status = 401
        browser.wait_for("document.querySelector('#state').innerText.includes('manta peers --page')")
        asked = len(server.requests)
    assert asked == len(server.requests)


@needs_browser
def test_a_large_swarm_and_odd_numbers_are_drawn_too(browser: Browser) -> None:
    members = [member(number) for number in range(2, 40)]
    exchanges = [Exchange(node=m.node, rate_in=1e6 * n) for n, m in enumerate(members, 1)]
    state = FakePeerState(known=members, exchanged=exchanges)
    state.own = report(
        1, blob("x" * 5000, 3, b"\x01"), blob("a/b/empty", 8 << 30, b""), exchanges=exchanges, started=float("inf")
    )
    everything = blob("a/b/c", 1 << 40, bitmap(1 << 17))
    state.others = {m.node: report(n, everything) for n, m in enumerate(members, 2)}
    with PageServer(state) as server:
        browser.open(server.url)
        browser.wait_for(DRAWN)
        assert browser.value("document.querySelectorAll('#nodes tbody tr').length") == 39
        assert "38.0 MB/s" in browser.text("#flows")
        assert browser.value("document.querySelectorAll('#flows tr').length") == 38
        assert "38 of 39" in browser.text("#models")
        assert browser.value("document.body.scrollWidth <= innerWidth")
    assert browser.complaints == []


def test_the_policy_lets_in_nothing_but_its_own() -> None:
    assert "unsafe" not in CONTENT_SECURITY_POLICY
    assert CONTENT_SECURITY_POLICY.startswith("default-src 'none'; script-src 'sha256-")
    assert "\n" not in CONTENT_SECURITY_POLICY
    assert HEADERS["Referrer-Policy"] == "no-referrer"


def test_the_page_names_no_other_place_and_writes_no_markup() -> None:
    text = DOCUMENT.decode()
    assert not re.search(r"(src|href)=(?!\"data:,\")|url\(|@import|https?://", text)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function| on\w+=| style=", text
    )
    assert len(DOCUMENT) < 32_768, "it goes in one answer"


def test_the_picture_in_the_documentation_is_there_and_small() -> None:
    picture = (Path(__file__).parents[2] / "docs/swarm-page.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    width, _ = struct.unpack(">II", picture[16:24])
    assert width == 1280
    assert len(picture) < 300_000


def test_what_the_page_reads_is_what_is_sent() -> None:
    """Fields that the page names and nobody sends would be drawn as nothing."""
    from manta.control import protocol

    text = DOCUMENT.decode()
    read = set(re.findall(r"\b(?:seen|cluster|member|node|blob|flow)\.([a-z_]+)\b(?!\()", text))
    sent = {
        field
        for kind in (
            protocol.Peers,
            protocol.Cluster,
            protocol.Peer,
            protocol.ClusterNode,
            protocol.SharedBlob,
            protocol.Flow,
        )
        for field in kind.__struct_fields__
    }
    assert read - sent == {"here"}, "`here` is the page's own"
    assert msgspec.json.decode(msgspec.json.encode(protocol.Peers(enabled=False)))["cluster"] is None
