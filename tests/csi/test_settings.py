"""Flags beat the environment, which beats the defaults."""

from __future__ import annotations

from pathlib import Path

import pytest

from manta.errors import Invalid
from manta_csi.settings import Probing, Settings, read

NOTHING: dict[str, str] = {"MANTA_CONFIG": "/dev/null"}


def served(*arguments: str, **environ: str) -> Settings:
    settings = read(arguments, {**NOTHING, **environ})
    assert isinstance(settings, Settings)
    return settings


def test_defaults() -> None:
    settings = served("--node-id", "n")
    assert settings.driver_name == "csi.manta.dev"
    assert settings.endpoint == Path("/var/lib/kubelet/plugins/csi.manta.dev/csi.sock")
    assert settings.registration_socket == Path("/var/lib/kubelet/plugins_registry/csi.manta.dev-reg.sock")
    assert settings.state_dir == settings.endpoint.parent
    assert (settings.token_policy, settings.events, settings.test_controller) == ("secret", False, False)
    assert settings.control_socket.name == "control.sock"


def test_flags_beat_the_environment() -> None:
    settings = served(
        "--endpoint=unix:///x/csi.sock",
        "--registration-socket=none",
        "--token-policy=node",
        MANTA_CSI_ENDPOINT="unix:/y/csi.sock",
        MANTA_CSI_STATE_DIR="/state",
        MANTA_CSI_EVENTS="true",
        MANTA_CSI_CONTROL_SOCKET="/run/c.sock",
        MANTA_CSI_NODE_ID="node-1",
    )
    assert settings.endpoint == Path("/x/csi.sock")
    assert settings.registration_socket is None
    assert settings.state_dir == Path("/state")
    assert settings.control_socket == Path("/run/c.sock")
    assert (settings.events, settings.node_id, settings.token_policy) == (True, "node-1", "node")


def test_the_control_socket_is_where_manta_s_configuration_has_it() -> None:
    settings = served(MANTA_DAEMON_RUNTIME_DIR="/run/there", MANTA_CACHE_DIR="/var/lib/manta")
    assert settings.control_socket.parent.parent == Path("/run/there")


def test_a_probe() -> None:
    assert read(["probe", "--ready", "--timeout", "2"], NOTHING) == Probing(
        Path("/var/lib/kubelet/plugins/csi.manta.dev/csi.sock"), True, 2.0
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--driver-name", "Manta"], "--driver-name is 'Manta'"),
        (["--driver-name", "manta.1"], "ending in a letter"),
        (["--driver-name", "m" * 64], "at most 63"),
        (["--endpoint", "tcp://0.0.0.0:1"], "--endpoint is 'tcp://0.0.0.0:1': expected an absolute path"),
        (["--endpoint", "/" + "x" * 120], "at most 107 bytes"),
        (["--token-policy", "pod"], "expected secret or node"),
        (["--log-level", "trace"], "--log-level is 'trace'"),
        (["--node-id", "x" * 200], "at most 192 bytes"),
        (["--nonsense"], "--help"),
        (["probe", "--timeout", "0"], "expected seconds"),
    ],
)
def test_what_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(Invalid, match=message):
        read(arguments, NOTHING)
