from __future__ import annotations

import base64
import json
from email.utils import formatdate
from typing import Any

import pytest

from manta.errors import Absent, Corrupt, Denied, Throttled, Unavailable
from manta.hub import location
from manta.hub.origin import REFRESH_MARGIN_S, Access, Location
from manta.model.ids import BlobAlgorithm, BlobId, Commit, RepoId, RepoKind
from manta.model.snapshot import FileEntry

HUB = "https://hub.example"
CDN = "https://cdn.example/repos/ab/cd"
REPO = RepoId(RepoKind.MODEL, "org/name")
COMMIT = Commit("c" * 40)
SHA256, SHA1 = "1f" * 32, "2e" * 20
LFS = FileEntry("model.safetensors", 4096, BlobId(BlobAlgorithm.SHA256, SHA256))
GIT = FileEntry("config.json", 17, BlobId(BlobAlgorithm.GIT_SHA1, SHA1))
USER = Access("hf_secret")
NOW = 1_700_000_000.0

LINKED = {"x-repo-commit": COMMIT, "x-linked-size": "4096", "x-linked-etag": f'"{SHA256}"'}


def parse(
    entry: FileEntry = LFS,
    status: int = 302,
    url: str = f"{HUB}/org/name/resolve/{COMMIT}/model.safetensors",
    access: Access = USER,
    **headers: str | None,
) -> Location:
    named: dict[str, Any] = {name.replace("_", "-"): text for name, text in headers.items()}
    given = {**(LINKED if entry is LFS else {}), **named}
    return location.parse_location(
        HUB,
        REPO,
        COMMIT,
        entry,
        access,
        status=status,
        url=url,
        headers={name: text for name, text in given.items() if text is not None},
        now=NOW,
    )


def test_a_request_names_the_file_of_the_commit_and_carries_the_token() -> None:
    request = location.location_request(HUB, REPO, COMMIT, "a b/ü#?%.txt", USER)
    assert request.url == f"{HUB}/org/name/resolve/{COMMIT}/a%20b/%C3%BC%23%3F%25.txt"
    assert request.headers["authorization"] == "Bearer hf_secret"
    assert request.headers["accept-encoding"] == "identity"
    assert "authorization" not in location.location_request(HUB, REPO, COMMIT, "x", Access.anonymous()).headers


def test_a_request_for_a_dataset_says_so() -> None:
    request = location.location_request(HUB, RepoId(RepoKind.DATASET, "org/name"), COMMIT, "x", USER)
    assert request.url == f"{HUB}/datasets/org/name/resolve/{COMMIT}/x"


def test_a_signed_url_goes_without_the_token() -> None:
    found = parse(location=f"{CDN}?Expires={NOW + 3600:.0f}&Signature=s")
    assert found.url.startswith(CDN)
    assert "authorization" not in found.headers
    assert found.expires_at == NOW + 3600
    assert found.refresh_at == NOW + 3600 - REFRESH_MARGIN_S


def test_the_hubs_own_url_goes_with_the_token() -> None:
    url = f"{HUB}/api/resolve-cache/models/org/name/{COMMIT}/config.json?etag=x"
    found = parse(GIT, 200, url, etag=f'"{SHA1}"', content_length="17")
    assert found.url == url
    assert found.headers["authorization"] == "Bearer hf_secret"
    assert found.expires_at is None
    assert "authorization" not in parse(GIT, 200, url, Access.anonymous()).headers


def test_a_hub_that_serves_large_files_itself_is_taken_at_its_word() -> None:
    found = parse(status=206, content_range="bytes 0-0/4096", x_linked_size=None, etag='"whatever"')
    assert found.headers["authorization"] == "Bearer hf_secret"


@pytest.mark.parametrize(
    "query",
    [
        f"Expires={NOW + 1000:.0f}",
        "X-Amz-Date=20231114T221320Z&X-Amz-Expires=1000",
        "X-Goog-Date=20231114T221320Z&X-Goog-Expires=1000",
        "se=2023-11-14T22%3A30%3A00Z&sig=x",
        "Policy="
        + base64.b64encode(
            json.dumps({"Statement": [{"Condition": {"DateLessThan": {"AWS:EpochTime": NOW + 1000}}}]}).encode()
        )
        .decode()
        .translate(str.maketrans("+=/", "-_~")),
        f"Expires={NOW + 1000:.0f}&X-Amz-Date=20231114T221320Z&X-Amz-Expires=3000",
    ],
)
def test_each_way_to_sign_tells_when_it_ends(query: str) -> None:
    assert parse(location=f"{CDN}?{query}").expires_at == NOW + 1000


