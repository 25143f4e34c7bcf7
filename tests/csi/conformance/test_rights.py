"""Who may not read what: the negative cases, against a hub that knows its users. A pod that is refused leaves nothing behind."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest

from manta.testing import scratch
from manta.testing.hub import HubProcess
from manta.testing.hub.changes import RevokeAccess, RevokeToken, SetPrivate
from manta.testing.kubelet import NON_FINAL
from tests.csi.conformance.conftest import (
    GATED,
    MODEL,
    PRIVATE,
    READER,
    SECRETS,
    STRANGER,
    WRONG,
    Checked,
    outcome,
    temporary_token,
)

DENIED = {"PERMISSION_DENIED", "NOT_FOUND"}
"""The hub answers 404 for a private repo to whoever may not see it."""


@pytest.mark.parametrize("model", [GATED, PRIVATE])
@pytest.mark.parametrize("token", ["", STRANGER, WRONG], ids=["no secret", "stranger", "no such token"])
def test_a_pod_without_rights_is_refused_and_told_what_to_do(node: Checked, model: str, token: str) -> None:
    volume = node.volume(model, token)
    refused = node.refusal(volume)
    assert refused.code in DENIED
    assert refused.final, "trying again changes nothing"
    assert model in refused.details
    assert "token" in refused.details or "access" in refused.details or "secret" in refused.details.lower()
    assert node.gone(volume)
    assert node.publications() == 0


@pytest.mark.parametrize("model", [GATED, PRIVATE])
def test_what_one_pod_has_in_the_cache_is_not_there_for_another(node: Checked, model: str) -> None:
    first = node.volume(model, READER)
    with node.kubelet.volume(first):
        assert node.read(first) == '{"model_type": "bert"}'
        for token in ("", STRANGER, WRONG):
            other = node.volume(model, token, pod="serve-1")
            assert node.refusal(other).code in DENIED
        pod = node.pod(first)
        assert pod.run("ls", str(node.models)).split() == ["config.json", "weights.bin"]
        assert node.read(first) == '{"model_type": "bert"}', "and the first one reads on"
    # Nor when its reader is gone, and all of it is in the cache.
    for token in ("", STRANGER, WRONG):
        assert node.refusal(node.volume(model, token, pod="serve-2")).code in DENIED


def test_a_volume_shows_its_model_and_not_what_is_beside_it(node: Checked) -> None:
    mine, other = node.volume(MODEL), node.volume(PRIVATE, READER, pod="serve-1")
    with node.kubelet.volume(mine), node.kubelet.volume(other):
        pod = node.pod(mine)
        seen = pod.run(
            "sh", "-c", f"ls {node.models}; ls {node.models}/..; ls -d {node.folder}/*/*/* 2>/dev/null || true"
        )
        assert "private" not in seen
        mounted = {point for point in pod.mounts() if point.is_relative_to(node.folder)}
        assert mounted - {node.folder} == {node.models}


def test_the_nodes_own_token_is_for_no_pod(node: Checked) -> None:
    """The node's token may read all of it (NODE_TOKEN of the fixture), and a pod without a secret may not."""
    assert node.refusal(node.volume(PRIVATE)).code in DENIED


def test_a_public_model_needs_no_secret_and_a_wrong_one_is_said(node: Checked) -> None:
    volume = node.volume(MODEL)
    with node.kubelet.volume(volume):
        assert node.published(volume)
    refused = node.refusal(node.volume(MODEL, WRONG))
    assert refused.code == "PERMISSION_DENIED"
    assert "token" in refused.details


@pytest.mark.parametrize("key", ["token", "HF_TOKEN"])
def test_the_secret_of_a_pod_is_what_it_reads_by(node: Checked, key: str) -> None:
    volume = node.volume(GATED)
    fields = {"secrets": {key: f" {READER}\n"}}
    with node.kubelet.volume(volume, **fields):
        assert node.read(volume) == '{"model_type": "bert"}'


def test_a_republish_for_a_pod_that_lost_its_right_is_not_final_and_takes_nothing_away(
    node: Checked, hub: HubProcess
) -> None:
    token = temporary_token(0)
    volume = node.volume(PRIVATE, token)
    with node.kubelet.volume(volume):
        assert node.read(volume, "config.json")
        hub.apply(RevokeToken(token=token))
        for _ in range(3):
            assert outcome(lambda: node.kubelet.republish(volume)) in {"OK", *NON_FINAL}
        assert node.published(volume)
        assert node.read(volume, "config.json"), "what it has read it reads"


