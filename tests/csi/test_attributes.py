"""What a volume's attributes and a secret may say."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.control.protocol import Pod
from manta.errors import Invalid
from manta.model.ids import parse_target
from manta_csi.attributes import MEANINGS, SERVICE_ACCOUNT_TOKENS, Attributes, parse, pod, token
from manta_csi.attributes import given as written

TOKEN = "hf_" + "x" * 34


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"model": "org/name"}, Attributes("org/name")),
        ({"model": "org/name", "revision": "v1.0"}, Attributes("org/name@v1.0")),
        ({"model": "org/name", "revision": "feature/x"}, Attributes("org/name@feature%2Fx")),
        (
            {"model": "org/name", "revision": "refs/pr/3", "subfolder": "/gguf/q4/"},
            Attributes("org/name@refs/pr/3/gguf/q4"),
        ),
        ({"model": "datasets/org/name"}, Attributes("datasets/org/name")),
        (
            {"model": "org/name", "view": "hub-cache", "prefetch": "background", "pin": "true"},
            Attributes("org/name", "hub-cache", "background", pin=True),
        ),
        ({"view": "hub-cache"}, Attributes("", "hub-cache")),
        ({"model": "org/name", "revision": "", "subfolder": "", "pin": ""}, Attributes("org/name")),
    ],
)
def test_what_is_asked_for(attributes: dict[str, str], expected: Attributes) -> None:
    assert parse(written(attributes)) == expected


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({}, "names no model: give the attribute model"),
        ({"model": "name"}, "The attribute model is 'name'"),
        ({"model": "org/name@main"}, "only ORG/NAME is expected there"),
        ({"model": "org/name/folder"}, "only ORG/NAME is expected there"),
        ({"model": "../etc"}, "is not a repo"),
        ({"model": "org/name", "subfolder": "a/../.."}, "cannot exist in a repo"),
        ({"model": "org/name", "revision": "../x"}, "is not a revision"),
        ({"model": "org/name", "revision": "-x"}, "is not a revision"),
        ({"model": "org/name", "revision": "%2e%2e"}, "is not a revision"),
        ({"model": "org/name", "revision": "a b"}, "is not a revision"),
        ({"model": "org/name\n"}, "The attribute model is not a name"),
        ({"model": "o" * 2000}, "The attribute model is not a name"),
        ({"model": "org/name", "view": "flat"}, "The attribute view is 'flat': expected tree or hub-cache"),
        ({"model": "org/name", "prefetch": "all"}, "expected none, background or blocking-open"),
        ({"model": "org/name", "pin": "True"}, "expected true or false"),
        ({"view": "hub-cache", "revision": "main"}, "and no model"),
        ({"modell": "org/name"}, "'modell' .did you mean 'model'.*; pin .true or false."),
        ({"model": "org/name", "cacheDir": "/etc"}, "does not know: 'cacheDir'"),
    ],
)
def test_what_is_refused(attributes: dict[str, str], message: str) -> None:
    with pytest.raises(Invalid, match=message):
        parse(written(attributes))


def test_what_the_kubelet_adds_is_no_attribute() -> None:
    context = {
        "model": "org/name",
        "csi.storage.k8s.io/ephemeral": "true",
        "csi.storage.k8s.io/pod.name": "server-0",
        "csi.storage.k8s.io/pod.namespace": "default",
        "csi.storage.k8s.io/pod.uid": "u-1",
        SERVICE_ACCOUNT_TOKENS: TOKEN,
    }
    assert written(context) == {"model": "org/name"}
    assert pod(context, "csi-1") == Pod("u-1", "server-0", "default", "csi-1")
    assert pod({"model": "org/name"}, "csi-1") is None


def test_an_unknown_attribute_s_value_is_never_shown() -> None:
    with pytest.raises(Invalid) as refused:
        written({"model": "org/name", "token": TOKEN})
    assert TOKEN not in refused.value.message
    assert "nodePublishSecretRef" in refused.value.message


@pytest.mark.parametrize(
    ("secrets", "expected"),
    [
        ({}, ""),
        ({"token": TOKEN}, TOKEN),
        ({"HF_TOKEN": f"{TOKEN}\n"}, TOKEN),
        ({"token": "a", "HF_TOKEN": "b"}, "a"),
        ({SERVICE_ACCOUNT_TOKENS: "{}"}, ""),
        ({SERVICE_ACCOUNT_TOKENS: "{}", "token": TOKEN}, TOKEN),
    ],
)
def test_the_token_of_a_secret(secrets: dict[str, str], expected: str) -> None:
    assert token(secrets) == expected


@pytest.mark.parametrize(
    "secrets",
    [{"password": TOKEN}, {"token": ""}, {"token": f"{TOKEN} x"}, {"token": "x\r\ny: z"}, {"token": "x" * 5000}],
)
def test_a_secret_without_a_token_is_refused_unseen(secrets: dict[str, str]) -> None:
    with pytest.raises(Invalid, match="nodePublishSecretRef") as refused:
        token(secrets)
    assert not any(value in refused.value.message for value in secrets.values() if value)


@given(st.dictionaries(st.sampled_from([*MEANINGS, "other", "csi.storage.k8s.io/x"]) | st.text(), st.text()))
@settings(max_examples=200, deadline=None)
def test_whatever_is_written_is_a_target_or_a_refusal(context: dict[str, str]) -> None:
    try:
        found = parse(written(context))
    except Invalid:
        return
    assert found.target == "" or str(parse_target(found.target)) == found.target
