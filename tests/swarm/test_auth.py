"""Signatures: what was signed is taken once, in its time, by the node it is for, and nothing else is."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manta.errors import Denied, Invalid
from manta.swarm import auth
from manta.swarm.auth import (
    WINDOW_SECONDS,
    Answer,
    Request,
    Sender,
    Verifier,
    answer_is_genuine,
    key_name,
    new_nonce,
    page_is_signed,
    parse_keys,
    sign,
    sign_answer,
    sign_page,
)

ME, ASKER = "00000000000000aa", "00000000000000bb"
KEY, NEW, WRONG = b"the key of the cluster", b"the key that comes next", b"the key of somebody else"
NOW = 1_700_000_000.0
REQUEST = Request("POST", "/v1/have?x=1", "bytes=0-9", b"body")
TEXT = st.text(st.characters(codec="utf-8"), max_size=60)


def header(request: Request = REQUEST, *keys: bytes, to: str = ME, now: float = NOW, nonce: str = "0" * 32) -> str:
    return sign(request, ASKER, to, keys or (KEY,), now, nonce)


@given(TEXT, TEXT, TEXT, st.binary(max_size=100))
def test_what_was_signed_is_taken(method: str, target: str, range_: str, body: bytes) -> None:
    request = Request(method, target, range_, body)
    sender = Verifier(ME, [KEY]).check(header(request), request, NOW)
    assert sender == Sender(ASKER, ME, "0" * 32, KEY)


@pytest.mark.parametrize(
    "other",
    [
        replace(REQUEST, method="GET"),
        replace(REQUEST, target="/v1/have?x=2"),
        replace(REQUEST, range="bytes=0-8"),
        replace(REQUEST, range=""),
        replace(REQUEST, body=b"Body"),
        replace(REQUEST, method="POST\n/v1/have?x=1", target="bytes=0-9"),
    ],
)
def test_another_request_is_not(other: Request) -> None:
    with pytest.raises(Denied, match="signature"):
        Verifier(ME, [KEY]).check(header(), other, NOW)


@given(st.data())
def test_a_header_that_was_changed_is_not(data: st.DataObject) -> None:
    signed = header()
    at = data.draw(st.integers(0, len(signed) - 1))
    put = data.draw(st.characters(codec="utf-8"))
    changed = signed[:at] + put + signed[at + 1 :]
    verifier = Verifier(ME, [KEY])
    if changed == signed:
        verifier.check(changed, REQUEST, NOW)
        return
    with pytest.raises(Denied):
        verifier.check(changed, REQUEST, NOW)


@given(st.text(max_size=400) | st.from_regex(auth._HEADER))
def test_what_is_no_header_is_refused(text: str) -> None:
    for keys in ((), (KEY,)):
        try:
            sender = Verifier(ME, keys).check(text, REQUEST, NOW)
        except Denied:
            continue
        assert not keys
        assert sender.to in {"", ME}


def test_a_request_is_taken_once() -> None:
    verifier = Verifier(ME, [KEY])
    verifier.check(header(), REQUEST, NOW)
    with pytest.raises(Denied, match="seen before"):
        verifier.check(header(), REQUEST, NOW + WINDOW_SECONDS)
    verifier.check(header(nonce="1" * 32), REQUEST, NOW)


@pytest.mark.parametrize("apart", [-WINDOW_SECONDS - 0.1, WINDOW_SECONDS + 0.1, -1e9, 1e9])
def test_a_request_of_another_time_is_not(apart: float) -> None:
    with pytest.raises(Denied, match=r"clock.*NTP"):
        Verifier(ME, [KEY]).check(header(now=NOW + apart), REQUEST, NOW)


@pytest.mark.parametrize("apart", [-WINDOW_SECONDS + 0.1, WINDOW_SECONDS - 0.1])
def test_clocks_may_be_a_little_apart(apart: float) -> None:
    verifier = Verifier(ME, [KEY])
    verifier.check(header(now=NOW + apart), REQUEST, NOW)
    # As long as it would be taken, it is remembered.
    with pytest.raises(Denied, match="seen before"):
        verifier.check(header(now=NOW + apart), REQUEST, NOW + apart + WINDOW_SECONDS - 0.1)


def test_one_for_another_node_is_not() -> None:
    with pytest.raises(Denied, match="another node"):
        Verifier(ME, [KEY]).check(header(to="00000000000000ff"), REQUEST, NOW)
    Verifier(ME, [KEY]).check(header(to=""), REQUEST, NOW)


def test_two_keys_are_taken_while_one_is_replaced() -> None:
    verifier = Verifier(ME, [KEY, NEW])
    for nonce, key in (("1" * 32, KEY), ("2" * 32, NEW)):
        assert verifier.check(header(REQUEST, key, nonce=nonce), REQUEST, NOW).key == key
    verifier.keys = (NEW,)
    with pytest.raises(Denied, match="not this node's"):
        verifier.check(header(REQUEST, KEY, nonce="3" * 32), REQUEST, NOW)
    with pytest.raises(Denied, match="not this node's"):
        verifier.check(header(REQUEST, WRONG, nonce="4" * 32), REQUEST, NOW)
    with pytest.raises(Denied):
        verifier.check(sign(REQUEST, ASKER, ME, (), NOW, "5" * 32), REQUEST, NOW)


def test_a_keys_name_does_not_help_who_has_another_key() -> None:
    forged = header(REQUEST, WRONG).replace(key_name(WRONG), key_name(KEY))
    with pytest.raises(Denied, match="signature"):
        Verifier(ME, [KEY]).check(forged, REQUEST, NOW)


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "NONCES_MAX", 3)
    verifier = Verifier(ME, [KEY])
    for n in range(3):
        verifier.check(header(nonce=f"{n:032x}"), REQUEST, NOW)
    with pytest.raises(Denied, match="Too many"):
        verifier.check(header(nonce="a" * 32), REQUEST, NOW)
    later = NOW + 2 * WINDOW_SECONDS + 1
    verifier.check(header(now=later, nonce="b" * 32), REQUEST, later)
    assert len(verifier._seen) == len(verifier._order) == 1
    # A request that is refused costs no memory.
    with pytest.raises(Denied):
        verifier.check(header(REQUEST, WRONG, nonce="c" * 32), REQUEST, later)
    assert len(verifier._seen) == 1


def test_without_a_key_a_request_only_says_who_asks() -> None:
    sender = Verifier(ME, []).check(sign(REQUEST, ASKER, ME, (), NOW, "0" * 32), REQUEST, 0.0)
    assert sender == Sender(ASKER, ME, "0" * 32, b"")
    assert sign_answer(Answer(200), sender, ME) == ""
    assert answer_is_genuine(Answer(200), "", "0" * 32, ME, b"")


def test_an_answer_is_of_one_node_to_one_request() -> None:
    sender = Sender(ASKER, ME, new_nonce(), KEY)
    answer = Answer(200, "head", b"body")
    mac = sign_answer(answer, sender, ME)
    assert answer_is_genuine(answer, mac, sender.nonce, ME, KEY)
    for other, nonce, node, key in [
        (replace(answer, status=206), sender.nonce, ME, KEY),
        (replace(answer, head="Head"), sender.nonce, ME, KEY),
        (replace(answer, body=b"Body"), sender.nonce, ME, KEY),
        (answer, new_nonce(), ME, KEY),
        (answer, sender.nonce, ASKER, KEY),
        (answer, sender.nonce, ME, WRONG),
    ]:
        assert not answer_is_genuine(other, mac, nonce, node, key)
    for wrong in ("", mac[:-1], mac.upper(), "\u00e9" * 64, "\ud800"):
        assert not answer_is_genuine(answer, wrong, sender.nonce, ME, KEY)


def test_an_answer_is_no_request() -> None:
    """Both are signed with one key: what was signed as one must not pass as the other."""
    sender = Sender(ASKER, ME, "0" * 32, KEY)
    mac = header().rpartition("mac=")[2]
    assert not answer_is_genuine(Answer(200), mac, sender.nonce, ME, KEY)
    assert not page_is_signed(str(int(NOW)), mac, [KEY], NOW)


@given(TEXT, st.integers(0, 600))
def test_a_link_to_the_page_is_good_for_a_while(noise: str, age: int) -> None:
    fields = dict(field.split("=") for field in sign_page([KEY], NOW).split("&"))
    until, mac = fields["until"], fields["mac"]
    assert page_is_signed(until, mac, [NEW, KEY], NOW + age)
    assert not page_is_signed(until, mac, [KEY], NOW + 601)
    assert not page_is_signed(until, mac, [KEY], NOW - WINDOW_SECONDS - 1)
    assert not page_is_signed(until, mac, [], NOW)
    assert not page_is_signed(until, mac, [WRONG], NOW)
    assert not page_is_signed(str(int(until) + 1), mac, [KEY], NOW)
    assert not page_is_signed(noise, mac, [KEY], NOW)
    assert not page_is_signed(until, noise, [KEY], NOW)


def test_without_a_key_there_is_no_link() -> None:
    with pytest.raises(Denied, match="this machine"):
        sign_page([], time.time())


@pytest.mark.parametrize("text", ["", "\n", "short", f"{'a' * 16}\n{'b' * 16}\n{'c' * 16}", f"{'a' * 16},b"])
def test_what_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(Invalid) as refused:
        parse_keys(text)
    assert not text.strip() or text.strip() not in refused.value.message


def test_keys_are_read() -> None:
    assert parse_keys(f" {'a' * 16}\n\n{'b' * 20} \n") == (b"a" * 16, b"b" * 20)
    assert parse_keys(f"{'a' * 16},{'b' * 16}") == (b"a" * 16, b"b" * 16)
