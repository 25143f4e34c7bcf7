"""The driver's settings and where each comes from, here and only here: flags beat MANTA_CSI_* variables, which beat the defaults."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn, cast

from manta.config import SOCKET_PATH_MAX, load
from manta.errors import Invalid

DRIVER_NAME = "csi.manta.dev"
KUBELET_DIR = "/var/lib/kubelet"
NODE_ID_BYTES_MAX = 192
"""CSI's bound on a node's id."""

TokenPolicy = Literal["secret", "node"]

# CSI: at most 63 characters, of letters, digits, '-' and '.', the first and the last a letter or digit; kubelet wants DNS names. (facts:
# csi-sanity wants it to end in a letter.)
_DRIVER_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z])?")
_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off", ""}


@dataclass(frozen=True, slots=True)
class Settings:
    driver_name: str
    kubelet_dir: Path
    endpoint: Path
    """The plugin's unix socket."""
    registration_socket: Path | None
    """None: the kubelet is not told."""
    node_id: str
    control_socket: Path
    token_policy: TokenPolicy
    state_dir: Path
    events: bool
    log_level: str
    log_format: str
    test_controller: bool


class Probing(NamedTuple):
    """What `manta-csi probe` is asked."""

    endpoint: Path
    ready: bool
    timeout_s: float


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Invalid(f"{message[:1].upper()}{message[1:]}. `manta-csi --help` lists the options.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="manta-csi", description="The CSI driver of Manta.", allow_abbrev=False)
    parser.add_argument(
        "command", nargs="?", choices=("serve", "probe"), default="serve", help="serve (default), or ask a driver"
    )
    option = parser.add_argument
    option("--driver-name", metavar="NAME", help=f"the CSIDriver object's name (default {DRIVER_NAME})")
    option("--kubelet-dir", metavar="DIR", help=f"the kubelet's directory (default {KUBELET_DIR})")
    option("--endpoint", metavar="unix:PATH", help="the plugin's socket (default KUBELET/plugins/DRIVER/csi.sock)")
    option(
        "--registration-socket",
        metavar="PATH",
        help="default KUBELET/plugins_registry/DRIVER-reg.sock; none: do not register",
    )
    option("--node-id", metavar="ID", help="the node's name (default: the host's)")
    option(
        "--control-socket",
        metavar="PATH",
        help="the Manta daemon's control socket (default: by Manta's own configuration)",
    )
    option(
        "--token-policy",
        metavar="secret|node",
        help="as whom a pod without a secret reads: nobody (secret, the default) or the node",
    )
    option("--state-dir", metavar="DIR", help="where the state file lives (default: the plugin socket's directory)")
    option("--events", action="store_const", const="true", help="post Kubernetes Events about loading on pods")
    option("--log-level", metavar="LEVEL", help="debug, info, warning or error (default info)")
    option("--log-format", metavar="FORMAT", help="text or json (default text)")
    option("--test-controller", action="store_true", help="for csi-sanity only: volumes that exist in memory")
    option("--ready", action="store_true", help="probe: only when the Manta daemon answers too")
    option("--timeout", type=float, default=5.0, metavar="SECONDS", help="probe: how long to wait (default 5)")
    return parser


def read(arguments: Sequence[str], environ: Mapping[str, str] | None = None) -> Settings | Probing:
    """The settings of `manta-csi ARGUMENTS`. Raises Invalid naming the flag or variable, the value, and what is allowed."""
    env = os.environ if environ is None else environ
    flags = _parser().parse_args(arguments)

    def value(name: str, default: str) -> tuple[str, str]:
        """The value, and what to call it in a sentence."""
        variable = f"MANTA_CSI_{name.upper()}"
        if (flag := getattr(flags, name)) is not None:
            return flag, f"--{name.replace('_', '-')}"
        return env.get(variable) or default, variable

    def choice(name: str, choices: tuple[str, ...]) -> str:
        text, called = value(name, choices[0])
        if text not in choices:
            raise Invalid(f"{called} is {text!r}: expected {', '.join(choices[:-1])} or {choices[-1]}.")
        return text

    def path(name: str, default: str, *, socket: bool = False) -> Path:
        text, called = value(name, default)
        text = re.sub(r"^unix:(//(?=/))?", "", text) if socket else text
        if not text.startswith("/") or "\0" in text:
            raise Invalid(f"{called} is {text!r}: expected an absolute path.")
        text = os.path.normpath(text)
        if socket and len(os.fsencode(text)) > SOCKET_PATH_MAX:
            raise Invalid(f"{called} is {text!r}: Linux takes socket paths of at most {SOCKET_PATH_MAX} bytes.")
        return Path(text)

    driver, called = value("driver_name", DRIVER_NAME)
    if not _DRIVER_NAME.fullmatch(driver):
        raise Invalid(f"{called} is {driver!r}: expected at most 63 of a-z, 0-9, '-' and '.', ending in a letter.")
    kubelet = path("kubelet_dir", KUBELET_DIR)
    endpoint = path("endpoint", f"{kubelet}/plugins/{driver}/csi.sock", socket=True)
    if flags.command == "probe":
        if not 0 < flags.timeout <= 60:
            raise Invalid(f"--timeout is {flags.timeout:g}: expected seconds, more than 0 and at most 60.")
        return Probing(endpoint, flags.ready, flags.timeout)
    node, called = value("node_id", os.uname().nodename)
    if not node.isprintable() or len(node.encode()) > NODE_ID_BYTES_MAX:
        raise Invalid(f"{called} is {node[:100]!r}: expected the node's name, of at most {NODE_ID_BYTES_MAX} bytes.")
    events, called = value("events", "")
    if events.lower() not in _TRUE | _FALSE:
        raise Invalid(f"{called} is {events!r}: expected true or false.")
    silent = value("registration_socket", "")[0] == "none"
    registration = (
        None if silent else path("registration_socket", f"{kubelet}/plugins_registry/{driver}-reg.sock", socket=True)
    )
    named, _ = value("control_socket", "")
    control = path("control_socket", named, socket=True) if named else load(environ=env).config.socket_path
    return Settings(
        driver_name=driver,
        kubelet_dir=kubelet,
        endpoint=endpoint,
        registration_socket=registration,
        node_id=node,
        control_socket=control,
        token_policy=cast("TokenPolicy", choice("token_policy", ("secret", "node"))),
        state_dir=path("state_dir", str(endpoint.parent)),
        events=events.lower() in _TRUE,
        log_level=choice("log_level", ("info", "debug", "warning", "error")),
        log_format=choice("log_format", ("text", "json")),
        test_controller=flags.test_controller,
    )
