"""The peer server over real sockets: what members get, what strangers do not get, and who is cut off."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from pathlib import Path

import msgspec
import pytest
import trustme

from manta.model.extents import CHUNK_SIZE
from manta.model.ids import BlobAlgorithm, BlobId
from manta.swarm.auth import sign_page
from manta.swarm.document import DOCUMENT
from manta.swarm.limits import Limits
from manta.swarm.protocol import (
    BODY_BYTES_MAX,
    Have,
    HaveRequest,
    Hello,
    ResolveRequest,
    TreeRequest,
    chunk_target,
    decode,
    encode,
)
from manta.wire.peering import Listening, Reply, Settings, Trouble, Uploaded
from tests.swarm.node import (
    ASKER,
    KEY,
    ME,
    PULL,
    SETTINGS,
    Asker,
    content,
    hang_up,
    open_files,
    read_answer,
    run,
    serving,
    shelve,
)

SMALL = content(100_000)
"""A blob of one short chunk."""
LARGE = content(CHUNK_SIZE + 5000, 1)
"""A blob of two chunks."""
NOBODY = BlobId(BlobAlgorithm.SHA256, "ab" * 32)


# What members get ----------------------------------------------------------------------------------------------------


def test_a_node_says_who_it_is(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(tmp_path) as node:
            got = await node.asker().ask("GET", "/v1/hello")
            hello = decode(got.body, Hello)
            assert (got.status, hello.node) == (200, ME)
            assert hello.started == 7.0

    run(test())


def test_chunks_are_given_whole_and_in_ranges(tmp_path: Path) -> None:
    async def test() -> None:
        blob = shelve(tmp_path, LARGE)
        async with serving(tmp_path) as node:
            asker = node.asker()
            first = await asker.chunk(blob, len(LARGE), 0)
            assert (first.status, first.body) == (200, LARGE[:CHUNK_SIZE])
            second = await asker.chunk(blob, len(LARGE), 1)
            assert (second.status, second.body) == (200, LARGE[CHUNK_SIZE:])
            part = await asker.chunk(blob, len(LARGE), 1, range_="bytes=10-99")
            assert (part.status, part.body) == (206, LARGE[CHUNK_SIZE + 10 : CHUNK_SIZE + 100])
            assert part.headers["content-range"] == "bytes 10-99/5000"
            assert part.headers["x-manta-digest"] == second.headers["x-manta-digest"]
            told = await node.daemon.hear(Uploaded, lambda message: bool(message.given))
            assert told.given == [(ASKER, len(LARGE) + 90, 3)]
            assert open_files() == []

    run(test())


def test_a_connection_serves_one_request_after_the_other(tmp_path: Path) -> None:
    async def test() -> None:
        blob = shelve(tmp_path, LARGE)
        async with serving(tmp_path) as node:
            asker = node.asker()
            reader, writer = await asker.connect()
            heads = [asker.head("GET", chunk_target(blob, len(LARGE), chunk)) for chunk in (1, 0, 1)]
            writer.write(b"".join(head for head, _ in heads))  # pipelined
            for (_, nonce), part in zip(
                heads, (LARGE[CHUNK_SIZE:], LARGE[:CHUNK_SIZE], LARGE[CHUNK_SIZE:]), strict=True
            ):
                got = await read_answer(reader)
                asker.check(got, nonce)
                assert got.body == part
            await hang_up(writer)

    run(test())


def test_bitmaps_say_what_is_here(tmp_path: Path) -> None:
    async def test() -> None:
        whole, half = shelve(tmp_path, LARGE), shelve(tmp_path, LARGE[1:], [1])
        old = shelve(tmp_path, LARGE[2:], boot_id=b"another life....")
        async with serving(tmp_path) as node:
            node.server.set_origins({"https://hub": 30.0, "https://done": -1.0}, 5e6)
            sizes = [(whole, 0), (half, 1), (old, 2), (NOBODY, 5)]
            asked = HaveRequest(blobs=[(str(blob), len(LARGE) - less) for blob, less in sizes] + [(str(whole), 77)])
            got = await node.asker().ask("POST", "/v1/have", encode(asked))
            have = decode(got.body, Have)
            assert have.blobs == {str(whole): b"\x03", str(half): b"\x02"}
            assert (have.node, have.slots, have.busy, have.origin_rate) == (ME, 8, 0, 5e6)
            assert have.pauses.keys() == {"https://hub"}
            assert 29 < have.pauses["https://hub"] <= 30

    run(test())


def test_a_packed_chunk_unpacks_to_what_it_is_and_weights_are_not_packed(tmp_path: Path) -> None:
    import lz4.frame

    async def test() -> None:
        text = b"".join(b"%d tokens are in line %d\n" % (n % 7, n) for n in range(20_000))
        words, weights = shelve(tmp_path, text), shelve(tmp_path, LARGE)
        async with serving(tmp_path) as node:
            asker = node.asker()
            got = await asker.chunk(words, len(text), 0, lz4=True)
            assert (got.status, got.headers["x-manta-encoding"]) == (200, "lz4")
            assert int(got.headers["x-manta-bytes"]) == len(text) > len(got.body)
            assert lz4.frame.decompress(got.body) == text
            plain = await asker.chunk(words, len(text), 0)
            assert (plain.headers["x-manta-encoding"], plain.body) == ("identity", text)
            noise = await asker.chunk(weights, len(LARGE), 0, lz4=True)
            assert (noise.headers["x-manta-encoding"], noise.body) == ("identity", LARGE[:CHUNK_SIZE])

    run(test())


def test_questions_go_to_the_daemon(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(tmp_path) as node:
            question = encode(ResolveRequest(kind="models", repo="org/name"))
            node.daemon.answers["resolve"] = lambda asked: Reply(asked.order, 200, b"an answer to " + asked.body)
            got = await node.asker().ask("POST", "/v1/ask/resolve", question)
            assert (got.status, got.body) == (200, b"an answer to " + question)
            assert node.daemon.asked("resolve")[0].node == ASKER
            node.daemon.answers["report"] = lambda asked: Reply(asked.order, 200, b"")
            assert (await node.asker().ask("POST", "/v1/ask/report")).status == 200

    run(test())


def test_a_long_answer_comes_by_descriptor(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(tmp_path) as node:
            question = encode(TreeRequest(kind="models", repo="org/name", commit="c" * 40))
            tree = content(3_000_000)
            fds = []

            def answer(asked: object) -> None:
                fd = os.memfd_create("tree")
                os.write(fd, tree)
                fds.append(fd)
                node.daemon.reply(Reply(node.daemon.asked("tree")[0].order, 200), fd)

            node.daemon.answers["tree"] = answer
            got = await node.asker().ask("POST", "/v1/ask/tree", question)
            assert (got.status, got.body) == (200, tree)
            with pytest.raises(OSError, match="Bad file"):
                os.fstat(fds[0])

    run(test())


def test_a_daemon_that_says_nothing_is_not_waited_for(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(tmp_path, limits=Limits(question_s=0.05, questions=2)) as node:
            got = await node.asker().ask("POST", "/v1/ask/report")
            assert (got.status, got.refusal.reason) == (503, "unavailable")
            assert node.daemon.gone() == [node.daemon.asked("report")[0].order]

        async with serving(tmp_path, limits=Limits(questions=2)) as node:
            asking = [asyncio.create_task(node.asker().ask("POST", "/v1/ask/report")) for _ in range(2)]
            await node.daemon.until(lambda: len(node.daemon.asked("report")) == 2)
            got = await node.asker().ask("POST", "/v1/ask/report")
            assert (got.status, got.refusal.reason) == (503, "busy")
            asking[0].cancel()  # who asked hangs up: the daemon hears that
            await node.daemon.until(node.daemon.gone)
            asking[1].cancel()
            await asyncio.wait(asking)

    run(test())


# What is not there, and what is no request ---------------------------------------------------------------------------


def test_what_is_not_here_is_not_given(tmp_path: Path) -> None:
    async def test() -> None:
        blob = shelve(tmp_path, LARGE, [0])
        old = shelve(tmp_path, LARGE[1:], boot_id=b"another life....")
        sealed = shelve(tmp_path, LARGE[2:], boot_id=b"another life....", sealed=True)
        other_grid = shelve(tmp_path, SMALL, chunk_size=64 * 1024)
        async with serving(tmp_path) as node:
            asker = node.asker()
            for name, size, chunk in [
                (blob, len(LARGE), 1),  # not fetched yet
                (NOBODY, 1000, 0),
                (blob, len(LARGE) - 1, 0),  # another size
                (blob, CHUNK_SIZE, 0),
                (old, len(LARGE) - 1, 0),  # in doubt since a crash
                (other_grid, len(SMALL), 0),
            ]:
                got = await asker.chunk(name, size, chunk)
                assert (got.status, got.refusal.reason) == (404, "absent")
            assert (await asker.chunk(sealed, len(LARGE) - 2, 0)).body == LARGE[2 : CHUNK_SIZE + 2]

    run(test())


@pytest.mark.parametrize(
    ("target", "range_"),
    [
        (f"/v1/blobs/{NOBODY}/0", ""),
        (f"/v1/blobs/{NOBODY}/0?size=0", ""),
        (f"/v1/blobs/{NOBODY}/1?size=8388608", ""),
        (f"/v1/blobs/{NOBODY}/0?size=100&size=-1", ""),
        (f"/v1/blobs/{NOBODY}/0?size=99999999999999999", ""),
        (f"/v1/blobs/{NOBODY}/0?size=100&more=1", ""),
        (f"/v1/blobs/{NOBODY}/0?size=100&pull=_", ""),
        (f"/v1/blobs/{NOBODY}/0?size=100", "bytes=0-100"),
        (f"/v1/blobs/{NOBODY}/0?size=100", "bytes=5-4"),
        (f"/v1/blobs/{NOBODY}/0?size=100", "bytes=-5"),
        (f"/v1/blobs/{NOBODY}/0?size=100", "bytes=0-1,5-6"),
        (f"/v1/blobs/{NOBODY}/-1?size=100", ""),
        ("/v1/blobs/../../../../etc/passwd/0?size=100", ""),
        ("/v1/blobs/%2e%2e%2f%2e%2e%2fversion/0?size=100", ""),
        ("/v1/blobs/sha256-../../version/0?size=2", ""),
        ("/v1/blobs/sha256-" + "A" * 64 + "/0?size=100", ""),
        ("/v1/blobs//0?size=100", ""),
        ("/v1/" + "x" * 8000, ""),
        ("/v1/nothing", ""),
        ("/v1/ask/pull", ""),
        ("/v1/have", ""),
    ],
)
def test_what_is_no_request_is_refused(tmp_path: Path, target: str, range_: str) -> None:
    async def test() -> None:
        async with serving(tmp_path) as node:
            got = await node.asker().ask("GET", target, range_=range_)
            assert (got.status, got.refusal.reason) == (400, "invalid")
            assert node.daemon.asked("pull") == []

    run(test())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x91" * 5000,
        encode(HaveRequest(blobs=[("../../version", 100)])),
        encode(HaveRequest(blobs=[(f"sha256-{'a' * 64}", 1)] * 257)),
    ],
)
def test_a_body_that_is_none_is_refused(tmp_path: Path, body: bytes) -> None:
    async def test() -> None:
        async with serving(tmp_path) as node:
            assert (await node.asker().ask("POST", "/v1/have", body)).status == 400
            assert (await node.asker().ask("POST", "/v1/ask/tree", body)).status == 400
            assert node.daemon.asked("tree") == []

    run(test())


def test_a_damaged_entry_is_as_good_as_none(tmp_path: Path) -> None:
    from manta.cache.layout import Layout

    async def test() -> None:
        blob = shelve(tmp_path, LARGE)
        path = Layout(tmp_path).map(blob)
        damaged = bytearray(path.read_bytes())
        damaged[129 + 3] ^= 1  # in the first entry's digest
        path.write_bytes(damaged)
        async with serving(tmp_path) as node:
            assert (await node.asker().chunk(blob, len(LARGE), 0)).status == 404
            assert (await node.asker().chunk(blob, len(LARGE), 1)).status == 200
            damaged[8] ^= 1  # the header: now nothing is believed
            path.write_bytes(damaged)
            assert (await node.asker().chunk(blob, len(LARGE), 1)).status == 404
            path.write_bytes(b"")
            assert (await node.asker().chunk(blob, len(LARGE), 1)).status == 404

    run(test())


# Who may not ---------------------------------------------------------------------------------------------------------


def test_strangers_get_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        blob = shelve(tmp_path, SMALL)
        target = chunk_target(blob, len(SMALL), 0)
        async with serving(tmp_path) as node:
            stranger = node.asker(keys=(b"another key of the same length...",))
            for got in (
                await stranger.ask("GET", target),
                await node.asker(keys=()).ask("GET", target),
                await node.asker().ask("GET", target, headers={"authorization": "Bearer hf_token"}),
                await node.asker().ask("GET", target, now=time.time() - 31),
                await node.asker().ask("GET", target, now=time.time() + 31),
                await Asker(node.port, to="00000000000000ff").ask("GET", target),
                await stranger.ask("POST", "/v1/ask/report"),
                await stranger.ask("GET", "/v1/no/such/thing"),
            ):
                assert (got.status, got.refusal.reason) == (401, "unauthorized")
                assert SMALL[:10] not in got.body
                assert "x-manta-mac" not in got.headers
            told = await node.daemon.hear(Uploaded)
            assert (told.given, told.refused_auth) == ([], 8)
            assert node.daemon.asked("report") == []

    run(test())


def test_a_request_is_good_once(tmp_path: Path) -> None:
    async def test() -> None:
        blob = shelve(tmp_path, SMALL)
        async with serving(tmp_path) as node:
            asker = node.asker()
            head, _ = asker.head("GET", chunk_target(blob, len(SMALL), 0))
            statuses = []
            for _ in range(2):
                reader, writer = await asker.connect()
                writer.write(head)
                statuses.append((await read_answer(reader)).status)
                await hang_up(writer)
            assert statuses == [200, 401]

    run(test())


def test_what_was_signed_cannot_be_changed(tmp_path: Path) -> None:
    async def test() -> None:
        blob = shelve(tmp_path, SMALL)
        target = chunk_target(blob, len(SMALL), 0)
        async with serving(tmp_path) as node:
            asker = node.asker()
            changed = [
                (asker.head("GET", target)[0].replace(b"/0?size", b"/1?size"), b""),
                (asker.head("GET", target, range_="bytes=0-9")[0].replace(b"bytes=0-9", b"bytes=0-8"), b""),
                (asker.head("GET", target)[0].replace(b"GET /", b"PUT /"), b""),
                (asker.head("POST", "/v1/have", b"\x81\xa5blobs\x90")[0], b"\x81\xa5blobs\x80"),
                (asker.head("GET", target)[0].replace(ASKER.encode(), b"00000000000000cc"), b""),
            ]
            for head, body in changed:
                reader, writer = await asker.connect()
                writer.write(head + body)
                assert (await read_answer(reader)).status == 401
                await hang_up(writer)

    run(test())


def test_a_key_is_replaced_without_a_break(tmp_path: Path) -> None:
    async def test() -> None:
        blob, new = shelve(tmp_path, SMALL), b"the key that comes after the old one"
        async with serving(tmp_path) as node:
            old_asker, new_asker = node.asker(), node.asker(keys=(new, KEY))
            assert (await new_asker.chunk(blob, len(SMALL), 0)).status == 401
            node.server.set_keys([KEY, new])
            assert (await old_asker.chunk(blob, len(SMALL), 0)).status == 200
            assert (await new_asker.chunk(blob, len(SMALL), 0)).status == 200
            node.server.set_keys([new])
            assert (await old_asker.chunk(blob, len(SMALL), 0)).status == 401
            assert (await new_asker.chunk(blob, len(SMALL), 0)).status == 200

    run(test())


def test_without_a_key_only_public_blobs_are_given_and_only_here(tmp_path: Path) -> None:
    async def test() -> None:
        public, private = shelve(tmp_path, SMALL), shelve(tmp_path, LARGE)
        settings = msgspec.structs.replace(SETTINGS, keys=[])
        async with serving(tmp_path, settings) as node:
            node.daemon.answers["public"] = lambda asked: Reply(
                asked.order, 200 if asked.body == str(public).encode() else 403
            )
            asker = node.asker(keys=())
            for _ in range(2):
                assert (await asker.chunk(public, len(SMALL), 0)).body == SMALL
                got = await asker.chunk(private, len(LARGE), 0)
                assert (got.status, got.refusal.reason) == (403, "withheld")
            assert len(node.daemon.asked("public")) == 2  # each is remembered
            asked = HaveRequest(blobs=[(str(public), len(SMALL)), (str(private), len(LARGE))])
            have = decode((await asker.ask("POST", "/v1/have", encode(asked))).body, Have)
            assert have.blobs == {str(public): b"\x01"}

        settings = msgspec.structs.replace(settings, host="0.0.0.0")
        async with serving(tmp_path, settings, listening=False) as node:
            trouble = await node.daemon.hear(Trouble)
            assert trouble.kind == "listen"
            assert "without a key" in trouble.message
            node.server.set_keys([KEY])
            address = (await node.daemon.hear(Listening)).address
            assert node.daemon.told[-1] == Listening(0, address)
            assert Trouble(0, "listen", "") in node.daemon.told
            asker = Asker(int(address.rpartition(":")[2]))
            assert (await asker.chunk(private, len(LARGE), 1)).status == 200
            node.server.set_keys([])  # taken away: nobody beyond this machine is served any more
            await node.daemon.until(lambda: node.daemon.told.count(trouble) == 2)
            with pytest.raises(OSError, match="Connect"):
                await asker.connect()

    run(test())


def test_blobs_of_private_repos_are_withheld_where_that_is_wanted(tmp_path: Path) -> None:
    async def test() -> None:
        blob = shelve(tmp_path, SMALL)
        async with serving(tmp_path, msgspec.structs.replace(SETTINGS, share="public")) as node:
            known = False
            node.daemon.answers["public"] = lambda asked: Reply(asked.order, 200 if known else 403)
            asked = encode(HaveRequest(blobs=[(str(blob), len(SMALL))]))
            assert decode((await node.asker().ask("POST", "/v1/have", asked)).body, Have).blobs == {}
            assert (await node.asker().chunk(blob, len(SMALL), 0)).status == 403
            # The daemon withholds what it would have to fetch too.
            node.daemon.answers["pull"] = lambda asked: Reply(asked.order, 403, b"")
            assert (await node.asker().chunk(NOBODY, 1000, 0, PULL)).status == 403
            assert (await node.asker().chunk(blob, len(SMALL), 0, PULL)).status == 403

    run(test())


def with_tls(folder: Path) -> tuple[Settings, ssl.SSLContext]:
    """Settings with a certificate of localhost, and what trusts it."""
    authority, trusting = trustme.CA(), ssl.create_default_context()
    authority.configure_trust(trusting)
    certificate = authority.issue_cert("localhost")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(folder / "certificate.pem")
    files = {"tls_certificate": str(folder / "certificate.pem"), "tls_key": str(folder / "key.pem")}
    return msgspec.structs.replace(SETTINGS, **files), trusting


def test_over_tls(tmp_path: Path) -> None:
    async def test() -> None:
        blob = shelve(tmp_path, LARGE)
        settings, trusting = with_tls(tmp_path)
        async with serving(tmp_path, settings) as node:
            asker = Asker(node.port, tls=trusting)
            assert (await asker.chunk(blob, len(LARGE), 0)).body == LARGE[:CHUNK_SIZE]
            assert (await asker.chunk(blob, len(LARGE), 1, range_="bytes=1-5")).body == LARGE[CHUNK_SIZE:][1:6]
            with pytest.raises(ssl.SSLError):
                await Asker(node.port, tls=ssl.create_default_context()).connect()
            with pytest.raises((asyncio.IncompleteReadError, OSError)):
                await Asker(node.port).ask("GET", "/v1/hello")
            assert (await asker.ask("GET", "/v1/hello")).status == 200

    run(test())


def test_a_certificate_that_cannot_be_used_is_trouble(tmp_path: Path) -> None:
    async def test() -> None:
        settings = msgspec.structs.replace(SETTINGS, tls_certificate="/nowhere/c.pem", tls_key="/nowhere/k.pem")
        async with serving(tmp_path, settings, listening=False) as node:
            trouble = await node.daemon.hear(Trouble)
            assert trouble.kind == "listen"
            assert "/nowhere/c.pem" in trouble.message

    run(test())


def test_a_port_that_is_taken_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manta.swarm.server.LISTEN_PAUSE_SECONDS", 0.01)

    async def test() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            settings = msgspec.structs.replace(SETTINGS, port=taken.getsockname()[1])
            async with serving(tmp_path, settings, listening=False) as node:
                assert "in use" in (await node.daemon.hear(Trouble)).message
                taken.close()
                await node.daemon.hear(Listening)
                assert (await Asker(settings.port).ask("GET", "/v1/hello")).status == 200

    run(test())


# Who takes too much --------------------------------------------------------------------------------------------------


def test_who_finds_no_slot_hears_who_has_the_chunk(tmp_path: Path) -> None:
    async def test() -> None:
        blob = shelve(tmp_path, LARGE)
        async with serving(tmp_path, msgspec.structs.replace(SETTINGS, slots=2)) as node:
            gone = "00000000000000dd"
            for name in (ASKER, gone, "00000000000000cc"):
                assert (await node.asker(name).chunk(blob, len(LARGE), 0)).status == 200
            # Two that do not read keep both slots.
            slow = []
            for name in ("00000000000000e1", "00000000000000e2"):
                asker = node.asker(name)
                reader, writer = await asker.connect(limit=1000)
                writer.write(asker.head("GET", chunk_target(blob, len(LARGE), 0))[0])
                await reader.readuntil(b"\r\n\r\n")
                slow.append(writer)
            got = await node.asker().chunk(blob, len(LARGE), 0)
            assert (got.status, got.refusal.reason) == (503, "busy")
            assert got.refusal.holders == ["00000000000000cc"]  # not the asker, and nobody who is no member
            have = decode((await node.asker().ask("POST", "/v1/have", encode(HaveRequest(blobs=[])))).body, Have)
            assert (have.slots, have.busy) == (2, 2)
            assert (await node.asker().chunk(blob, len(LARGE), 7_000_000)).status == 400
            for writer in slow:
                await hang_up(writer)
            # Their slots are free again.
            told = await node.daemon.hear(Uploaded, lambda message: message.busy == 0 and bool(message.refused_busy))
            assert told.refused_busy == 1
            assert (await node.asker().chunk(blob, len(LARGE), 0)).status == 200
            assert open_files() == []

    run(test())


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_a_reader_that_is_too_slow_is_cut_off(tmp_path: Path, tls: bool) -> None:
    async def test() -> None:
        blob = shelve(tmp_path, LARGE)
        settings, trusting = with_tls(tmp_path) if tls else (SETTINGS, None)
        async with serving(tmp_path, settings, Limits(slow_window_s=0.2)) as node:
            asker = Asker(node.port, tls=trusting)
            reader, writer = await asker.connect(limit=1000)
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            writer.write(asker.head("GET", chunk_target(blob, len(LARGE), 0))[0])
            await reader.readuntil(b"\r\n\r\n")
            told = await node.daemon.hear(Uploaded, lambda message: bool(message.given))
            [(who, count, chunks)] = told.given
            assert (who, chunks) == (ASKER, 0)
            assert 0 < count < CHUNK_SIZE
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await reader.readexactly(CHUNK_SIZE)
            await hang_up(writer)
            assert (await asker.chunk(blob, len(LARGE), 0)).status == 200

    run(test())


def test_a_request_that_drips_is_cut_off(tmp_path: Path) -> None:
    async def drip(asker: Asker, first: bytes, piece: bytes) -> bytes:
        reader, writer = await asker.connect()
        writer.write(first)
        try:
            async with asyncio.timeout(20):
                while not reader.at_eof():
                    try:
                        async with asyncio.timeout(0.02):
                            return await reader.read(1000)
                    except TimeoutError:
                        writer.write(piece)
        except ConnectionError:
            pass
        finally:
            await hang_up(writer)
        return b""

    async def test() -> None:
        async with serving(tmp_path, limits=Limits(idle_s=0.2, body_s=0.2)) as node:
            asker = node.asker()
            assert await drip(asker, b"GET /v1/hello HTTP/1.1\r\n", b"x: y\r\n"[:1]) == b""
            assert await drip(asker, b"", b"") == b""
            head, _ = asker.head("POST", "/v1/have", b"x" * 60_000)
            assert (await drip(asker, head, b"x")).startswith(b"HTTP/1.1 400")

    run(test())


def test_a_request_that_is_too_large_is_refused(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(tmp_path) as node:
            asker = node.asker()
            head, _ = asker.head("POST", "/v1/have", b"", headers={"transfer-encoding": "chunked"})
            endless = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
            for first, more in [
                (b"GET /v1/hello HTTP/1.1\r\nauthorization: " + b"x" * 100_000, b""),
                (b"GET /v1/hello HTTP/1.1\r\n" + b"name: value\r\n" * 100 + b"\r\n", b""),
                (b"GET /" + b"x" * 100_000, b""),
                (asker.head("POST", "/v1/have", b"x" * (BODY_BYTES_MAX + 1))[0], b"x" * 0x10000),
                (head, endless),
            ]:
                reader, writer = await asker.connect()
                writer.write(first)
                try:
                    async with asyncio.timeout(20):
                        for _ in range(100):
                            writer.write(more)
                            await writer.drain()
                        said = await reader.read()
                except ConnectionError:
                    said = b""
                await hang_up(writer)
                assert said == b"" or said.startswith((b"HTTP/1.1 400", b"HTTP/1.0 400"))
            assert (await asker.ask("GET", "/v1/hello")).status == 200

    run(test())


def test_there_are_no_more_connections_than_allowed(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(tmp_path, limits=Limits(connections=3)) as node:
            member = node.asker()
            reader, writer = await member.connect()
            writer.write(member.head("GET", "/v1/hello")[0])
            assert (await read_answer(reader)).status == 200
            crowd = [await member.connect() for _ in range(6)]
            # Strangers are put out before a member that said something.
            writer.write(member.head("GET", "/v1/hello")[0])
            assert (await read_answer(reader)).status == 200
            put_out = 0
            for each, _ in crowd[:-2]:
                try:
                    put_out += await each.read() == b""
                except ConnectionError:
                    put_out += 1
            assert put_out == 4
            for _, other in [*crowd, (reader, writer)]:
                await hang_up(other)

    run(test())


def test_the_upload_rate_is_kept(tmp_path: Path) -> None:
    async def test() -> None:
        blob = shelve(tmp_path, LARGE[: 1024 * 1024])
        async with serving(tmp_path, msgspec.structs.replace(SETTINGS, upload_rate=4 * 1024 * 1024)) as node:
            began = time.monotonic()
            gots = await asyncio.gather(*(node.asker(f"{n:016x}").chunk(blob, 1024 * 1024, 0) for n in range(4)))
            assert [got.status for got in gots] == [200] * 4
            # Never faster; how much slower depends on the machine.
            assert time.monotonic() - began > 0.5

    run(test())


# What goes away under it ---------------------------------------------------------------------------------------------


def test_a_blob_that_is_evicted_while_it_is_sent_arrives(tmp_path: Path) -> None:
    from manta.cache.layout import Layout

    async def test() -> None:
        blob = shelve(tmp_path, LARGE)
        async with serving(tmp_path) as node:
            asker = node.asker()
            reader, writer = await asker.connect(limit=1000)
            head, nonce = asker.head("GET", chunk_target(blob, len(LARGE), 0))
            writer.write(head)
            await node.daemon.hear(Uploaded, lambda message: message.busy == 1)
            Layout(tmp_path).map(blob).unlink()
            Layout(tmp_path).data(blob).unlink()
            got = await read_answer(reader)
            asker.check(got, nonce)
            assert got.body == LARGE[:CHUNK_SIZE]
            await hang_up(writer)
            assert (await asker.chunk(blob, len(LARGE), 0)).status == 404
            assert open_files() == []

    run(test())


def test_a_file_that_became_shorter_ends_the_answer(tmp_path: Path) -> None:
    from manta.cache.layout import Layout

    async def test() -> None:
        blob = shelve(tmp_path, LARGE)
        async with serving(tmp_path) as node:
            asker = node.asker()
            reader, writer = await asker.connect(limit=1000)
            writer.write(asker.head("GET", chunk_target(blob, len(LARGE), 0))[0])
            await node.daemon.hear(Uploaded, lambda message: message.busy == 1)
            os.truncate(Layout(tmp_path).data(blob), 5_000_000)
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await read_answer(reader)
            await hang_up(writer)
            assert (await asker.chunk(blob, len(LARGE), 0)).status == 404

    run(test())


# The page ------------------------------------------------------------------------------------------------------------


async def look(
    port: int, target: str, host: str = "", headers: str = "", source: str = "127.0.0.1"
) -> tuple[int, bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
    try:
        writer.write(f"GET {target} HTTP/1.1\r\nhost: {host or f'127.0.0.1:{port}'}\r\n{headers}\r\n".encode())
        got = await read_answer(reader)
        return got.status, got.body
    finally:
        await hang_up(writer)


def test_the_page_is_for_this_machine_and_for_who_has_a_link(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(tmp_path) as node:
            node.daemon.answers["page"] = lambda asked: Reply(asked.order, 200, b'["%s"]' % asked.body)
            assert await look(node.port, "/") == (200, DOCUMENT)
            assert await look(node.port, "/page.json?a=b%20c") == (200, b'["/page.json?a=b+c"]')
            assert (await look(node.port, "/page.json", host=f"localhost:{node.port}"))[0] == 200
            assert (await look(node.port, "/page.jso"))[0] == 404
            assert (await look(node.port, "/page.json/../../etc/passwd"))[0] == 404
            # A name that was made to lead here, a proxy that passes others on, another machine.
            refused = [
                {"host": "evil.example"},
                {"headers": "x-forwarded-for: 10.0.0.1\r\n"},
                {"host": "[::2]:1"},
                {"host": "["},
            ]
            for how in refused:
                assert (await look(node.port, "/page.json", **how))[0] == 403
            assert len(node.daemon.asked("page")) == 2
            link = sign_page([KEY], time.time())
            assert await look(node.port, f"/page.json?{link}&x=1", host="node.example") == (200, b'["/page.json?x=1"]')
            for wrong in (
                sign_page([KEY], time.time() - 601),
                sign_page([KEY], time.time() + 601),
                sign_page([b"another key of the same length..."], time.time()),
                link.replace("until=", "until=1"),
                link[:-1] + ("0" if link[-1] != "0" else "1"),
                link + "&mac=%C3%A9",
            ):
                assert (await look(node.port, f"/?{wrong}", host="node.example"))[0] == 403

    run(test())


def test_the_pages_data_may_come_by_descriptor(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(tmp_path) as node:
            data = b"[" + b"1," * 100_000 + b"1]"

            def answer(_asked: object) -> None:
                fd = os.memfd_create("page")
                os.write(fd, data)
                node.daemon.reply(Reply(node.daemon.asked("page")[0].order, 200), fd)

            node.daemon.answers["page"] = answer
            assert await look(node.port, "/page.json") == (200, data)

    run(test())
