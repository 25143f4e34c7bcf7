"""What is made of the chart is current: deploy/manifests, the table in docs/kubernetes.md. The dashboard asks for metrics that exist."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from manta import __version__
from manta.telemetry.metrics import Metrics, State
from tests.deploy import helm

MADE = "`python -m tests.deploy.helm` makes it anew"


@pytest.mark.usefixtures("program")
def test_the_plain_manifests_are_what_the_chart_gives() -> None:
    assert helm.MANIFEST.read_text() == helm.plain(), MADE


@pytest.mark.usefixtures("program")
def test_the_table_of_values_is_what_the_chart_has() -> None:
    assert helm.PAGE.read_text() == helm.page(), MADE


def test_the_namespace_lets_privileged_pods_in() -> None:
    namespace = yaml.safe_load((helm.MANIFEST.parent / "namespace.yaml").read_text())
    assert namespace["metadata"]["name"] == helm.NAMESPACE
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "privileged"


def test_the_kustomization_replaces_the_image_that_the_manifests_name() -> None:
    kustomization = yaml.safe_load((helm.MANIFEST.parent / "kustomization.yaml").read_text())
    (image,) = kustomization["images"]
    used = {line.split('"')[1] for line in helm.MANIFEST.read_text().splitlines() if " image: " in line}
    assert used == {f"{image['name']}:{image['newTag']}"}
    assert image["newTag"] == __version__
    for name in kustomization["resources"]:
        assert (helm.MANIFEST.parent / name).exists()


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((helm.CHART / "files/dashboard.json").read_text())
    return found


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    state = State(
        cache_bytes=0,
        cache_limit=0,
        disk_free=0,
        connections_allowed=0,
        connections_in_use=0,
        open_files=0,
        known_inodes=0,
        mounts=0,
        transfers=0,
        reads_waiting=0,
        hub_throttles=0,
        quotas=(),
        workers=(),
    )
    text = Metrics().rendered(state).decode()
    known = {re.sub("_total$", "", family.name) for family in text_string_to_metric_families(text)}
    asked = {
        re.sub("_(total|bucket)$", "", name)
        for panel in dashboard()["panels"]
        for target in panel.get("targets", [])
        for name in re.findall(r"\b(?:manta|process)_\w+", re.sub(r'"[^"]*"', "", target["expr"]))
    }
    assert len(asked) > 20
    assert asked - known == set()


def test_the_dashboard_can_be_imported_anywhere() -> None:
    found = dashboard()
    assert {each["name"] for each in found["templating"]["list"]} >= {"datasource", "node"}
    panels = [panel for panel in found["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in found["panels"]}) == len(found["panels"])
    for panel in panels:
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["description"].endswith(".")
        assert panel["title"]