@pytest.mark.parametrize(
    "query", ["", "Expires=soon", "X-Amz-Expires=1000", "Policy=%%%", "Policy=e30_", "se=then", "Expires=1"]
)
def test_a_url_that_does_not_say_is_used_until_it_fails(query: str) -> None:
    found = parse(location=f"{CDN}?{query}")
    assert found.expires_at is None
    assert not found.stale(NOW + 1e9)


def test_a_short_life_leaves_most_of_it_usable() -> None:
    found = parse(location=f"{CDN}?Expires={NOW + 60:.0f}")
    assert not found.stale(NOW + 44)
    assert found.stale(NOW + 45)


def test_a_wrong_clock_is_set_right_by_the_hubs_own_date() -> None:
    hub_now = NOW - 7200
    found = parse(location=f"{CDN}?Expires={hub_now + 3600:.0f}", date=formatdate(hub_now, usegmt=True))
    assert found.expires_at == NOW + 3600


@pytest.mark.parametrize(
    "headers",
    [
        {"x_repo_commit": "d" * 40},
        {"x_linked_size": "4095"},
        {"x_linked_size": "many"},
        {"x_linked_etag": f'"{"0" * 64}"'},
    ],
)
def test_an_answer_about_something_else_is_corrupt(headers: dict[str, Any]) -> None:
    with pytest.raises(Corrupt, match=r"model\.safetensors"):
        parse(location=CDN, **headers)


@pytest.mark.parametrize(
    ("entry", "status", "headers"),
    [
        (GIT, 200, {"content_length": "18"}),
        (GIT, 206, {"content_range": "bytes 0-0/18"}),
        (GIT, 200, {"etag": f'W/"{"0" * 40}"'}),
        (LFS, 200, {"x_linked_size": None, "content_length": "4097"}),
    ],
)
def test_a_direct_answer_about_something_else_is_corrupt(
    entry: FileEntry, status: int, headers: dict[str, Any]
) -> None:
    with pytest.raises(Corrupt):
        parse(entry, status, **headers)


@pytest.mark.parametrize(
    ("entry", "headers"),
    [
        (LFS, {"x_repo_commit": None, "x_linked_size": None, "x_linked_etag": None}),
        (LFS, {"x_linked_etag": SHA256}),
        (LFS, {"x_linked_etag": "", "x_linked_size": ""}),
        (GIT, {"etag": '"abc-gzip"'}),
        (GIT, {"content_length": "5", "content_encoding": "gzip"}),
    ],
)  # fmt: skip
def test_what_is_missing_or_not_meant_for_us_is_tolerated(entry: FileEntry, headers: dict[str, Any]) -> None:
    assert parse(entry, 302 if entry is LFS else 200, location=CDN, **headers)


def test_an_empty_file_may_have_no_first_byte() -> None:
    empty = FileEntry("empty", 0, BlobId(BlobAlgorithm.GIT_SHA1, SHA1))
    assert parse(empty, 416, content_range="bytes */0").url
    with pytest.raises(Unavailable):
        parse(GIT, 416, content_range="bytes */0")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (f"{HUB}/org/name/resolve/x", "in circles"),
        ("/relative", "in circles"),
        ("http://cdn.example/blob", "not encrypted"),
        ("ftp://cdn.example/blob", "no http address"),
    ],
)
def test_a_redirect_that_leads_nowhere_good_is_refused(target: str, words: str) -> None:
    with pytest.raises(Unavailable, match=words):
        parse(location=target)


def test_an_answer_from_another_host_is_refused() -> None:
    with pytest.raises(Unavailable, match=r"other\.example.*HF_ENDPOINT"):
        parse(GIT, 200, "https://other.example/x")


def test_a_login_page_is_no_file() -> None:
    with pytest.raises(Unavailable, match="a web page"):
        parse(GIT, 200, content_type="text/html; charset=utf-8")
    assert parse(GIT, 200, content_type="text/html", x_repo_commit=COMMIT)


def test_refusals_are_named() -> None:
    with pytest.raises(Denied, match="gated"):
        parse(status=403, x_error_code="GatedRepo")
    with pytest.raises(Absent, match=r"model\.safetensors"):
        parse(status=404, x_error_code="EntryNotFound")
    with pytest.raises(Throttled):
        parse(status=429)
    with pytest.raises(Unavailable):
        parse(status=503)


def test_no_error_shows_the_signature_or_the_token() -> None:
    wrong: list[dict[str, Any]] = [{"x_linked_size": "1"}, {"x_repo_commit": "d" * 40}, {"x_linked_etag": "x"}]
    for headers in wrong:
        with pytest.raises(Corrupt) as caught:
            parse(location=f"{CDN}?Signature=verysecret", **headers)
        assert "verysecret" not in str(caught.value)
        assert "hf_secret" not in str(caught.value)
