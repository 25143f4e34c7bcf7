"""What Manta makes of the HTTP client under huggingface_hub, against a hub that says wrong, late and malformed things."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from huggingface_hub import close_session, get_session, set_client_factory

from manta.hub import client
from manta.hub.client import Broken, Exchange, Refused, exchange
from tests.hub.scripted_hub import Answer, Asked, ScriptedHub, free_port, json_answer, scripted_hub


def bounds(endpoint: str, seconds: float = 5.0, heard: list[Mapping[str, str]] | None = None) -> Exchange:
    return Exchange(endpoint, time.monotonic() + seconds, (heard if heard is not None else []).append)


def get(url: str, within: Exchange, token: str = "") -> bytes:
    with exchange(within):
        answer = get_session().get(url, headers={"authorization": f"Bearer {token}"} if token else {}, timeout=None)
    return bytes(answer.content)


def test_an_answer_comes_through_and_its_headers_are_heard(hub: ScriptedHub) -> None:
    hub.answer = lambda _: Answer(200, b"body", {"RateLimit": '"api";r=1;t=2'})
    heard: list[Mapping[str, str]] = []
    assert get(f"{hub.url}/x", bounds(hub.url, heard=heard)) == b"body"
    assert heard[0]["ratelimit"] == '"api";r=1;t=2'


def test_an_error_status_is_refused_with_its_body(hub: ScriptedHub) -> None:
    hub.answer = lambda _: Answer(404, b"gone", {"X-Error-Code": "RepoNotFound"})
    with pytest.raises(Refused) as caught:
        get(f"{hub.url}/x", bounds(hub.url))
    assert (caught.value.status, caught.value.body) == (404, b"gone")
    assert caught.value.headers["x-error-code"] == "RepoNotFound"
    assert len(hub.asked) == 1


def test_a_passing_trouble_is_tried_again(hub: ScriptedHub) -> None:
    hub.answer = lambda _: Answer(503) if len(hub.asked) < 3 else Answer(200, b"back")
    assert get(f"{hub.url}/x", bounds(hub.url)) == b"back"


def test_a_connection_that_breaks_in_the_body_is_tried_again(hub: ScriptedHub) -> None:
    hub.answer = lambda _: Answer(200, b"body", cut=len(hub.asked) < 2)
    assert get(f"{hub.url}/x", bounds(hub.url)) == b"body"


def test_a_short_pause_is_waited_out(hub: ScriptedHub) -> None:
    hub.answer = lambda _: Answer(429, headers={"Retry-After": "0"}) if len(hub.asked) < 2 else Answer(200, b"now")
    assert get(f"{hub.url}/x", bounds(hub.url)) == b"now"


def test_a_long_pause_is_not_slept_through(hub: ScriptedHub) -> None:
    hub.answer = lambda _: Answer(429, headers={"RateLimit": '"api";r=0;t=300'})
    began = time.monotonic()
    with pytest.raises(Refused) as caught:
        get(f"{hub.url}/x", bounds(hub.url))
    assert caught.value.status == 429
    assert time.monotonic() - began < 2
    assert len(hub.asked) == 1


def test_silence_ends_at_the_deadline(hub: ScriptedHub) -> None:
    hub.answer = lambda _: Answer(200, delay_s=30)
    with pytest.raises(Broken) as caught:
        get(f"{hub.url}/x", bounds(hub.url, 0.3))
    assert caught.value.kind == "timeout"


def test_a_body_that_drips_ends_at_the_deadline(hub: ScriptedHub) -> None:
    hub.answer = lambda _: Answer(200, b"x" * 1000, drip_s=0.05)
    began = time.monotonic()
    with pytest.raises(Broken) as caught:
        get(f"{hub.url}/x", bounds(hub.url, 0.4))
    assert caught.value.kind == "timeout"
    assert time.monotonic() - began < 2


def test_a_body_without_end_is_cut(hub: ScriptedHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BODY_BYTES_MAX", 1000)
    hub.answer = lambda _: Answer(200, b"x" * 1_000_000)
    with pytest.raises(Broken) as caught:
        get(f"{hub.url}/x", bounds(hub.url))
    assert caught.value.kind == "size"


def test_a_thread_that_nobody_waits_for_stops_between_attempts(hub: ScriptedHub) -> None:
    hub.answer = lambda _: Answer(503, headers={"Retry-After": "4"})
    within = bounds(hub.url)
    threading.Timer(0.2, within.over.set).start()
    began = time.monotonic()
    with pytest.raises(Broken) as caught:
        get(f"{hub.url}/x", within)
    assert caught.value.kind == "abandoned"
    assert time.monotonic() - began < 2


def test_nothing_listening_is_told_from_a_name_without_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "RETRY_WAITS_S", (0.01,))
    nobody = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(Broken) as caught:
        get(nobody, bounds(nobody))
    assert caught.value.kind == "refused"
    nowhere = "http://no-such-host.invalid"
    with pytest.raises(Broken) as caught:
        get(nowhere, bounds(nowhere))
    assert caught.value.kind == "name"


def test_plain_http_behind_an_https_endpoint_is_a_tls_failure(hub: ScriptedHub) -> None:
    https = hub.url.replace("http:", "https:")
    with pytest.raises(Broken) as caught:
        get(https, bounds(https))
    assert caught.value.kind == "tls"


def test_certificates_that_cannot_be_read_are_said(
    hub: ScriptedHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "missing.pem"))
    set_client_factory(dict)  # type: ignore[arg-type]  # as if another library had set its own
    try:
        with pytest.raises(Broken, match="certificates cannot be read") as caught:
            get(f"{hub.url}/x", bounds(hub.url))
        assert caught.value.kind == "tls"
    finally:
        set_client_factory(client.Client)


def test_what_is_not_http_is_a_protocol_failure(monkeypatch: pytest.MonkeyPatch, hub: ScriptedHub) -> None:
    monkeypatch.setattr(client, "RETRY_WAITS_S", ())
    hub.answer = lambda _: Answer(200, headers={"bad\nheader": "x"})
    with pytest.raises(Broken) as caught:
        get(f"{hub.url}/x", bounds(hub.url))
    assert caught.value.kind == "protocol"


def test_redirects_stay_on_the_hub_and_keep_the_token(hub: ScriptedHub) -> None:
    def answer(asked: Asked) -> Answer:
        return Answer(307, headers={"Location": "/new"}) if asked.path == "/old" else Answer(200, b"moved")

    hub.answer = answer
    assert get(f"{hub.url}/old", bounds(hub.url), "hf_secret") == b"moved"
    assert [a.headers["authorization"] for a in hub.asked] == ["Bearer hf_secret"] * 2


def test_redirects_to_another_origin_are_not_followed(hub: ScriptedHub) -> None:
    with scripted_hub() as other:
        hub.answer = lambda _: Answer(302, headers={"Location": f"{other.url}/x"})
        with pytest.raises(Broken) as caught:
            get(f"{hub.url}/x", bounds(hub.url), "hf_secret")
        assert (caught.value.kind, caught.value.detail) == ("redirect", other.url)
        assert not other.asked


def test_redirects_in_circles_end(hub: ScriptedHub) -> None:
    hub.answer = lambda _: Answer(302, headers={"Location": "/x"})
    with pytest.raises(Broken) as caught:
        get(f"{hub.url}/x", bounds(hub.url))
    assert (caught.value.kind, caught.value.detail) == ("redirect", "")


def test_cookies_do_not_travel_from_one_user_to_the_next(hub: ScriptedHub) -> None:
    hub.answer = lambda _: Answer(200, headers={"Set-Cookie": "session=of-the-first; Path=/"})
    get(f"{hub.url}/x", bounds(hub.url), "hf_first")
    get(f"{hub.url}/x", bounds(hub.url), "hf_second")
    assert "cookie" not in hub.asked[1].headers


def test_the_proxies_of_the_environment_are_used(hub: ScriptedHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.answer = lambda _: Answer(200, b"through the proxy")
    monkeypatch.setenv("HTTP_PROXY", hub.url)
    close_session()
    try:
        assert get("http://hub.example/x", bounds("http://hub.example")) == b"through the proxy"
    finally:
        close_session()
    assert hub.asked[0].path == "http://hub.example/x"


def test_a_client_that_another_library_set_is_replaced(hub: ScriptedHub) -> None:
    hub.answer = lambda _: Answer(200, delay_s=30)
    from huggingface_hub.utils._http import default_client_factory

    set_client_factory(default_client_factory)
    with pytest.raises(Broken):
        get(f"{hub.url}/x", bounds(hub.url, 0.2))


def test_outside_of_an_exchange_the_client_is_a_plain_one(hub: ScriptedHub) -> None:
    hub.answer = lambda _: json_answer({}, 404)
    with exchange(bounds(hub.url)):
        plain = get_session()
    assert plain.get(f"{hub.url}/x").status_code == 404


def test_the_deadline_of_a_request_reaches_its_socket(hub: ScriptedHub) -> None:
    """The library passes "no timeout" with each page of a tree; that must not be what counts."""
    hub.answer = lambda _: Answer(200, delay_s=30)
    began = time.monotonic()
    with pytest.raises(Broken):
        get(f"{hub.url}/x", bounds(hub.url, 0.2))
    assert time.monotonic() - began < 2
