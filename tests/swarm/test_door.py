"""Who comes in: addresses, certificates that are replaced, and connections that say nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from pathlib import Path

import msgspec
import pytest
import trustme

from manta.errors import Invalid, Unavailable
from manta.swarm.door import Certificate, bind, is_loopback
from manta.swarm.limits import Limits
from tests.swarm.node import SETTINGS, Asker, hang_up, run, serving


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
def test_this_machine(address: str) -> None:
    assert is_loopback(address)


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "10.0.0.1", "::ffff:10.0.0.1", "fe80::1%eth0", "128.0.0.1"])
def test_beyond_this_machine(address: str) -> None:
    assert not is_loopback(address)


def test_what_is_bound_is_what_was_asked_for() -> None:
    async def test() -> None:
        for host in ("127.0.0.1", "localhost", "::1"):
            sockets = await bind(host, 0, beyond_loopback=False)
            assert len({each.getsockname()[1] for each in sockets}) == 1
            for each in sockets:
                assert is_loopback(each.getsockname()[0])
                each.close()
        [both] = await bind("::", 0, beyond_loopback=True)
        with both, socket.create_connection(("127.0.0.1", both.getsockname()[1])):
            pass
        for host in ("0.0.0.0", "::", "192.0.2.1"):
            with pytest.raises(Invalid, match="without a key"):
                await bind(host, 0, beyond_loopback=False)
        with pytest.raises(Unavailable, match="no address"):
            await bind("no.such.host.invalid", 1, beyond_loopback=True)
        with pytest.raises(Unavailable, match="listen"):
            await bind("192.0.2.1", 0, beyond_loopback=True)

    run(test())


def test_a_certificate_is_replaced(tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"

    def issue(ns: int) -> None:
        issued = authority.issue_cert("localhost")
        issued.cert_chain_pems[0].write_to_path(certificate)
        issued.private_key_pem.write_to_path(key)
        os.utime(certificate, ns=(ns, ns))

    def shown(context: ssl.SSLContext) -> bytes:
        """The certificate that a client gets to see."""
        trusting = ssl.create_default_context()
        authority.configure_trust(trusting)
        to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = trusting.wrap_bio(to_client, to_server, server_hostname="localhost")
        server = context.wrap_bio(to_server, to_client, server_side=True)
        for _ in range(5):
            for side in (client, server):
                try:
                    side.do_handshake()
                except ssl.SSLWantReadError:
                    continue
        seen = client.getpeercert(binary_form=True)
        assert seen is not None
        return seen

    issue(1)
    subject = Certificate(certificate, key)
    first = shown(subject.context)
    subject.refresh()
    assert shown(subject.context) == first
    key.write_text("is being replaced")
    os.utime(certificate, ns=(2, 2))
    with pytest.raises(Unavailable, match="tried again"):
        subject.refresh()
    assert shown(subject.context) == first  # the one before stays in use
    issue(3)
    subject.refresh()
    assert shown(subject.context) != first
    key.unlink()
    with pytest.raises(Unavailable):
        Certificate(certificate, key)


def test_those_that_never_shake_hands_are_put_out(tmp_path: Path) -> None:
    async def test() -> None:
        authority = trustme.CA()
        issued = authority.issue_cert("localhost")
        issued.private_key_pem.write_to_path(tmp_path / "key.pem")
        issued.cert_chain_pems[0].write_to_path(tmp_path / "certificate.pem")
        settings = msgspec.structs.replace(
            SETTINGS, tls_certificate=str(tmp_path / "certificate.pem"), tls_key=str(tmp_path / "key.pem")
        )
        async with serving(tmp_path, settings, Limits(connections=2)) as node:
            silent = [await Asker(node.port).connect() for _ in range(4)]
            trusting = ssl.create_default_context()
            authority.configure_trust(trusting)
            assert (await Asker(node.port, tls=trusting).ask("GET", "/v1/hello")).status == 200
            assert len(node.server._door) <= 2
            for reader, writer in silent[:3]:
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
                await hang_up(writer)
            await hang_up(silent[3][1])
        async with serving(tmp_path, settings, Limits(handshake_s=0.1)) as node:
            reader, writer = await Asker(node.port).connect()
            assert await reader.read() == b""
            await hang_up(writer)
            while len(node.server._door):
                await asyncio.sleep(0)

    run(test())
