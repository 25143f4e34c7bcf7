"""The hub and the CDN over TLS: the data path works, and each certificate that is not to be trusted is told as a sentence."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from manta.control.binding import mounts
from manta.testing.hub import Generated, HubProcess, HubSpec, RepoSpec, faults
from tests.mount.node import Node, run

REPO, FILE, SIZE = "org/name", "weights.bin", 9 * 1024 * 1024 + 1
SPEC = HubSpec(repos=[RepoSpec(id=REPO, files={FILE: Generated("tls", SIZE)})])

pytestmark = pytest.mark.above_fuse

EXPIRED = datetime.datetime(2020, 2, 1, tzinfo=datetime.UTC)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def trusting(authority: trustme.CA, tmp_path: Path) -> dict[str, str]:
    """The environment of somebody who trusts the authority."""
    path = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(path)
    return {"SSL_CERT_FILE": str(path)}


def serving(certificate: trustme.LeafCert, folder: Path) -> HubProcess:
    chain, key = folder / "chain.pem", folder / "key.pem"
    for blob in certificate.cert_chain_pems:
        blob.write_to_path(chain, append=True)
    certificate.private_key_pem.write_to_path(key)
    return HubProcess(SPEC, tls=(chain, key))


@pytest.fixture
def tls_hub(authority: trustme.CA, tmp_path: Path) -> Iterator[HubProcess]:
    with serving(authority.issue_cert("127.0.0.1"), tmp_path) as hub:
        yield hub


def test_the_data_path(tls_hub: HubProcess, trusting: dict[str, str]) -> None:
    tls_hub.add_fault(faults.Reset(after_bytes=1_000_000), origin="cdn", times=2)
    tls_hub.add_fault(faults.Stall(after_bytes=3_000_000, seconds=60), origin="cdn", times=1)
    with Node(tls_hub.endpoint, {**trusting, "MANTA_FETCH_STALL_S": "1"}) as node:
        directory = node.mount(REPO)
        assert run('sha256sum "$1/$2"', directory, FILE).split()[0] == tls_hub.files(REPO).files[FILE].sha256
    assert tls_hub.stats().violations == []


def refusal(hub: HubProcess, environment: dict[str, str]) -> str:
    """What `manta mount` says; checks that it left nothing."""
    with Node(hub.endpoint, environment) as node:
        directory = node.directory()
        done = node.manta("mount", REPO, str(directory), code=None)
        assert done.returncode not in {0, 2}
        assert done.stderr.count("\n") == 1, done.stderr
        assert not any(entry.directory == str(directory) for entry in mounts())
    assert "no trusted TLS connection" in done.stderr
    assert "SSL_CERT_FILE" in done.stderr
    return done.stderr


def test_nobody_we_trust_signed_it(tls_hub: HubProcess) -> None:
    assert "unable to get local issuer certificate" in refusal(tls_hub, {})


def test_it_has_expired(authority: trustme.CA, trusting: dict[str, str], tmp_path: Path) -> None:
    with serving(authority.issue_cert("127.0.0.1", not_after=EXPIRED), tmp_path) as hub:
        assert "certificate has expired" in refusal(hub, trusting)


def test_it_is_another_hosts(authority: trustme.CA, trusting: dict[str, str], tmp_path: Path) -> None:
    with serving(authority.issue_cert("other.example"), tmp_path) as hub:
        assert "not valid for '127.0.0.1'" in refusal(hub, trusting)


def test_the_cdn_has_another_hosts_certificate(tls_hub: HubProcess, trusting: dict[str, str]) -> None:
    """The hub is trusted and sends the readers on to a name that the CDN's certificate does not have."""
    elsewhere = tls_hub.cdn_endpoint.replace("127.0.0.1", "localhost") + "/x"
    tls_hub.add_fault(faults.Headers(put={"Location": elsewhere}), kind="resolve")
    with Node(tls_hub.endpoint, {**trusting, "MANTA_FETCH_READ_TIMEOUT_S": "2"}) as node:
        directory = node.mount(REPO)
        assert "Input/output error" in run('cat "$1/$2" > /dev/null', directory, FILE, code=1)
        assert any("not valid for 'localhost'" in error for error in node.status()["errors"]), node.status()["errors"]
