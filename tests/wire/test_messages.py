"""Messages: what goes in comes out, and what is no message is a ValueError and nothing else."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.wire.messages import (
    MESSAGE_BYTES_MAX,
    Cancel,
    Digest,
    Digested,
    Failed,
    Fetch,
    Fetched,
    Locate,
    Located,
    Message,
    Progress,
    Ready,
    decode_from_worker,
    decode_to_worker,
    encode,
)

TO_WORKER: list[Message] = [
    Locate(1, "https://hub/x?y=%2F", {"authorization": "Bearer t"}, 2.5),
    Fetch(2, "https://cdn/é", {}, 0, 10, [(5, 10), (0, 5)], 10, 10.0),
    Fetch(3, "https://cdn/", {"a": "b"}, 1 << 40, (1 << 40) + 1, [], 1 << 41, 0.5),
    Digest(4, "sha256-" + "0" * 64, 0, 1 << 40, 1 << 41),
    Cancel(1),
]
FROM_WORKER: list[Message] = [
    Ready(0, 4711),
    Located(1, 302, "https://hub/x", {"location": "https://cdn/?signed"}),
    Progress(2, 5, 10),
    Fetched(2, b"0123456789abcdef", 0.25),
    Digested(4, 1 << 40, "ab" * 32),
    Failed(3, "throttled", "hub answered 429 Too Many Requests", 429, 7.5),
    Failed(3, "cancelled", "was cancelled"),
]


@pytest.mark.parametrize("message", TO_WORKER, ids=lambda m: type(m).__name__)
def test_what_goes_to_a_worker_comes_out_as_it_was(message: Message) -> None:
    assert decode_to_worker(encode(message)) == message


@pytest.mark.parametrize("message", FROM_WORKER, ids=lambda m: type(m).__name__)
def test_what_comes_from_a_worker_comes_out_as_it_was(message: Message) -> None:
    assert decode_from_worker(encode(message)) == message


@pytest.mark.parametrize("message", FROM_WORKER, ids=lambda m: type(m).__name__)
def test_no_answer_is_an_order(message: Message) -> None:
    with pytest.raises(ValueError):
        decode_to_worker(encode(message))


@pytest.mark.parametrize("message", TO_WORKER, ids=lambda m: type(m).__name__)
def test_no_order_is_an_answer(message: Message) -> None:
    with pytest.raises(ValueError):
        decode_from_worker(encode(message))


@given(
    st.integers(0, 1 << 62),
    st.text(max_size=200),
    st.dictionaries(st.text(max_size=20), st.text(max_size=40), max_size=5),
    st.lists(st.tuples(st.integers(0, 1 << 62), st.integers(0, 1 << 62)), max_size=5),
)
def test_any_fetch_comes_out_as_it_was(
    number: int, url: str, headers: dict[str, str], extents: list[tuple[int, int]]
) -> None:
    order = Fetch(number, url, headers, 0, number, extents, number, 1.5)
    assert decode_to_worker(encode(order)) == order


def decodes_or_refuses(data: bytes) -> None:
    for decode in (decode_to_worker, decode_from_worker):
        with contextlib.suppress(ValueError):
            decode(data)


@given(st.binary(max_size=300))
def test_noise_is_a_value_error(noise: bytes) -> None:
    decodes_or_refuses(noise)


@given(st.sampled_from(TO_WORKER + FROM_WORKER), st.data())
def test_a_damaged_message_is_a_message_or_a_value_error(message: Message, data: st.DataObject) -> None:
    damaged = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    decodes_or_refuses(cut)


_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), 1 << 63) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=50)
@given(st.sampled_from(["locate", "fetch", "digest", "cancel", "ready", "progress", "failed", "?"]), st.lists(_values))
def test_a_message_with_wrong_fields_is_a_value_error(tag: str, fields: list[object]) -> None:
    data = msgspec.msgpack.encode([tag, *fields])
    decodes_or_refuses(data)


def test_a_message_that_is_too_large_is_refused_before_it_is_sent() -> None:
    with pytest.raises(ValueError, match="Locate") as refused:
        encode(Locate(1, "https://hub/secret" + "x" * MESSAGE_BYTES_MAX, {}, 1.0))
    assert "secret" not in str(refused.value)
