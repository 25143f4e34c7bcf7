from __future__ import annotations

import os
from pathlib import Path

import pytest

from manta.errors import Denied, Invalid
from manta.hub.origin import Access, Location, OriginRequest, default_access, origin_of

SECRET = "hf_averysecrettoken"


def test_an_access_never_shows_its_token() -> None:
    access = Access(SECRET)
    assert SECRET not in f"{access!r} {access} {[access]} {access.fingerprint}"
    assert access.headers == {"authorization": f"Bearer {SECRET}"}
    assert repr(Access.anonymous()) == "Access(anonymous)"
    assert Access.anonymous().headers == {}


def test_accesses_are_compared_by_their_token() -> None:
    assert Access(SECRET) == Access(SECRET)
    assert len({Access(SECRET), Access(SECRET), Access("hf_other"), Access.anonymous()}) == 3
    assert Access(SECRET).fingerprint != Access("hf_other").fingerprint
    assert len(Access(SECRET).fingerprint) == 12


@pytest.mark.parametrize("token", ["hf_a\nx-evil: 1", "hf_x y", "hf_é", "hf_\0"])
def test_a_token_that_no_header_can_carry_is_refused_without_showing_it(token: str) -> None:
    with pytest.raises(Invalid) as caught:
        Access(token)
    assert token not in caught.value.message
    assert "hf auth login" in caught.value.message


def test_secrets_are_not_in_the_text_of_requests_and_locations() -> None:
    url = f"https://cdn.example/blob?Signature={SECRET}"
    location = Location(url, {"authorization": SECRET})
    assert SECRET not in f"{location!r} {location}"
    assert location.origin == "https://cdn.example:443"
    assert SECRET not in repr(OriginRequest("https://hub.example/x", {"authorization": SECRET}))


def test_a_location_goes_stale_at_its_refresh_time() -> None:
    location = Location("https://cdn.example/blob", {}, expires_at=1000.0, refresh_at=900.0)
    assert not location.stale(899.9)
    assert location.stale(900.0)
    assert not Location("https://cdn.example/blob", {}).stale(1e12)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("https://hub.example/a", "https://HUB.example:443/b?c", True),
        ("http://hub.example", "http://hub.example:80/", True),
        ("http://hub.example", "https://hub.example", False),
        ("https://hub.example", "https://hub.example:8443", False),
        ("https://hub.example", "https://hub.example.evil", False),
        ("https://hub.example", "https://hub.example@evil.example", False),
        ("http://[::1]:80/", "http://[::1]/", True),
    ],
)
def test_an_origin_is_scheme_host_and_port(one: str, other: str, same: bool) -> None:
    assert (origin_of(one) == origin_of(other)) is same


@pytest.mark.parametrize(
    "url", ["", "hub.example", "ftp://hub.example", "https://", "http://x:port", "http://[::1", "/path"]
)
def test_what_is_no_http_url_has_no_origin(url: str) -> None:
    with pytest.raises(Invalid):
        origin_of(url)


@pytest.fixture
def hf_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "stored_tokens"))
    return tmp_path


def test_the_default_access_is_what_the_users_own_tools_have(hf_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_access() == Access.anonymous()
    (hf_home / "token").write_text("hf_saved\n")
    assert default_access() == Access("hf_saved")
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    assert default_access() == Access("hf_environment")


def test_a_saved_token_that_cannot_be_read_is_said(hf_home: Path) -> None:
    (hf_home / "token").mkdir()
    with pytest.raises(Denied, match="hf auth login"):
        default_access()


def test_a_user_who_sends_no_implicit_token_is_anonymous(hf_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    assert default_access().is_anonymous
