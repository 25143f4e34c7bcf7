"""Asking a member: what a true one answers is taken, and nothing of what others do."""

from __future__ import annotations

import asyncio
import os
import random
import ssl
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trustme

from manta.errors import Denied, Invalid, MantaError, Unavailable, Unreachable
from manta.swarm import client as module
from manta.swarm.auth import Answer
from manta.swarm.client import MemberClient
from manta.swarm.protocol import ANSWER_BYTES_MAX, Have, Refusal, ResolveRequest, decode, encode
from tests.swarm.fake_member import KEYS, FakeMember, run

ME, NODE = "0" * 16, "a" * 16
SOON = 5.0
"""A deadline that is not what is tested."""


def test_a_member_says_who_it_is_and_what_it_has() -> None:
    async def story() -> None:
        async with FakeMember(NODE, has={"blob": b"\x05"}) as member, MemberClient(ME, KEYS) as client:
            hello, rtt_s = await client.hello(member.address, SOON)
            assert (hello.node, hello.version) == (NODE, "1.0")
            assert 0 < rtt_s < SOON
            have, _ = await client.have(member.address, NODE, [("blob", 3), ("other", 3)], SOON)
            assert have == Have(node=NODE, blobs={"blob": b"\x05"})

    run(story)


def test_without_keys_nothing_is_signed() -> None:
    async def story() -> None:
        async with FakeMember(NODE, keys=()) as member, MemberClient(ME, ()) as client:
            hello, _ = await client.hello(member.address, SOON)
            assert hello.node == NODE
            member.mood = "other node"
            hello, _ = await client.hello(member.address, SOON)
            assert hello.node == "f" * 16
            for mood in ("bad node id", "garbage", "nested"):
                member.mood = mood
                with pytest.raises(Invalid):
                    await client.hello(member.address, SOON)

    run(story)


def test_questions_come_through_with_their_body_and_answers_with_their_status() -> None:
    async def story() -> None:
        async with FakeMember(NODE, answers={"resolve": (200, b"yes")}) as member, MemberClient(ME, KEYS) as client:
            body = encode(ResolveRequest(kind="model", repo="org/name"))
            answered = await client.ask(member.address, NODE, "resolve", body, SOON)
            assert (answered.status, answered.body) == (200, b"yes")
            assert member.bodies == [body]
            answered = await client.ask(member.address, NODE, "report", b"", SOON)
            assert answered.status == 404
            assert decode(answered.body, Refusal).reason == "absent"
            member.mood = "failing"
            answered = await client.ask(member.address, NODE, "report", b"", SOON)
            assert answered.status == 500

    run(story)


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("answer", os.MFD_CLOEXEC)
    yield fd
    os.close(fd)