def test_a_republish_takes_the_new_token_over(node: Checked, hub: HubProcess) -> None:
    volume = node.volume(GATED, temporary_token(1))
    with node.kubelet.volume(volume):
        hub.apply(RevokeToken(token=temporary_token(1)))
        node.kubelet.republish(volume, secrets={"token": temporary_token(2)})
        assert len(node.read(volume, "config.json")) > 0
        weights = node.host.run("sha256sum", str(node.kubelet.target(volume) / "weights.bin"))
        assert weights.split()[0] == hub.files(GATED).files["weights.bin"].sha256


def test_a_right_that_was_taken_away_is_not_found_on_disk(fresh: Checked, hub: HubProcess) -> None:
    """By the next daemon: what the first one remembered of rights was in memory."""
    token = temporary_token(3)
    volume = fresh.volume(GATED, token)
    with fresh.kubelet.volume(volume):
        assert fresh.read(volume)
    hub.apply(RevokeAccess(user="temporary-3", repo=GATED))
    fresh.restart_daemon()
    assert fresh.refusal(fresh.volume(GATED, token, pod="serve-1")).code in DENIED


def test_a_repo_that_turned_private_is_refused_also_from_the_cache(fresh: Checked, hub: HubProcess) -> None:
    public = "org/many-40"
    volume = fresh.volume(public)
    with fresh.kubelet.volume(volume):
        assert fresh.read(volume, "name.txt") == public
    hub.apply(SetPrivate(repo=public, private=True))
    fresh.restart_daemon()  # it remembers for a minute that everybody may read it
    assert fresh.refusal(fresh.volume(public, pod="serve-1")).code in DENIED


def test_where_the_hub_is_away_restricted_models_wait_and_public_ones_go_on(fresh: Checked, hub: HubProcess) -> None:
    for model, token in ((MODEL, ""), (PRIVATE, READER)):
        with fresh.kubelet.volume(fresh.volume(model, token)):
            pass
    fresh.restart_daemon()  # no rights are remembered
    hub.set_listening("hub", accept=False)
    try:
        public = fresh.volume(MODEL, pod="serve-1")
        with fresh.kubelet.volume(public):
            assert fresh.published(public)
        for token in ("", STRANGER, READER):
            volume = fresh.volume(PRIVATE, token, pod="serve-2")
            refused = fresh.refusal(volume)
            assert refused.code == "UNAVAILABLE", refused
            fresh.kubelet.tear_down(volume)
            assert fresh.gone(volume)
    finally:
        hub.set_listening("hub", accept=True)


def test_a_driver_that_is_told_so_reads_by_the_nodes_token(node: Checked) -> None:
    with node.driver_with("--token-policy", "node"):
        volume = node.volume(PRIVATE)
        with node.kubelet.volume(volume):
            assert node.read(volume)
        assert node.refusal(node.volume(PRIVATE, STRANGER)).code in DENIED, "a pod's own secret goes before"


def test_no_token_is_in_any_log_argument_or_file(node: Checked) -> None:
    volume = node.volume(PRIVATE, READER)
    with node.kubelet.volume(volume):
        node.read(volume)
        node.refusal(node.volume(PRIVATE, STRANGER, pod="serve-1"))
        node.refusal(node.volume(PRIVATE, WRONG, pod="serve-1"))
        texts = {name: node.logs(name) for name in ("daemon", "csi")}
        texts["status"] = json.dumps(str(node.client.status()))
        for container in (node.daemon, node.driver):
            for pid in node.processes(container):
                texts[f"argv of {pid}"] = scratch.command_line(pid).decode()
        for folder in (node.kubelet.folder / "plugins", node.runtime, node.cache / "meta"):
            for path in folder.rglob("*"):
                with suppress(FileNotFoundError):  # it was written aside
                    if path.is_file():
                        texts[str(path)] = path.read_bytes().decode(errors="replace")
        shown = [(where, secret) for where, text in texts.items() for secret in SECRETS if secret in text]
        assert shown == []
