"""Pulling chunks from another node over real sockets: what comes is the chunk or a reason, whatever the other side does."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trustme

from manta.cache.digests import chunk_digest
from manta.swarm import auth, protocol
from manta.swarm.compression import pack
from manta.swarm.protocol import Refusal
from manta.worker import peer as module
from manta.worker.failure import OrderFailed
from manta.worker.origin import RETRY_AFTER_SECONDS_MAX
from tests.worker.peers import (
    DATA,
    KEY,
    LENGTH,
    NODE,
    OTHER,
    OTHER_KEY,
    START,
    WRONG,
    Answer,
    Asked,
    Node,
    Outcome,
    Puller,
    chunk,
    message,
    pull_order,
    refusal,
    serving,
)

T = TypeVar("T")
TEXT = (b"plain words, again and again, " * LENGTH)[:LENGTH]


def run(tmp_path: Path, work: Callable[[Puller], Awaitable[T]]) -> T:
    async def bounded() -> T:
        puller = Puller(tmp_path / "data")
        try:
            async with asyncio.timeout(20):
                return await work(puller)
        finally:
            puller.close()
            await asyncio.sleep(0.01)  # what is closed is gone when the loop is
            assert len(asyncio.all_tasks()) == 1

    return asyncio.run(bounded())


@pytest.fixture
def attempt(tmp_path: Path) -> Callable[..., tuple[Outcome, bytes, Node]]:
    """One order against a node with these answers: what became of it, what is in the file, and the node."""

    def attempt(
        *answers: Answer, extents: tuple[tuple[int, int], ...] = (), keys: tuple[bytes, ...] = (KEY,), **fields: Any
    ) -> tuple[Outcome, bytes, Node]:
        async def work(puller: Puller) -> tuple[Outcome, bytes, Node]:
            async with serving(Node(list(answers), keys)) as node:
                outcome = await puller.pull(node, *extents, keys=list(keys), **fields)
                return outcome, puller.chunk, node

        return run(tmp_path, work)

    return attempt


# What is right -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [(KEY,), ()], ids=["key", "no key"])
def test_a_whole_chunk_comes_by_one_request_without_a_range(attempt: Any, keys: tuple[bytes, ...]) -> None:
    outcome, data, node = attempt(keys=keys)
    assert data == DATA
    assert outcome.fetched is not None
    assert outcome.fetched.digest == chunk_digest(DATA)
    assert 0 < outcome.fetched.first_byte_s <= outcome.fetched.seconds
    (asked,) = node.asked
    assert asked.range == ""
    assert protocol.ACCEPT_LZ4 not in asked.headers
    assert sum(upto - at for at, upto in outcome.told) == LENGTH


def test_extents_come_by_a_request_each_and_what_was_there_counts(tmp_path: Path) -> None:
    async def work(puller: Puller) -> None:
        os.pwrite(puller.fd, DATA[100_000:200_000], START + 100_000)
        async with serving(Node()) as node:
            outcome = await puller.pull(node, (200_000, LENGTH), (0, 100_000))
            assert [asked.range for asked in node.asked] == ["bytes=200000-299999", "bytes=0-99999"]
            assert node.connections == 1
        assert puller.chunk == DATA
        assert outcome.fetched is not None
        assert outcome.fetched.digest == chunk_digest(DATA)
        assert all(not (at < START + 200_000 and upto > START + 100_000) for at, upto in outcome.told)

    run(tmp_path, work)


def test_what_was_there_may_be_what_is_wrong(tmp_path: Path) -> None:
    async def work(puller: Puller) -> None:
        os.pwrite(puller.fd, WRONG[:100_000], START)
        async with serving(Node()) as node:
            outcome = await puller.pull(node, (100_000, LENGTH))
        assert outcome.reason == "corrupt"
        assert "or what the cache file had" in outcome.message

    run(tmp_path, work)


def test_what_the_node_is_to_fetch_goes_with_the_request(attempt: Any) -> None:
    pull = protocol.Pull(kind="model", repo="org/n", commit="f" * 40, path="ä/model.safetensors", urgent=True)
    outcome, _, node = attempt(pull=protocol.encode(pull))
    assert outcome.fetched is not None
    assert node.asked[0].pull == pull


def test_packed_bytes_are_taken_where_they_are_welcome(attempt: Any) -> None:
    def packed(asked: Asked) -> bytes:
        assert asked.headers[protocol.ACCEPT_LZ4] == "lz4"
        return chunk(asked, body=pack(TEXT), digest=chunk_digest(TEXT), encoding="lz4")

    outcome, data, _ = attempt(packed, lz4=True)
    assert outcome.fetched is not None, outcome.message
    assert data == TEXT
    outcome, data, node = attempt(lz4=True, extents=((0, 1000), (1000, LENGTH)))
    assert outcome.fetched is not None
    assert all(protocol.ACCEPT_LZ4 not in asked.headers for asked in node.asked)  # whole chunks only


def test_an_idle_connection_that_was_closed_costs_a_new_signature_and_no_failure(tmp_path: Path) -> None:
    async def work(puller: Puller) -> None:
        async with serving(Node([chunk, None])) as node:
            for _ in range(2):
                outcome = await puller.pull(node)
                assert outcome.fetched is not None, outcome.message
            assert (node.connections, len(node.asked)) == (2, 3)
            assert len({asked.sender.nonce for asked in node.asked}) == 3

    run(tmp_path, work)


def test_the_first_of_two_keys_signs(attempt: Any) -> None:
    outcome, _, node = attempt(keys=(KEY, OTHER_KEY))
    assert outcome.fetched is not None
    assert node.asked[0].sender.key == KEY


def test_no_proxy_sees_a_peer(attempt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert attempt()[0].fetched is not None


# It is being fetched -------------------------------------------------------------------------------------------------


def coming(asked: Asked) -> bytes:
    return refusal(asked, 202, Refusal("coming"))


def test_what_is_being_fetched_is_asked_for_again(attempt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HOLD_SECONDS", 0.01)
    outcome, data, node = attempt(coming, coming)
    assert outcome.fetched is not None
    assert data == DATA
    assert (len(node.asked), node.connections) == (3, 1)
    assert outcome.told[:2] == [(START, START)] * 2  # it is alive, and nothing has come


def test_who_never_has_it_is_left_in_time(attempt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HOLD_SECONDS", 0.02)
    outcome, _, node = attempt(*[coming] * 1000, patience_s=0.1)
    assert (outcome.reason, outcome.failure.behind, outcome.failure.unreachable) == ("unavailable", True, False)
    assert len(node.asked) <= 5  # however soon it answers, it is not asked at once


# Refusals ------------------------------------------------------------------------------------------------------------


def test_a_node_without_a_slot_names_others(attempt: Any) -> None:
    busy = Refusal("busy", "No slot.", holders=[OTHER, "../etc", "x" * 100_000][:2], retry_s=0.5)
    outcome, data, _ = attempt(lambda asked: refusal(asked, 503, busy))
    failure = outcome.failure
    assert (failure.reason, failure.holders, failure.retry_after_s) == ("busy", [OTHER], 0.5)
    assert data == bytes(LENGTH)


@pytest.mark.parametrize(
    ("status", "reason", "expected"),
    [
        (404, "absent", "absent"),
        (401, "unauthorized", "denied"),
        (403, "withheld", "denied"),
        (400, "invalid", "unavailable"),
        (500, "unavailable", "unavailable"),
        (202, "", "unavailable"),
        (503, "", "unavailable"),
        (404, "", "absent"),
        (204, "", "unavailable"),
    ],
)
def test_a_refusal_has_its_reason(attempt: Any, status: int, reason: Any, expected: str) -> None:
    body = Refusal(reason, "So \x1b[31mit\nis.") if reason else b""
    outcome, _, _ = attempt(lambda asked: refusal(asked, status, body))
    assert (outcome.reason, outcome.failure.status, outcome.failure.behind) == (expected, status, False)
    assert f"answered {status}" in outcome.message
    assert not reason or outcome.message.endswith(": So  [31mit is")


@pytest.mark.parametrize(
    ("reason", "expected"),
    [("throttled", "throttled"), ("denied", "denied"), ("no_space", "no_space"), ("busy", "unavailable")],
)
def test_a_fetch_that_failed_behind_the_node_is_said_to(attempt: Any, reason: Any, expected: str) -> None:
    refused = Refusal(reason, "The hub says so.", retry_s=1e9, origin="https://hub\n" + "x" * 1000)
    outcome, _, _ = attempt(lambda asked: refusal(asked, 502, refused))
    failure = outcome.failure
    assert (failure.reason, failure.behind, failure.retry_after_s) == (expected, True, RETRY_AFTER_SECONDS_MAX)
    assert failure.origin.startswith("https://hub x")
    assert len(failure.origin) == module.ORIGIN_CHARACTERS_MAX


def test_a_wait_that_is_no_number_is_none(attempt: Any) -> None:
    outcome, _, _ = attempt(lambda asked: refusal(asked, 503, Refusal("busy", retry_s=float("nan"))))
    assert outcome.failure.retry_after_s == 0


def test_a_refusal_leaves_the_connection_for_the_next_order(tmp_path: Path) -> None:
    async def work(puller: Puller) -> None:
        async with serving(Node([lambda asked: refusal(asked, 404, Refusal("absent"))])) as node:
            assert (await puller.pull(node)).reason == "absent"
            assert (await puller.pull(node)).fetched is not None
            assert node.connections == 1

    run(tmp_path, work)


def test_a_refusal_by_somebody_else_is_none(attempt: Any) -> None:
    for status in (202, 404, 502, 503):
        outcome, _, node = attempt(lambda asked, s=status: refusal(asked, s, Refusal("busy", "Ha."), node=OTHER))
        assert outcome.reason == "denied"
        assert "Ha" not in outcome.message
        assert len(node.asked) == 1


def test_who_takes_another_key_cannot_sign_that(attempt: Any) -> None:
    outcome, _, _ = attempt(lambda _asked: message(401, {"Content-Length": "0"}))
    assert outcome.reason == "denied"
    assert "same swarm key" in outcome.message


def test_an_endless_reason_is_not_read_to_its_end(attempt: Any) -> None:
    async def endless(_asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(message(404, {"Transfer-Encoding": "chunked"}))
        while True:
            writer.write(b"400\r\n" + bytes(1024) + b"\r\n")
            await writer.drain()

    outcome, _, _ = attempt(endless)
    assert outcome.reason == "unavailable"
    assert "endless" in outcome.message


# Lies ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lie",
    [
        lambda asked: chunk(asked, data=WRONG),
        lambda asked: chunk(asked, digest=chunk_digest(WRONG)),
    ],
    ids=["wrong bytes", "wrong digest"],
)
@pytest.mark.parametrize("keys", [(KEY,), ()], ids=["key", "no key"])
def test_bytes_that_are_not_those_of_the_digest_are_corrupt(attempt: Any, lie: Answer, keys: tuple[bytes, ...]) -> None:
    outcome, _, node = attempt(lie, keys=keys)
    assert outcome.reason == "corrupt"
    assert outcome.message == f"{node.address} sent bytes that are not those of the digest it announced"


def test_a_digest_that_changes_between_extents_is_a_lie(attempt: Any) -> None:
    outcome, _, _ = attempt(
        chunk, lambda asked: chunk(asked, digest=chunk_digest(WRONG)), extents=((0, 1000), (1000, LENGTH))
    )
    assert outcome.reason == "corrupt"
    assert "another digest" in outcome.message


def replay() -> Answer:
    first: list[bytes] = []

    def answer(asked: Asked) -> bytes:
        first.append(chunk(asked))
        return first[0]

    return answer


@pytest.mark.parametrize(
    "forgery",
    [
        lambda asked: chunk(asked, node=OTHER),
        lambda asked: chunk(asked, changed={protocol.MAC: None}),
        lambda asked: chunk(asked, changed={protocol.MAC: "é" * 64}),
        lambda asked: chunk(asked, data=WRONG, changed={protocol.DIGEST: chunk_digest(WRONG).hex()}),
        lambda asked: chunk(asked, changed={protocol.DIGEST: "x"}),
        lambda asked: chunk(asked, changed={protocol.DIGEST: None}),
        lambda asked: chunk(asked, changed={protocol.ENCODING: "lz4"}),
        lambda asked: chunk(asked, changed={"Content-Length": str(LENGTH - 1)}),
        lambda asked: chunk(asked, status=206, changed={"Content-Range": f"bytes 1-{LENGTH}/{LENGTH}"}),
        lambda asked: chunk(asked).replace(b" 200 ", b" 206 ", 1),
    ],
    ids=[
        "another node",
        "unsigned",
        "no mac",
        "digest",
        "no digest",
        "digest away",
        "encoding",
        "length",
        "range",
        "status",
    ],
)
def test_of_what_the_node_did_not_sign_no_byte_is_taken(attempt: Any, forgery: Answer) -> None:
    outcome, data, _ = attempt(forgery, lz4=True)
    assert outcome.reason == "denied", outcome.message
    assert f"without the signature of node {NODE}" in outcome.message
    assert data == bytes(LENGTH)
    assert outcome.told == []


def test_an_answer_is_good_for_one_request(tmp_path: Path) -> None:
    async def work(puller: Puller) -> None:
        again = replay()
        async with serving(Node([again, again])) as node:
            assert (await puller.pull(node)).fetched is not None
            assert (await puller.pull(node)).reason == "denied"

    run(tmp_path, work)


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (lambda asked: chunk(asked, given=(0, 1000)), "corrupt"),
        (lambda asked: chunk(asked, given=(1001, 2001)), "corrupt"),
        (lambda asked: chunk(asked, given=(1000, 2001)), "corrupt"),
        (lambda asked: chunk(asked, given=(0, LENGTH), status=200), "corrupt"),
        (lambda asked: chunk(asked, body=DATA[1000:1999]), "corrupt"),
        (lambda asked: chunk(asked, body=DATA), "corrupt"),
        (lambda asked: chunk(asked, changed={"Content-Range": f"bytes 1000-1999/{LENGTH + 1}"}), "corrupt"),
        (lambda asked: chunk(asked, encoding="lz4", body=pack(DATA[1000:2000])[:900]), "unavailable"),
        (lambda asked: chunk(asked, encoding="br"), "unavailable"),
    ],
    ids=["before", "behind", "too much", "all", "short", "long", "another chunk", "packed", "brotli"],
)
@pytest.mark.parametrize("keys", [(KEY,), ()], ids=["key", "no key"])
def test_another_range_than_asked_for_is_refused_before_a_byte(
    attempt: Any, lie: Answer, reason: str, keys: tuple[bytes, ...]
) -> None:
    outcome, data, _ = attempt(lie, extents=((1000, 2000),), keys=keys, lz4=True)
    assert outcome.reason == reason, outcome.message
    assert data == bytes(LENGTH)


@pytest.mark.parametrize("changed", [{protocol.DIGEST: "xyz"}, {protocol.DIGEST: None}, {"Content-Range": None}])
def test_without_a_key_a_head_that_says_too_little_is_refused_too(attempt: Any, changed: dict[str, str | None]) -> None:
    outcome, data, _ = attempt(lambda asked: chunk(asked, changed=changed), extents=((0, 1000),), keys=())
    assert outcome.reason in {"unavailable", "corrupt"}
    assert data == bytes(LENGTH)


def test_a_redirect_is_a_failure_and_leads_nowhere(tmp_path: Path) -> None:
    async def work(puller: Puller) -> None:
        async with serving(Node()) as elsewhere, serving(Node()) as node:
            for status in (301, 302, 307, 308):
                there = {"Location": f"http://{elsewhere.address}/x", "Content-Length": "0"}
                node.answers = [
                    lambda asked, s=status, h=there: message(
                        s, {**h, protocol.MAC: auth.sign_answer(auth.Answer(s), asked.sender, NODE)}
                    )
                ]
                outcome = await puller.pull(node)
                assert (outcome.reason, outcome.failure and outcome.failure.status) == ("unavailable", status)
            assert elsewhere.connections == 0

    run(tmp_path, work)


@pytest.mark.parametrize(
    "frame",
    [
        pack(bytes(64 * 1024 * 1024))[:LENGTH],
        pack(TEXT + b"x"),
        pack(TEXT[:-1]),
        pack(TEXT)[:-1],
        pack(TEXT) + b"x",
        DATA[:5000],
        b"",
    ],
    ids=["bomb", "a byte more", "a byte less", "cut", "trailing", "garbage", "nothing"],
)
def test_a_frame_that_is_not_the_chunk_is_corrupt(attempt: Any, frame: bytes) -> None:
    outcome, _, _ = attempt(lambda asked: chunk(asked, body=frame, digest=chunk_digest(TEXT), encoding="lz4"), lz4=True)
    assert outcome.reason == "corrupt"


def test_packed_bytes_that_are_more_than_plain_ones_are_not_read(attempt: Any) -> None:
    outcome, data, _ = attempt(lambda asked: chunk(asked, body=pack(DATA), encoding="lz4"), lz4=True)
    assert outcome.reason == "corrupt"
    assert data == bytes(LENGTH)


def test_packed_bytes_that_nobody_asked_for_are_refused(attempt: Any) -> None:
    outcome, data, _ = attempt(lambda asked: chunk(asked, body=pack(TEXT), encoding="lz4"))
    assert outcome.reason == "unavailable"
    assert data == bytes(LENGTH)


# Bodies that do not end, or do not come ------------------------------------------------------------------------------


def test_an_endless_body_is_cut_where_it_was_to_end(tmp_path: Path) -> None:
    async def endless(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(chunk(asked))
        while True:
            writer.write(bytes(65536))
            await writer.drain()

    async def work(puller: Puller) -> None:
        async with serving(Node([endless])) as node:
            assert (await puller.pull(node)).fetched is not None
            assert puller.chunk == DATA
            # What came too much is no answer to another request, and at the latest then the connection is closed.
            assert (await puller.pull(node)).reason in {"", "unavailable"}
            assert (await puller.pull(node)).fetched is not None
            assert node.connections == 2

    run(tmp_path, work)


@pytest.mark.parametrize("framing", [{"Transfer-Encoding": "chunked"}, {}], ids=["chunked", "to the end"])
@pytest.mark.parametrize("keys", [(KEY,), ()], ids=["key", "no key"])
def test_a_body_of_unknown_length_is_not_begun(attempt: Any, framing: dict[str, str], keys: tuple[bytes, ...]) -> None:
    async def endless(asked: Asked, writer: asyncio.StreamWriter) -> None:
        digest = chunk_digest(DATA)
        head = protocol.chunk_head(digest, 0, LENGTH, "identity", 0)
        mac = auth.sign_answer(auth.Answer(200, head), asked.sender, NODE)
        writer.write(message(200, {protocol.DIGEST: digest.hex(), protocol.MAC: mac, **framing}))
        while True:
            writer.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
            await writer.drain()

    outcome, data, _ = attempt(endless, keys=keys)
    assert outcome.reason == "unavailable"
    assert "how much" in outcome.message
    assert data == bytes(LENGTH)


def cut_after(count: int) -> Answer:
    async def cut(asked: Asked, writer: asyncio.StreamWriter) -> None:
        whole = chunk(asked)
        writer.write(whole[: whole.index(b"\r\n\r\n") + 4 + count])
        await writer.drain()
        writer.close()

    return cut


@pytest.mark.parametrize("count", [0, 1, LENGTH - 1])
def test_a_short_body_is_no_chunk_and_what_came_is_told(attempt: Any, count: int) -> None:
    outcome, data, _ = attempt(cut_after(count))
    assert (outcome.reason, outcome.failure.unreachable) == ("unavailable", False)
    assert data[:count] == DATA[:count]
    assert sum(upto - at for at, upto in outcome.told) == count


def dripping(body: bool, step: int, pause_s: float) -> Answer:
    async def drip(asked: Asked, writer: asyncio.StreamWriter) -> None:
        whole = chunk(asked)
        begin = whole.index(b"\r\n\r\n") + 4 if body else 20
        writer.write(whole[:begin])
        for at in range(begin, len(whole), step):
            writer.write(whole[at : at + step])
            await writer.drain()
            await asyncio.sleep(pause_s)

    return drip


@pytest.mark.parametrize(("step", "pause_s"), [(1, 0.01), (1000, 0.05), (1, 1000)], ids=["drops", "trickle", "silence"])
def test_a_body_that_trickles_is_given_up(attempt: Any, step: int, pause_s: float) -> None:
    outcome, _, _ = attempt(dripping(True, step, pause_s), stall_s=0.3)
    assert (outcome.reason, outcome.failure.unreachable) == ("unavailable", False)
    assert "less than 64 KiB/s for 0.3 s" in outcome.message
    assert outcome.told  # what came is in the file


def test_a_slow_body_that_keeps_coming_is_taken(attempt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slower than the least for a moment, not for as long as counts; and for longer than one such time."""
    monkeypatch.setattr(module, "RATE_MIN", 100_000)
    outcome, _, _ = attempt(dripping(True, 50_000, 0.15), stall_s=0.5)
    assert outcome.fetched is not None, outcome.message