def test_a_large_answer_goes_to_the_descriptor_and_is_checked_all_the_same(fd: int) -> None:
    tree = os.urandom(1 << 20) * (1 + ANSWER_BYTES_MAX // (1 << 20))

    async def story() -> None:
        async with FakeMember(NODE, answers={"tree": (200, tree)}) as member, MemberClient(ME, KEYS) as client:
            answered = await client.ask(member.address, NODE, "tree", b"", SOON, fd)
            assert (answered.status, answered.body) == (200, b"")
            assert os.pread(fd, len(tree) + 1, 0) == tree
            with pytest.raises(Invalid, match="more than"):
                await client.ask(member.address, NODE, "tree", b"", SOON)
            member.mood = "altered"
            with pytest.raises(Denied):
                await client.ask(member.address, NODE, "tree", b"", SOON, fd)
            assert os.fstat(fd).st_size == 0, "nothing is left of what is not genuine"
            member.mood, member.answers = "well", {}
            answered = await client.ask(member.address, NODE, "tree", b"", SOON, fd)
            assert decode(answered.body, Refusal).reason == "absent"
            assert os.fstat(fd).st_size == 0

    run(story)


def test_an_endless_answer_to_a_descriptor_ends(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TO_DESCRIPTOR_BYTES_MAX", 4 << 20)

    async def story() -> None:
        async with FakeMember(NODE, mood="endless") as member, MemberClient(ME, KEYS) as client:
            with pytest.raises(Invalid, match="more than"):
                await client.ask(member.address, NODE, "tree", b"", SOON, fd)
            assert os.fstat(fd).st_size == 0

    run(story)


@pytest.mark.parametrize(
    ("mood", "error", "words"),
    [
        ("silent", Unavailable, "did not answer within 0.2 s"),
        ("drip", Unavailable, "did not answer within 0.2 s"),
        ("endless headers", Invalid, "no HTTP"),
        ("cut", Unreachable, "closed the connection"),
        ("cut in the body", Unreachable, "closed the connection"),
        ("no http", Invalid, "no HTTP"),
        ("busy", Unavailable, "answered 503"),
        ("failing", Unavailable, "answered 500: The disk is gone"),
        ("redirect", Unavailable, "answered 302"),
        ("unsigned", Denied, "without a signature"),
        ("wrong signature", Denied, "signature"),
        ("altered", Denied, "signature"),
        ("compressed", Denied, "signature"),
        ("other node", Denied, "signature"),
        ("bad node id", Denied, "signature"),
        ("garbage", Denied, "signature"),
    ],
)
def test_a_hello_that_is_none(mood: str, error: type[MantaError], words: str) -> None:
    async def story() -> None:
        async with FakeMember(NODE, mood=mood) as member, MemberClient(ME, KEYS) as client:
            with pytest.raises(error, match=words) as raised:
                await client.hello(member.address, 0.2)
            assert raised.value.message.endswith((".", "?"))
            assert len(member.asked) <= 2

    run(story)


@pytest.mark.parametrize("mood", ["endless", "garbage", "nested", "other member's answer", "wrong signature", "silent"])
def test_a_have_that_is_none(mood: str) -> None:
    async def story() -> None:
        async with FakeMember(NODE, mood=mood) as member, MemberClient(ME, KEYS) as client:
            expected = {"wrong signature": Denied, "silent": Unavailable}.get(mood, Invalid)
            with pytest.raises(expected):
                await client.have(member.address, NODE, [("blob", 1)], 0.2 if mood == "silent" else SOON)

    run(story)


def test_an_answer_that_was_heard_before_is_not_taken_again() -> None:
    async def story() -> None:
        async with FakeMember(NODE) as member, MemberClient(ME, KEYS) as client:
            await client.hello(member.address, SOON)
            member.mood = "replay"
            with pytest.raises(Denied, match="signature"):
                await client.hello(member.address, SOON)

    run(story)


def test_the_answer_must_be_that_of_the_node_that_was_asked() -> None:
    """Another node with the same key at that address: it says no, and could not answer in the other's place."""

    async def story() -> None:
        async with FakeMember("b" * 16) as member, MemberClient(ME, KEYS) as client:
            with pytest.raises(Denied, match="for another node"):
                await client.have(member.address, NODE, [], SOON)

    run(story)


def test_keys_are_replaced_while_it_runs() -> None:
    async def story() -> None:
        old, new = KEYS[0], b"another key of this cluster"
        async with FakeMember(NODE, keys=(old,)) as member, MemberClient(ME, [new]) as client:
            with pytest.raises(Denied, match="refuses this node"):
                await client.hello(member.address, SOON)
            member.keys = (old, new)
            await client.hello(member.address, SOON)
            member.keys = (new,)
            await client.hello(member.address, SOON)
            client.keys = (old,)
            with pytest.raises(Denied):
                await client.hello(member.address, SOON)

    run(story)


def test_no_key_is_shown_in_what_goes_wrong() -> None:
    async def story() -> None:
        async with FakeMember(NODE, keys=(b"another key of this cluster",)) as member, MemberClient(ME, KEYS) as client:
            with pytest.raises(Denied) as raised:
                await client.hello(member.address, SOON)
            shown = repr(raised.value) + repr(raised.value.__cause__) + repr(client)
            assert KEYS[0].decode() not in shown

    run(story)


def test_nobody_there() -> None:
    async def story() -> None:
        async with FakeMember(NODE) as member:
            pass
        async with MemberClient(ME, KEYS) as client:
            with pytest.raises(Unreachable, match="takes no connection"):
                await client.hello(member.address, SOON)
            with pytest.raises(Unreachable, match="name"):
                await client.hello("nowhere.invalid:9402", SOON)
            for nonsense in ("unix:/tmp/x", ""):
                with pytest.raises(MantaError):
                    await client.hello(nonsense, SOON)

    run(story)


def test_an_address_that_takes_no_connection_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port whose queue of connections is full: the kernel does not answer."""
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.1)

    async def story() -> None:
        import socket

        with socket.socket() as listening, socket.socket() as first, socket.socket() as second:
            listening.bind(("127.0.0.1", 0))
            listening.listen(0)
            port = listening.getsockname()[1]
            for sock in (first, second):
                sock.setblocking(False)
                sock.connect_ex(("127.0.0.1", port))
            async with MemberClient(ME, KEYS) as client:
                with pytest.raises(Unreachable, match=r"took no connection for 0\.1 s"):
                    await client.hello(f"127.0.0.1:{port}", SOON)

    run(story)


def test_a_kept_connection_that_the_member_closes_is_no_failure() -> None:
    async def story() -> None:
        async with FakeMember(NODE) as member, MemberClient(ME, KEYS) as client:
            for _ in range(5):
                await client.have(member.address, NODE, [], SOON)
                await member.stop()
                await member.start()
            assert len(member.asked) == 5
            member.mood = "parting"
            for _ in range(5):
                await client.have(member.address, NODE, [], SOON)
                await asyncio.sleep(0.02)

    run(story)


def test_the_environment_s_proxy_is_not_for_members(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")

    async def story() -> None:
        async with FakeMember(NODE) as member, MemberClient(ME, KEYS) as client:
            await client.hello(member.address, SOON)

    run(story)


def test_no_bytes_that_a_hostile_member_sends_end_more_than_the_question() -> None:
    """True answers with parts of them altered, cut or doubled, by seed."""
    body = encode(Have(node=NODE, blobs={"blob": b"\x05"}))
    true = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nx-manta-mac: %s\r\n\r\n%s" % (len(body), b"0" * 64, body)
    chances = random.Random(7)

    def altered() -> bytes:
        data = bytearray(true)
        for _ in range(chances.randrange(1, 6)):
            at = chances.randrange(len(data))
            match chances.randrange(4):
                case 0:
                    data[at] = chances.randrange(256)
                case 1:
                    del data[at : at + chances.randrange(20)]
                case 2:
                    data[at:at] = data[at : at + chances.randrange(20)]
                case _:
                    data[at:at] = chances.choice(
                        [b"\r\n", b"\0", b"chunked\r\n", b":", b"\xff" * 9, b"HTTP/9.9 999 \r\n\r\n"]
                    )
        return bytes(data) or b"\n"

    async def story() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                await reader.readuntil(b"\r\n\r\n")
                writer.write(altered())
                writer.close()
                await writer.wait_closed()

        server = await asyncio.start_server(answer, "127.0.0.1")
        port = server.sockets[0].getsockname()[1]
        async with MemberClient(ME, KEYS) as client:
            for _ in range(400):
                with pytest.raises(MantaError) as raised:
                    await client.have(f"127.0.0.1:{port}", NODE, [("blob", 3)], SOON)
                assert raised.value.message.endswith((".", "?"))
        server.close()
        await server.wait_closed()

    run(story)


# TLS -----------------------------------------------------------------------------------------------------------------


def server_tls(authority: trustme.CA, name: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(name).configure_cert(context)
    return context


@pytest.fixture
def authorities(tmp_path: Path) -> tuple[trustme.CA, str]:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return authority, str(tmp_path / "ca.pem")


def test_over_tls_the_certificate_must_be_from_the_authorities_and_for_the_name(
    authorities: tuple[trustme.CA, str],
) -> None:
    authority, path = authorities

    async def story() -> None:
        async with FakeMember(NODE, tls=server_tls(authority, "127.0.0.1")) as member:
            async with MemberClient(ME, KEYS, path) as client:
                hello, _ = await client.hello(member.address, SOON)
                assert hello.node == NODE
            async with MemberClient(ME, KEYS, path, "manta.example") as client:
                with pytest.raises(Denied, match=r"tls_name"):
                    await client.hello(member.address, SOON)
        async with (
            FakeMember(NODE, tls=server_tls(authority, "manta.example")) as member,
            MemberClient(ME, KEYS, path, "manta.example") as client,
        ):
            await client.hello(member.address, SOON)
        async with (
            FakeMember(NODE, tls=server_tls(trustme.CA(), "127.0.0.1")) as member,
            MemberClient(ME, KEYS, path) as client,
        ):
            with pytest.raises(Denied, match=r"swarm\.tls_authorities"):
                await client.hello(member.address, SOON)

    run(story)


def test_one_side_with_tls_and_the_other_without(authorities: tuple[trustme.CA, str]) -> None:
    authority, path = authorities

    async def story() -> None:
        async with FakeMember(NODE) as member, MemberClient(ME, KEYS, path) as client:
            with pytest.raises(Denied, match=r"no certificate .*\([A-Z_ ]+\)"):
                await client.hello(member.address, SOON)
        async with FakeMember(NODE, tls=server_tls(authority, "127.0.0.1")) as member, MemberClient(ME, KEYS) as client:
            with pytest.raises(MantaError):
                await client.hello(member.address, SOON)

    run(story)


def test_authorities_that_cannot_be_read_are_said(tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("nothing")
    for name in ("empty.pem", "missing.pem"):
        with pytest.raises(Invalid, match=r"swarm\.tls_authorities"):
            MemberClient(ME, KEYS, str(tmp_path / name))


def test_the_digest_of_a_body_signs_as_the_body_does() -> None:
    from hashlib import sha256

    from manta.swarm.auth import Sender, sign_answer

    sender = Sender(ME, NODE, "0" * 32, KEYS[0])
    assert sign_answer(Answer(200, body=b"x"), sender, NODE) == sign_answer(
        Answer(200, body_sha256=sha256(b"x").hexdigest()), sender, NODE
    )
