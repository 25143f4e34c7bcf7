"""Messages to and from the peer process: what goes in comes out, and what is no message is a ValueError and nothing else."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manta.wire.messages import Message, Ready, encode
from manta.wire.peering import (
    BODY_BYTES_MAX,
    Asked,
    Call,
    Called,
    Cancelled,
    Follow,
    Gone,
    Listening,
    Member,
    Members,
    OwnPauses,
    Pauses,
    Presence,
    Reply,
    Settings,
    Trouble,
    Uploaded,
    decode_from_peer_process,
    decode_to_peer_process,
)

A = "a" * 16
TO: list[Message] = [
    Settings(0, A, "/cache", "::", 9402, "dns:nodes:9402", [b"key-key-key-key-key"], slots=3, share="public"),
    Follow(0, [("sha256-" + "0" * 64, 1 << 44)]),
    OwnPauses(0, {"https://hub:443": 2.5}),
    Call(1, A, "tree", b"\x00\xff", 1.5),
    Reply(2, 200, b"body"),
    Cancelled(1),
]
FROM: list[Message] = [
    Ready(0, 4711),
    Listening(0, "[::1]:9402"),
    Trouble(0, "listen", "In use."),
    Members(0, [Member(A, "h:1", "suspect", 1.5, 0.25, "0.1", "It is slow.")], 256, 257),
    Presence(0, A, "git-" + "0" * 40, b"\x05"),
    Pauses(0, A, {"https://hub:443": 2.5}),
    Asked(2, A, "pull", b"\x90"),
    Gone(2),
    Uploaded(0, [(A, 1 << 40, 3)], 2, 1, 0),
    Called(1, 404, b"", "It is gone."),
]


@pytest.mark.parametrize("message", TO, ids=lambda m: type(m).__name__)
def test_what_goes_to_the_peer_process_comes_out_as_it_was(message: Message) -> None:
    assert decode_to_peer_process(encode(message)) == message
    with pytest.raises(ValueError):
        decode_from_peer_process(encode(message))


@pytest.mark.parametrize("message", FROM, ids=lambda m: type(m).__name__)
def test_what_the_peer_process_tells_comes_out_as_it_was(message: Message) -> None:
    assert decode_from_peer_process(encode(message)) == message
    with pytest.raises(ValueError):
        decode_to_peer_process(encode(message))


@pytest.mark.parametrize(
    "message", [Call(1, A, "tree", bytes(BODY_BYTES_MAX), 1.5), Reply(2, 200, bytes(BODY_BYTES_MAX))]
)
def test_the_largest_body_fits(message: Message) -> None:
    assert decode_to_peer_process(encode(message)) == message


def test_the_largest_settings_pages_and_lists_fit() -> None:
    encode(
        Settings(
            0,
            A,
            "/" * 4096,
            "h" * 255,
            65535,
            "x" * 32 * 1024,
            [b"k" * 2048, b"k" * 2048],
            "/" * 4096,
            "/" * 4096,
            "/" * 4096,
        )
    )
    encode(Members(0, [Member(A, "a" * 60, "refused", 1e9, 1.0, "0.1.0", "p" * 120)] * 256, 0, 256))
    encode(Follow(0, [("sha256-" + "0" * 64, 1 << 44)] * 256))


def test_settings_show_no_key() -> None:
    assert "key-key" not in repr(TO[0])


def decodes_or_refuses(data: bytes) -> None:
    for decode in (decode_to_peer_process, decode_from_peer_process):
        with contextlib.suppress(ValueError):
            decode(data)


@given(st.binary(max_size=300))
def test_noise_is_a_value_error(noise: bytes) -> None:
    decodes_or_refuses(noise)


@given(st.sampled_from(TO + FROM), st.data())
def test_a_damaged_message_is_a_message_or_a_value_error(message: Message, data: st.DataObject) -> None:
    damaged = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    decodes_or_refuses(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]))


def test_a_state_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError):
        decode_from_peer_process(msgspec.msgpack.encode(["members", 0, [[A, "h:1", "asleep", 1.0]], 0, 1]))