@pytest.mark.parametrize("answer", [dripping(False, 1, 0.05), dripping(False, 1, 1000)], ids=["drops", "silence"])
def test_a_head_that_does_not_come_is_no_answer(attempt: Any, answer: Answer) -> None:
    outcome, _, _ = attempt(answer, stall_s=0.2)
    assert (outcome.reason, outcome.failure.unreachable) == ("unavailable", True)
    assert "did not answer within 0.2 s" in outcome.message


def test_a_reason_that_trickles_is_given_up(attempt: Any) -> None:
    async def drip(_asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(message(404, {"Content-Length": "60000"}))
        while True:
            writer.write(b"x")
            await asyncio.sleep(0.02)

    outcome, _, _ = attempt(drip, stall_s=0.2)
    assert outcome.reason == "unavailable"
    assert "did not end its answer" in outcome.message


@pytest.mark.parametrize(
    "noise",
    [b"220 smtp.example ESMTP\r\n", b"\x16\x03\x01\0\0" * 100, b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000],
    ids=["smtp", "tls", "endless head"],
)
def test_what_is_not_http_is_no_answer(attempt: Any, noise: bytes) -> None:
    outcome, data, _ = attempt(lambda _asked: noise)
    assert outcome.reason == "unavailable"
    assert data == bytes(LENGTH)


# Around it -----------------------------------------------------------------------------------------------------------


def test_who_does_not_listen_is_unreachable(tmp_path: Path) -> None:
    async def work(puller: Puller) -> None:
        async with serving(Node()) as node:
            pass
        outcome = await puller.pull(node)
        assert outcome.failure is not None
        assert (outcome.reason, outcome.failure.unreachable) == ("unavailable", True)

    run(tmp_path, work)


@pytest.mark.parametrize("address", ["nowhere", "[::1", "host:port", "a b:1", "", "@:1", "a:1/x"])
def test_what_is_no_address_is_unavailable(tmp_path: Path, address: str) -> None:
    async def work(puller: Puller) -> None:
        with pytest.raises(OrderFailed) as failed:
            await puller.client.pull(pull_order(address, stall_s=0.5), puller.fd, lambda *_: None)
        assert failed.value.reason == "unavailable"

    run(tmp_path, work)


def test_a_cancelled_order_closes_its_connection_in_the_midst_of_a_body(tmp_path: Path) -> None:
    async def work(puller: Puller) -> None:
        begun, gone = asyncio.Event(), asyncio.Event()

        async def half(asked: Asked, writer: asyncio.StreamWriter) -> None:
            writer.write(chunk(asked)[:100_000])
            await writer.drain()
            begun.set()
            try:
                while True:  # the other side closes: a write fails
                    await asyncio.sleep(0.01)
                    writer.write(b"x")
                    await writer.drain()
            except ConnectionError:
                gone.set()
                raise

        async with serving(Node([half])) as node:
            pulling = asyncio.create_task(puller.pull(node))
            await begun.wait()
            pulling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await pulling
            await gone.wait()
            assert (await puller.pull(node)).fetched is not None
            assert puller.chunk == DATA

    run(tmp_path, work)


def test_a_disk_that_refuses_is_no_fault_of_the_node(tmp_path: Path) -> None:
    async def work(puller: Puller) -> None:
        read_only = os.open(tmp_path / "data", os.O_RDONLY)
        try:
            async with serving(Node()) as node:
                with pytest.raises(OrderFailed) as failed:
                    await puller.client.pull(pull_order(node.address), read_only, lambda *_: None)
        finally:
            os.close(read_only)
        assert failed.value.reason == "cache_broken"

    run(tmp_path, work)


def test_many_orders_at_once(tmp_path: Path) -> None:
    async def work(puller: Puller) -> None:
        async with serving(Node()) as node:
            outcomes = await asyncio.gather(*(puller.pull(node) for _ in range(20)))
            assert all(outcome.fetched is not None for outcome in outcomes)
        assert puller.chunk == DATA

    run(tmp_path, work)


# TLS -----------------------------------------------------------------------------------------------------------------


def server_tls(authority: trustme.CA, *names: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(context)
    return context


def test_over_tls_with_the_swarms_authority_and_name(tmp_path: Path) -> None:
    authority, path = trustme.CA(), tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(path)

    async def work(puller: Puller) -> None:
        async with serving(Node(), server_tls(authority, "nodes.manta.example")) as node:
            for _ in range(2):
                outcome = await puller.pull(node, tls_authorities=str(path), tls_name="nodes.manta.example")
                assert outcome.fetched is not None, outcome.message
            assert puller.chunk == DATA
            assert node.connections == 1
        async with serving(Node(), server_tls(authority, "127.0.0.1")) as node:
            assert (await puller.pull(node, tls_authorities=str(path))).fetched is not None

    run(tmp_path, work)


@pytest.mark.parametrize("wrong", ["authority", "name", "plain"])
def test_over_tls_nobody_else_is_asked(tmp_path: Path, wrong: str) -> None:
    authority, path = trustme.CA(), tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(path)
    theirs = server_tls(trustme.CA() if wrong == "authority" else authority, "nodes.manta.example")
    name = "other.manta.example" if wrong == "name" else "nodes.manta.example"

    async def work(puller: Puller) -> None:
        async with serving(Node(), None if wrong == "plain" else theirs) as node:
            if wrong == "plain":
                node.answers = [lambda _asked: b"no TLS"]
                node._parse = lambda head: Asked("", {}, auth.Sender("", "", "", b""), 0, 0, None)  # type: ignore[method-assign]
            outcome = await puller.pull(node, tls_authorities=str(path), tls_name=name, stall_s=0.5)
            assert outcome.reason == "unavailable"
            assert wrong == "plain" or "TLS" in outcome.message
            assert node.asked == []
        assert puller.untouched

    run(tmp_path, work)


def test_authorities_that_change_on_the_disk_count_at_once(tmp_path: Path) -> None:
    old, new, path = trustme.CA(), trustme.CA(), tmp_path / "ca.pem"
    old.cert_pem.write_to_path(path)
    os.utime(path, ns=(1, 1))

    async def work(puller: Puller) -> None:
        async with serving(Node(), server_tls(new, "127.0.0.1")) as node:
            assert (await puller.pull(node, tls_authorities=str(path))).reason == "unavailable"
            new.cert_pem.write_to_path(path)
            assert (await puller.pull(node, tls_authorities=str(path))).fetched is not None

    run(tmp_path, work)


@pytest.mark.parametrize("content", [None, b"no certificate"])
def test_authorities_that_cannot_be_read_are_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)

    async def work(puller: Puller) -> None:
        outcome = await puller.pull(Node(port=1), tls_authorities=str(path))
        assert outcome.reason == "unavailable"
        assert str(path) in outcome.message

    run(tmp_path, work)
