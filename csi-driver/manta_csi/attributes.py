"""What a volume's attributes and a pod's secret may say, here and only here. Pure: no request, no I/O.

Attributes come from `volumeAttributes` of an inline volume or of a PersistentVolume. What is not in the table below is refused with the
table, so that a misspelt attribute does not pass for a default, and so that nothing but a model can be asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import cast

from manta.config import did_you_mean
from manta.control.protocol import PREFETCHES, VIEWS, Pod, Prefetch, View
from manta.errors import Invalid
from manta.model.ids import Target, parse_revision, parse_target

MEANINGS: dict[str, str] = {
    "model": "ORG/NAME",
    "revision": "a branch, a tag or a commit",
    "subfolder": "a folder of the repo",
    "view": "tree or hub-cache",
    "prefetch": "none, background or blocking-open",
    "pin": "true or false",
}
"""The attributes, and what each takes."""

KUBERNETES = "csi.storage.k8s.io/"
"""The prefix of what the kubelet adds to a volume's attributes."""

SERVICE_ACCOUNT_TOKENS = f"{KUBERNETES}serviceAccount.tokens"
"""Where the kubelet puts service account tokens, among the attributes or the secrets. Never read, never shown."""

VALUE_CHARACTERS_MAX = 1024
TOKEN_CHARACTERS_MAX = 4096
"""Hugging Face's are 37 characters; gateways hand out JWTs."""

NAMES_SHOWN = 4
NAME_CHARACTERS_SHOWN = 40

TOKEN_KEYS = ("token", "HF_TOKEN")
"""The keys of a secret that may hold the hub's token, the first one first."""


@dataclass(frozen=True, slots=True)
class Attributes:
    """What a volume shows, and how."""

    target: str
    """As `manta.model.ids.parse_target` reads it; empty for the whole hub, in the hub-cache view only."""
    view: View = "tree"
    prefetch: Prefetch = "none"
    pin: bool = False


def given(context: Mapping[str, str]) -> dict[str, str]:
    """The attributes that people wrote, without those of the kubelet. Raises Invalid where one of them is unknown or too long.

    An empty value is one that was not given: templates leave them so.
    """
    own = {name: value for name, value in context.items() if not name.startswith(KUBERNETES) and value != ""}
    unknown = sorted(name for name in own if name not in MEANINGS)
    if unknown:
        hint = did_you_mean(unknown[0], MEANINGS)
        if any("token" in name.lower() for name in unknown):
            hint = "; a token belongs into a Secret that nodePublishSecretRef names"
        raise Invalid(
            f"The volume has attributes that Manta does not know: {_names(unknown)}{hint}. Known are {_table()}."
        )
    for name, value in own.items():
        if len(value) > VALUE_CHARACTERS_MAX or not value.isprintable():
            raise Invalid(f"The attribute {name} is not a name: {MEANINGS[name]} is expected, in printable characters.")
    return own


def parse(attributes: Mapping[str, str]) -> Attributes:
    """Reads what `given` returned. Raises Invalid naming the attribute, its value and what is allowed."""
    view = cast("View", _choice(attributes, "view", VIEWS))
    return Attributes(
        _target(attributes, view),
        view,
        cast("Prefetch", _choice(attributes, "prefetch", PREFETCHES)),
        _choice(attributes, "pin", ("false", "true")) == "true",
    )


def _target(attributes: Mapping[str, str], view: View) -> str:
    model = attributes.get("model")
    revision = attributes.get("revision")
    folder = attributes.get("subfolder", "").strip("/")
    if model is None:
        if view == "tree":
            raise Invalid(f"The volume names no model: give the attribute model ({MEANINGS['model']}).")
        if revision is not None or folder:
            raise Invalid("The volume names a revision or a subfolder and no model: give the attribute model too.")
        return ""
    repo = _said("model", model, lambda: parse_target(model))
    if repo.revision is not None or repo.subfolder:
        raise Invalid(
            f"The attribute model is {model!r}: only {MEANINGS['model']} is expected there."
            " The attributes revision and subfolder take the rest."
        )
    if revision is not None:
        parse_revision(revision)
    target = Target(repo.repo, revision, folder)
    written = str(target)
    # The daemon reads this text. What it would read otherwise (a folder called "..", a revision with odd characters) is refused here.
    if _said("subfolder", folder, lambda: parse_target(written)) != target:
        raise Invalid(f"No revision {revision!r} with a folder {folder!r} can exist in {repo.repo}.")
    return written


def _said(name: str, value: str, read: Callable[[], Target]) -> Target:
    try:
        return read()
    except Invalid as error:
        raise Invalid(f"The attribute {name} is {value[:100]!r}: {error.message}") from error


def _choice(attributes: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str:
    value = attributes.get(name, choices[0])
    if value not in choices:
        raise Invalid(f"The attribute {name} is {value[:100]!r}: expected {MEANINGS[name]}.")
    return value


def _names(names: Iterable[str]) -> str:
    """Names as people can have written them by mistake, never values: one of them may be a token."""
    names = list(names)
    shown = ", ".join(ascii(name[:NAME_CHARACTERS_SHOWN]) for name in names[:NAMES_SHOWN])
    return f"{shown} and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else shown


def _table() -> str:
    return "; ".join(f"{name} ({meaning})" for name, meaning in MEANINGS.items())


def pod(context: Mapping[str, str], volume: str) -> Pod | None:
    """The pod that the kubelet names, where the CSIDriver object has podInfoOnMount."""
    uid = context.get(f"{KUBERNETES}pod.uid", "")
    if not uid:
        return None
    name, namespace = context.get(f"{KUBERNETES}pod.name", ""), context.get(f"{KUBERNETES}pod.namespace", "")
    return Pod(uid[:253], name[:253], namespace[:253], volume)


def token(secrets: Mapping[str, str]) -> str:
    """The hub's token of a pod's secret; empty where there is no secret. Raises Invalid without showing any of it."""
    own = {name: value for name, value in secrets.items() if not name.startswith(KUBERNETES)}
    if not own:
        return ""
    expected = f"the key {TOKEN_KEYS[0]} (or {TOKEN_KEYS[1]}) with the hub's token"
    for key in TOKEN_KEYS:
        value = own.get(key, "").strip()
        if value:
            if len(value) > TOKEN_CHARACTERS_MAX or not all("!" <= character <= "~" for character in value):
                raise Invalid(
                    f"The key {key} of the secret in nodePublishSecretRef does not hold a token: it has characters that no token has,"
                    " or too many. Write the token alone into it, in plain text (stringData)."
                )
            return value
    raise Invalid(f"The secret in nodePublishSecretRef holds no token: it needs {expected}.")
