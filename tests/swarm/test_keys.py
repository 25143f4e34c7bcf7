"""Where the shared key comes from, what is refused, and that nothing shows it."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest

from manta.config import SWARM_KEY_VARIABLE, SwarmConfig
from manta.errors import Denied, Invalid, MantaError
from manta.swarm.auth import Sender
from manta.swarm.keys import KEYS_BYTES_MAX, check, is_loopback, read_keys

KEY, OTHER = "0123456789abcdef-one", "0123456789abcdef-two"


def test_the_file_counts_before_the_variable(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n{OTHER}\n")
    environ = {SWARM_KEY_VARIABLE: "another-key-of-the-environment"}
    assert read_keys(str(file), environ) == (KEY.encode(), OTHER.encode())
    assert read_keys("", environ) == (b"another-key-of-the-environment",)
    assert read_keys("", {SWARM_KEY_VARIABLE: f" {KEY} , {OTHER}"}) == (KEY.encode(), OTHER.encode())
    assert read_keys("", {}) == read_keys("", {SWARM_KEY_VARIABLE: " \n"}) == ()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "one line, or two"),
        (b"secret", "at least 16 characters"),
        (b"\n".join([b"secret-secret-secret"] * 3), "one line, or two"),
        (b"secret-\xff\xfe-secret-secret", "it is no text"),
        # Cut off it would be another key than the other nodes have.
        (b"secret" * KEYS_BYTES_MAX, "not be longer than"),
    ],
)
def test_what_is_no_key_is_refused_and_not_shown(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    with pytest.raises(MantaError, match=says) as refused:
        read_keys(str(file), {})
    assert str(file) in refused.value.message
    assert "secret" not in "".join(traceback.format_exception(refused.value)).replace("secret_", "")
    assert refused.value.__cause__ is None
    text = content.decode("utf-8", "surrogateescape")
    if text:
        with pytest.raises(Invalid, match=SWARM_KEY_VARIABLE) as refused_too:
            read_keys("", {SWARM_KEY_VARIABLE: text})
        assert "secret" not in refused_too.value.message


def test_a_file_that_cannot_be_read_does_not_fall_back_to_the_variable(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(Denied, match=r"cannot be read \(.*\): check swarm.key_file"):
            read_keys(str(path), {SWARM_KEY_VARIABLE: KEY})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "localhost.example", "127.1", "", "fe80::1%eth0"])
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            SwarmConfig(peers="static:127.0.0.1:1", listen="0.0.0.0:9402"),
            "would serve others at 0.0.0.0:9402 without a key",
        ),
        (SwarmConfig(peers="static:127.0.0.1:1,10.0.0.1:9402"), "would take files from .* without a key"),
        (SwarmConfig(peers="dns:localhost:9402"), "would take files from"),
        (SwarmConfig(peers="kubernetes:ml/manta"), "would take files from"),
    ],
)
def test_without_a_key_only_this_machine_is_served_and_believed(config: SwarmConfig, says: str) -> None:
    with pytest.raises(Invalid, match=says):
        check(config, ())
    check(config, (KEY.encode(),))


def test_nodes_of_one_machine_need_no_key() -> None:
    check(SwarmConfig(peers="static:127.0.0.1:1,[::1]:2,localhost:3"), ())


def test_certificate_and_authorities_go_together() -> None:
    for config in (SwarmConfig(tls_certificate="/c"), SwarmConfig(tls_authorities="/a")):
        with pytest.raises(Invalid, match="go together"):
            check(config, (KEY.encode(),))
    check(SwarmConfig(peers="dns:x:1", tls_certificate="/c", tls_authorities="/a"), (KEY.encode(),))


def test_a_sender_does_not_show_its_key() -> None:
    assert KEY not in repr(Sender("a" * 16, "", "0" * 32, KEY.encode()))
