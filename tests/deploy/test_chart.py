"""The Helm chart: linted and rendered by a real helm for three sets of values, its objects valid for Kubernetes, and what they promise."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from kubernetes_validate import validate

from manta import __version__
from manta.config import KEYS, load
from tests.deploy import helm

Object = dict[str, Any]

CASES = {name: helm.CHART / f"ci/{name}-values.yaml" for name in ("default", "everything", "openshift")}
KUBERNETES = "1.37"
NOT_CORE = {"ServiceMonitor", "SecurityContextConstraints"}

OWN = {
    "cache.dir", "cache.size", "cache.free_space_floor", "hub.endpoint", "fuse.session", "daemon.runtime_dir", "daemon.log_level",
    "daemon.log_format", "daemon.metrics", "daemon.keeper", "swarm.peers", "swarm.listen", "swarm.key_file", "swarm.share",
    "swarm.tls_certificate", "swarm.tls_key", "swarm.tls_authorities", "swarm.tls_name",
}  # fmt: skip
"""The settings that the chart sets from values of its own."""

pytestmark = pytest.mark.usefixtures("program")


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return cast("str", request.param)


@pytest.fixture
def rendered(case: str) -> list[Object]:
    return helm.objects(CASES[case])


def of(objects: list[Object], kind: str, name: str = "") -> Object:
    found = [each for each in objects if each["kind"] == kind and each["metadata"]["name"].endswith(name)]
    assert len(found) == 1, [each["metadata"]["name"] for each in objects if each["kind"] == kind]
    return found[0]


def pod(objects: list[Object], component: str) -> Object:
    return cast("Object", of(objects, "DaemonSet", f"-{component}")["spec"]["template"]["spec"])


def container(objects: list[Object], name: str) -> Object:
    spec = pod(objects, "keeper" if name == "keeper" else "node")
    return cast("Object", next(each for each in spec["containers"] if each["name"] == name))


def containers(objects: list[Object]) -> list[Object]:
    return [container(objects, name) for name in ("daemon", "csi", "keeper")]


def environment(of: Object) -> dict[str, Any]:
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in of.get("env", [])}


def mounts(of: Object) -> dict[str, Object]:
    return {each["name"]: each for each in of["volumeMounts"]}


def texts(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for name, each in value.items():
            yield str(name)
            yield from texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from texts(each)
    else:
        yield str(value)


# What every set of values gives --------------------------------------------------------------------------------------


def test_helm_finds_nothing_to_say_about_it(case: str) -> None:
    done = helm.lint(CASES[case])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout


def test_kubernetes_would_take_each_object(rendered: list[Object]) -> None:
    for each in rendered:
        if each["kind"] not in NOT_CORE:
            validate(each, KUBERNETES, strict=True)
    names = Counter((each["kind"], each["metadata"]["name"]) for each in rendered)
    assert set(names.values()) == {1}


def test_what_has_a_namespace_names_it(rendered: list[Object]) -> None:
    everywhere = {"CSIDriver", "ClusterRole", "ClusterRoleBinding", "SecurityContextConstraints"}
    for each in rendered:
        assert each["metadata"].get("namespace") == (None if each["kind"] in everywhere else helm.NAMESPACE)


def test_privileged_are_those_who_mount_for_others_and_nobody_else(rendered: list[Object]) -> None:
    for each in containers(rendered):
        rules = each["securityContext"]
        mounts_for_others = any(mount.get("mountPropagation") == "Bidirectional" for mount in each["volumeMounts"])
        assert rules["privileged"] is mounts_for_others is (each["name"] != "keeper")
        assert rules["readOnlyRootFilesystem"] is True
    keeper = container(rendered, "keeper")["securityContext"]
    assert keeper["capabilities"] == {"drop": ["ALL"]}
    assert keeper["allowPrivilegeEscalation"] is False
    for component in ("node", "keeper"):
        spec = pod(rendered, component)
        assert not {"hostPID", "hostIPC", "initContainers"} & set(spec)
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert "hostNetwork" not in pod(rendered, "keeper")


def test_each_directory_reaches_whom_it_must_and_nobody_else(rendered: list[Object]) -> None:
    daemon, csi, keeper = map(mounts, containers(rendered))
    assert (
        {"cache", "mounts", "tmp"}
        <= set(daemon)
        <= {"cache", "mounts", "tmp", "hub-token", "peers-key", "peers-tls", "api-access"}
    )
    assert {"mounts", "kubelet", "tmp"} <= set(csi) <= {"mounts", "kubelet", "tmp", "api-access"}
    assert set(keeper) == {"keeper"}
    assert daemon["mounts"]["mountPropagation"] == "Bidirectional"
    assert csi["mounts"]["mountPropagation"] == "HostToContainer"
    assert csi["kubelet"]["mountPropagation"] == "Bidirectional"
    assert all("mountPropagation" not in each for each in (daemon["cache"], keeper["keeper"]))
    # The same path on the host and in each container: mountinfo, the kubelet's requests and the control socket's name speak of it.
    for component, seen in (("node", daemon | csi), ("keeper", keeper)):
        hosts = {
            each["name"]: each["hostPath"]["path"] for each in pod(rendered, component)["volumes"] if "hostPath" in each
        }
        assert {name: seen[name]["mountPath"] for name in hosts} == hosts


def test_daemon_driver_and_keeper_agree_on_their_sockets(rendered: list[Object]) -> None:
    daemon, csi, keeper = map(environment, containers(rendered))
    for name in ("MANTA_CACHE_DIR", "MANTA_DAEMON_RUNTIME_DIR"):
        assert daemon[name] == csi[name]
    assert daemon["MANTA_DAEMON_KEEPER"] == keeper["MANTA_DAEMON_KEEPER"]
    assert Path(keeper["MANTA_DAEMON_KEEPER"]).parent == Path(
        mounts(container(rendered, "keeper"))["keeper"]["mountPath"]
    )
    assert csi["MANTA_CSI_NODE_ID"] == {"fieldRef": {"fieldPath": "spec.nodeName"}}


def test_manta_takes_the_settings(rendered: list[Object]) -> None:
    given = environment(container(rendered, "daemon"))
    for address in ("10.1.2.3", "fd00::7"):
        texts = {
            name: value.replace("$(POD_IP)", address)
            for name, value in given.items()
            if isinstance(value, str) and name.startswith("MANTA_")
        }
        config = load(environ=texts, file=Path("/dev/null"), user_id=0).config
        assert str(config.cache.dir) == given["MANTA_CACHE_DIR"]
        assert len(str(config.socket_path)) < 108
        if config.daemon.metrics:
            assert address in config.daemon.metrics
        if config.swarm.peers:
            assert address in config.swarm.listen


def test_no_secret_is_written_anywhere(rendered: list[Object]) -> None:
    """Secrets are named, and mounted as files: nothing of them is in an argument or a variable."""
    for each in rendered:
        assert each["kind"] != "Secret"
    for each in containers(rendered):
        for name, value in environment(each).items():
            assert not isinstance(value, dict) or set(value) == {"fieldRef"}, f"{name} comes from {value}"
            assert not re.search(r"TOKEN$|SWARM_KEY$|PASSWORD", name), name
    for volume in pod(rendered, "node")["volumes"]:
        if secret := volume.get("secret"):
            assert secret["defaultMode"] == 0o400
    assert not any("secret" in each for each in pod(rendered, "keeper")["volumes"])


def test_no_container_is_without_probes_and_requests(rendered: list[Object]) -> None:
    for each in containers(rendered):
        assert {"startupProbe", "readinessProbe"} <= set(each)
        assert ("livenessProbe" in each) is (each["name"] != "keeper"), "kubelet must not kill what holds the mounts"
        assert {"cpu", "memory"} <= set(each["resources"]["requests"])
        assert each["image"] == container(rendered, "daemon")["image"]
    assert "limits" not in container(rendered, "daemon")["resources"]


def test_the_keeper_outlives_every_upgrade_and_has_time_to_hand_over(rendered: list[Object]) -> None:
    keeper = of(rendered, "DaemonSet", "-keeper")["spec"]
    assert keeper["updateStrategy"] == {"type": "OnDelete"}
    said = dict(zip(*[iter(container(rendered, "keeper")["args"][1:])] * 2, strict=True))
    assert keeper["template"]["spec"]["terminationGracePeriodSeconds"] > int(said["--give-up-after"])
    node = of(rendered, "DaemonSet", "-node")["spec"]
    assert node["updateStrategy"]["type"] == "RollingUpdate"
    assert "maxSurge" not in node["updateStrategy"]["rollingUpdate"], "two daemons cannot have one cache"


def test_a_pod_gets_no_token_for_the_api_but_where_it_asks(rendered: list[Object]) -> None:
    for component in ("node", "keeper"):
        assert pod(rendered, component)["automountServiceAccountToken"] is False
    for each in rendered:
        if each["kind"] == "ServiceAccount":
            assert each["automountServiceAccountToken"] is False


def test_the_driver_object(rendered: list[Object]) -> None:
    driver = of(rendered, "CSIDriver")
    assert driver["spec"] == {
        "attachRequired": False,
        "podInfoOnMount": True,
        "fsGroupPolicy": "None",
        "volumeLifecycleModes": ["Ephemeral", "Persistent"],
        "requiresRepublish": True,
        "storageCapacity": False,
    }
    assert driver["metadata"]["labels"]["security.openshift.io/csi-ephemeral-volume-profile"] == "restricted"
    assert environment(container(rendered, "csi"))["MANTA_CSI_DRIVER_NAME"] == driver["metadata"]["name"]


def test_services_select_the_pods_and_monitors_the_services(rendered: list[Object]) -> None:
    labels = of(rendered, "DaemonSet", "-node")["spec"]["template"]["metadata"]["labels"]
    ports = {port["name"] for port in container(rendered, "daemon")["ports"]}
    for each in rendered:
        if each["kind"] == "Service":
            assert each["spec"]["selector"].items() <= labels.items()
            assert {port["targetPort"] for port in each["spec"]["ports"]} <= ports
        if each["kind"] == "ServiceMonitor":
            chosen = [
                service
                for service in rendered
                if service["kind"] == "Service"
                and each["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
            ]
            assert [service["metadata"]["name"] for service in chosen] == ["models-metrics"]
            assert each["spec"]["endpoints"][0]["port"] in {port["name"] for port in chosen[0]["spec"]["ports"]}


# What differs --------------------------------------------------------------------------------------------------------


def test_by_default_there_is_as_little_as_can_be() -> None:
    kinds = Counter(each["kind"] for each in helm.objects(CASES["default"]))
    assert kinds == {"DaemonSet": 2, "ServiceAccount": 2, "CSIDriver": 1, "Service": 1}
    assert container(helm.objects(CASES["default"]), "daemon")["image"] == f"registry.example.com/manta:{__version__}"


def test_everything() -> None:
    objects = helm.objects(CASES["everything"])
    daemon = environment(container(objects, "daemon"))
    assert container(objects, "csi")["image"].startswith("registry.example.com/team/manta@sha256:0123"), (
        "the digest wins"
    )
    assert daemon["MANTA_SWARM_PEERS"] == "kubernetes:manta/models-peers"
    assert (daemon["MANTA_FETCH_STALL_S"], daemon["MANTA_FETCH_FILL"]) == ("2.5", "false")
    assert daemon["MANTA_FUSE_COMPLETE_AT_OPEN"] == "67108864", "and not 6.7108864e+07"
    assert daemon["HTTPS_PROXY"] == "http://proxy.example.com:3128"
    assert of(objects, "Role")["rules"] == [
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]}
    ]
    assert of(objects, "ClusterRole")["rules"] == [{"apiGroups": [""], "resources": ["events"], "verbs": ["create"]}]
    for binding in ("RoleBinding", "ClusterRoleBinding"):
        assert [each["name"] for each in of(objects, binding)["subjects"]] == ["models-node"]
    for name in ("daemon", "csi"):
        assert "api-access" in mounts(container(objects, name))
    assert of(objects, "ResourceQuota")["spec"]["hard"] == {"pods": "200"}
    assert json.loads(of(objects, "ConfigMap")["data"]["manta.json"])["title"] == "Manta"
    assert of(objects, "ConfigMap")["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_the_network_is_open_for_peers_scrapers_name_servers_and_the_hub() -> None:
    objects = helm.objects(CASES["everything"])
    node, keeper = of(objects, "NetworkPolicy", "-node")["spec"], of(objects, "NetworkPolicy", "-keeper")["spec"]
    assert keeper.keys() == {"podSelector", "policyTypes"}
    assert keeper["policyTypes"] == node["policyTypes"] == ["Ingress", "Egress"]
    peers, scrapers = node["ingress"]
    assert peers["from"] == [{"podSelector": node["podSelector"]}]
    assert ([port["port"] for port in peers["ports"]], [port["port"] for port in scrapers["ports"]]) == (
        [19402],
        [19401],
    )
    assert scrapers["from"][0]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "monitoring"}
    names, outside, others = node["egress"]
    assert {(port["port"], port["protocol"]) for port in names["ports"]} >= {(53, "UDP"), (53, "TCP")}
    assert [port["port"] for port in outside["ports"]] == [8080, 443, 3128, 6443]
    assert others == {"to": peers["from"], "ports": peers["ports"]}


def test_on_openshift_each_daemonset_has_the_constraints_that_it_needs() -> None:
    objects = helm.objects(CASES["openshift"])
    node = of(objects, "SecurityContextConstraints", "-node")
    keeper = of(objects, "SecurityContextConstraints", "-keeper")
    assert node["users"] == ["system:serviceaccount:manta:given-node"]
    assert keeper["users"] == ["system:serviceaccount:manta:given-keeper"]
    assert (node["allowPrivilegedContainer"], keeper["allowPrivilegedContainer"]) == (True, False)
    for rules, component in ((node, "node"), (keeper, "keeper")):
        spec = pod(objects, component)
        assert spec["serviceAccountName"] == f"given-{component}"
        kinds = {kind for volume in spec["volumes"] for kind in volume if kind != "name"}
        assert kinds <= set(rules["volumes"])
        assert bool(spec.get("hostNetwork")) <= rules["allowHostNetwork"]
    assert pod(objects, "keeper")["securityContext"]["seLinuxOptions"] == {"type": "spc_t"}
    assert pod(objects, "node")["dnsPolicy"] == "ClusterFirstWithHostNet"
    assert not {"ServiceAccount", "Role", "RoleBinding", "ClusterRole"} & {each["kind"] for each in objects}
    assert "MANTA_DAEMON_METRICS" not in environment(container(objects, "daemon"))


# Values --------------------------------------------------------------------------------------------------------------


def schema() -> Object:
    return cast("Object", json.loads((helm.CHART / "values.schema.json").read_text()))


def test_the_schema_refuses_typos_and_what_cannot_be() -> None:
    wrong = {
        "imag.tag=1": "imag",
        "cache.path=/x": "path",
        "settings.fetch.conections=3": "conections",
        "settings.cache.dir=/x": "cache",
        "extraEnv[0].name=HF_TOKEN": "/extraEnv/0/name",
        "extraEnv[0].name=MANTA_CACHE_DIR": "/extraEnv/0/name",
        "cache.size=lots": "/cache/size",
        "image.digest=sha256:12": "/image/digest",
        "driverName=Csi.Manta": "/driverName",
        "peers.tls.secretName=x": "/peers/tls",
        "peers.discovery=gossip": "/peers/discovery",
        "keeper.giveUpAfter=1": "/keeper/giveUpAfter",
        "updateStrategy.rollingUpdate.maxSurge=1": "maxSurge",
    }
    done = helm.template(CASES["default"], *(word for each in wrong for word in ("--set", each)))
    assert done.returncode != 0
    assert [part for part in wrong.values() if part not in done.stderr] == []


def test_peers_need_a_key_and_the_image_a_name() -> None:
    assert "/peers" in helm.template(CASES["default"], "--set", "peers.discovery=dns").stderr
    assert "/image/repository" in helm.run("template", "manta", str(helm.CHART)).stderr


def test_every_map_of_the_schema_is_closed() -> None:
    def closed(part: Object, path: str) -> None:
        if "properties" in part:
            assert part["additionalProperties"] is False, path
        for name, each in part.get("properties", {}).items():
            closed(each, f"{path}.{name}")

    closed(schema(), "values")
    for name, part in schema()["$defs"].items():
        closed(part, name)


def test_values_schema_and_templates_know_the_same_values() -> None:
    leaves = set(helm.leaves_of(schema()))
    used = {
        name
        for path in (helm.CHART / "templates").iterdir()
        for name in re.findall(r"\.Values\.([A-Za-z]\w*(?:\.\w+)*)", path.read_text())
    }
    # A template may name a value, or what it is part of (`with .Values.hub.tokenSecretRef`).
    assert {leaf for leaf in leaves if not any(leaf == name or leaf.startswith(f"{name}.") for name in used)} == set()
    assert {name for name in used if not any(leaf == name or leaf.startswith(f"{name}.") for leaf in leaves)} == set()
    described = {value.name: value.meaning for value in helm.values_of_chart()}
    assert set(described) == leaves
    assert [name for name, meaning in described.items() if not meaning.endswith(".")] == []


def test_every_value_makes_a_difference() -> None:
    """Of those that ci/everything-values.yaml sets: no template names a value and ignores it."""
    given = yaml.safe_load(CASES["everything"].read_text())
    all_texts = set(texts(helm.objects(CASES["everything"])))
    joined = "\n".join(all_texts)

    def look(value: object, path: str) -> None:
        if isinstance(value, dict):
            for name, each in value.items():
                look(each, f"{path}.{name}")
        elif isinstance(value, list):
            for each in value:
                look(each, path)
        elif isinstance(value, str) and path not in {".image.tag", ".peers.discovery"}:
            assert value in joined, path

    look(given, "")


def test_settings_are_those_that_manta_has() -> None:
    sections = schema()["properties"]["settings"]["properties"]
    offered = {f"{section}.{name}" for section, fields in sections.items() for name in fields["properties"]}
    assert offered - set(KEYS) == set()
    assert set(KEYS) - offered - OWN == set()


def test_the_chart_is_of_this_version() -> None:
    chart = yaml.safe_load((helm.CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == __version__
    assert chart["kubeVersion"] == ">=1.26-0"


def test_the_notes_tell_what_to_do_next() -> None:
    options = ("--namespace", "models", "--values", str(CASES["default"]), "--dry-run=client")
    notes = helm.run("install", "manta", str(helm.CHART), *options).stdout.partition("NOTES:")[2]
    for part in (
        "-n models rollout status daemonset/manta-node",
        "driver: csi.manta.dev",
        "manta status",
        "peers.discovery",
    ):
        assert part in notes
