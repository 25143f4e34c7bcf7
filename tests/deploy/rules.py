"""What an example has to be beyond what Kubernetes asks: the volumes right, nothing written or downloaded, no name without its object.

A rule is a function from an example to sentences about what is wrong. Here and only here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from manta.control.protocol import PREFETCHES, VIEWS
from tests.deploy.manifests import Example, Pod, pods

DRIVER = "csi.manta.dev"

ATTRIBUTES = {
    "model": re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"),
    "revision": re.compile(r"[\w./-]+"),
    "subfolder": re.compile(r"[\w.-]+(/[\w.-]+)*"),
    "view": re.compile("|".join(VIEWS)),
    "prefetch": re.compile("|".join(PREFETCHES)),
    "pin": re.compile("true|false"),
}
"""A volume's attributes. The driver refuses all others."""

HOST_FOLDER = "/run/manta/"
"""The chart's mountDir: what a node shows below it outlives the daemon's pod."""

START_SECONDS_MIN = 1800
"""An engine that reads a model for the first time waits for the hub: 64 GB at 1 Gbit/s take 9 minutes, and quotas and slow links more."""

GPU = "nvidia.com/gpu"


def attribute_errors(attributes: dict[str, str]) -> Iterator[str]:
    for name, value in attributes.items():
        if name not in ATTRIBUTES:
            yield f"{name} is no attribute of a volume: {', '.join(ATTRIBUTES)}"
        elif not ATTRIBUTES[name].fullmatch(value):
            yield f"{value!r} is no {name}"
    if "model" not in attributes and attributes.get("view") != "hub-cache":
        yield "a volume has a model, unless its view is hub-cache"


# Of a pod ----------------------------------------------------------------------------------------------------------------


def _models(pod: Pod) -> set[str]:
    """The names of its volumes that come from Manta: inline, or by a claim, of which examples have no others."""
    volumes = pod.spec.get("volumes", [])
    return {volume["name"] for volume in volumes if "csi" in volume or "persistentVolumeClaim" in volume}


def _volumes(pod: Pod) -> Iterator[str]:
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
    for name, volume in volumes.items():
        if "csi" in volume:
            csi = volume["csi"]
            if csi["driver"] != DRIVER:
                yield f"volume {name}: the driver is {DRIVER}, not {csi['driver']}"
            yield from attribute_errors(csi.get("volumeAttributes", {}))
        source = volume.get("csi") or volume.get("persistentVolumeClaim")
        if source and source.get("readOnly") is not True:
            yield f"volume {name}: not readOnly"
        if "emptyDir" in volume and volume["emptyDir"].get("medium") != "Memory":
            yield f"volume {name}: an emptyDir on disk; nothing is to be downloaded"
        if set(volume) - {"name", "csi", "persistentVolumeClaim", "emptyDir"}:
            yield f"volume {name}: of a kind that examples do not need: {sorted(volume)}"
    mounted = set()
    for container in pod.spec["containers"]:
        for mount in container.get("volumeMounts", []):
            mounted.add(mount["name"])
            if mount["name"] not in volumes:
                yield f"{container['name']} mounts {mount['name']}, which is no volume of the pod"
            elif mount["name"] in _models(pod) and mount.get("readOnly") is not True:
                yield f"{container['name']} mounts {mount['name']} to write"
            elif "emptyDir" in volumes[mount["name"]] and mount["mountPath"] != "/dev/shm":
                yield f"{container['name']} mounts memory at {mount['mountPath']}: /dev/shm is what it is for"
    yield from (f"volume {name}: mounted by nobody" for name in set(volumes) - mounted)


def _containers(pod: Pod) -> Iterator[str]:
    if pod.spec.get("initContainers"):
        yield "an init container: a volume needs none"
    for container in pod.spec["containers"]:
        name, image = container["name"], container.get("image")
        if image is not None and not re.search(r"(:(?!latest)[\w.-]+|@sha256:[0-9a-f]{64})$", image):
            yield f"{name}: the image {image} has no tag, or latest"
        for variable in container.get("env", []):
            if variable["name"] in {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"}:
                yield f"{name}: {variable['name']} is the volume's, not the container's"
        if container.get("ports") and "http" in [port.get("name") for port in container["ports"]]:
            yield from (f"{name}: {error}" for error in probe_errors(container))
            if GPU not in container["resources"]["limits"]:
                yield f"{name}: asks for no GPU"


def probe_errors(container: dict[str, Any]) -> Iterator[str]:
    if "readinessProbe" not in container:
        yield "no readinessProbe: it gets requests before the model is there"
    probe = container.get("startupProbe", {})
    if probe.get("failureThreshold", 0) * probe.get("periodSeconds", 10) < START_SECONDS_MIN:
        yield f"no startupProbe that waits {START_SECONDS_MIN} s for the model"
    ports = {port["name"]: port["containerPort"] for port in container.get("ports", []) if "name" in port}
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        port = container.get(name, {}).get("httpGet", {}).get("port")
        if isinstance(port, str) and port not in ports:
            yield f"{name} asks port {port}, which the container does not have"


# Of an example -----------------------------------------------------------------------------------------------------------


def _of_pods(rule: Callable[[Pod], Iterator[str]]) -> Callable[[Example], Iterator[str]]:
    def errors(example: Example) -> Iterator[str]:
        for document in example.documents:
            for pod in pods(document):
                yield from (f"{document['kind']} {pod.where}: {error}" for error in rule(pod))

    return errors


def _by_kind(example: Example, kind: str, group: str = "") -> dict[str, dict[str, Any]]:
    return {
        document["metadata"]["name"]: document
        for document in example.documents
        if document["kind"] == kind and document["apiVersion"].rpartition("/")[0] == group
    }


def uses_manta(example: Example) -> Iterator[str]:
    """By a volume in a pod, by a PV, or by a path of the node."""
    for document in example.documents:
        if document["kind"] == "PersistentVolume" and document["spec"]["csi"]["driver"] == DRIVER:
            return
        if any(_models(pod) for pod in pods(document)):
            return
        if document["kind"] == "OpenModel" and f"host://{HOST_FOLDER}" in document["spec"]["source"].get("uri", ""):
            return
    yield "no volume of Manta"


def asks_for_gpus(example: Example) -> Iterator[str]:
    """Also where the rules for pods see no server, or no pod at all. A Job that prefetches needs none."""
    if not any(document["kind"] == "Job" for document in example.documents) and f"{GPU}: " not in example.text:
        yield f"nobody asks for {GPU}"


def persistent_volumes(example: Example) -> Iterator[str]:
    claims = _by_kind(example, "PersistentVolumeClaim")
    bound = {}
    for name, volume in _by_kind(example, "PersistentVolume").items():
        spec = volume["spec"]
        if spec["csi"]["driver"] != DRIVER:
            yield f"PersistentVolume {name}: the driver is {DRIVER}, not {spec['csi']['driver']}"
        yield from (f"PersistentVolume {name}: {error}" for error in attribute_errors(spec["csi"]["volumeAttributes"]))
        if (spec["accessModes"], spec["csi"].get("readOnly")) != (["ReadOnlyMany"], True):
            yield f"PersistentVolume {name}: not ReadOnlyMany and readOnly"
        if (spec["storageClassName"], spec["persistentVolumeReclaimPolicy"]) != ("", "Retain"):
            yield f"PersistentVolume {name}: a static one has no storageClassName, and is retained"
        claim = claims.get(spec["claimRef"]["name"])
        if claim is None or claim["metadata"].get("namespace") != spec["claimRef"]["namespace"]:
            yield f"PersistentVolume {name}: its claimRef is no claim of the example"
        else:
            bound[claim["metadata"]["name"]] = name
    for name, claim in claims.items():
        spec = claim["spec"]
        if bound.get(name) != spec.get("volumeName"):
            yield f"PersistentVolumeClaim {name}: its volumeName is not the volume that has it as claimRef"
        if (spec["accessModes"], spec.get("storageClassName")) != (["ReadOnlyMany"], ""):
            yield f"PersistentVolumeClaim {name}: not ReadOnlyMany with an empty storageClassName, which is not none at all"


def names(example: Example) -> Iterator[str]:
    """Every Secret, claim and model that is named is in the example, or its comments say of it by name."""
    made = {(document["kind"], document["metadata"]["name"]) for document in example.documents}
    for kind, name in _named(example):
        if (kind, name) not in made and not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", example.comments):
            yield f"{kind} {name}: not in the example, and no comment says whose it is"


def _named(example: Example) -> Iterator[tuple[str, str]]:
    for document in example.documents:
        for pod in pods(document):
            for secret in pod.spec.get("imagePullSecrets", []):
                yield "Secret", secret["name"]
            for volume in pod.spec.get("volumes", []):
                if "persistentVolumeClaim" in volume:
                    yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
                if "nodePublishSecretRef" in volume.get("csi", {}):
                    yield "Secret", volume["csi"]["nodePublishSecretRef"]["name"]
        yield from _named_by_kind(document["kind"], document.get("spec", {}))


def _named_by_kind(kind: str, spec: dict[str, Any]) -> Iterator[tuple[str, str]]:
    match kind:
        case "PersistentVolume" if "nodePublishSecretRef" in spec["csi"]:
            yield "Secret", spec["csi"]["nodePublishSecretRef"]["name"]
        case "NIMService":
            yield from (("Secret", name) for name in spec["image"].get("pullSecrets", []))
            yield "PersistentVolumeClaim", spec["storage"]["pvc"]["name"]
        case "InferenceService":
            uri = spec["predictor"]["model"].get("storageUri", "")
            if uri.startswith("pvc://"):
                yield "PersistentVolumeClaim", uri.removeprefix("pvc://").partition("/")[0]
        case "Playground":
            yield "OpenModel", spec["modelClaim"]["modelName"]
        case "Service" if "modelClaims" in spec:
            yield from (("OpenModel", model["name"]) for model in spec["modelClaims"]["models"])


def services(example: Example) -> Iterator[str]:
    """A Service leads to a port of a pod of the example."""
    made = [pod for document in example.documents for pod in pods(document)]
    for name, service in _by_kind(example, "Service").items():
        chosen = [pod for pod in made if service["spec"]["selector"].items() <= pod.labels.items()]
        if len(chosen) != 1:
            yield f"Service {name}: selects {len(chosen)} kinds of pods"
        for pod in chosen:
            ports = {port["name"] for container in pod.spec["containers"] for port in container.get("ports", [])}
            yield from (
                f"Service {name}: no port {port['targetPort']} at the pod"
                for port in service["spec"]["ports"]
                if port["targetPort"] not in ports
            )


def operators(example: Example) -> Iterator[str]:
    """What would make an operator download after all, and what its kinds keep from a pod's rules."""
    for name, service in _by_kind(example, "NIMService", "apps.nvidia.com").items():
        spec = service["spec"]
        if set(spec["storage"]) != {"pvc", "readOnly"} or spec["storage"]["readOnly"] is not True:
            yield f"NIMService {name}: a claim, readOnly, is all of its storage"
        if spec["storage"]["pvc"].get("create") is not False:
            yield f"NIMService {name}: the operator would make a claim of its own"
        if not {"NIM_MODEL_PATH", "NIM_CACHE_PATH"} <= {variable["name"] for variable in spec["env"]}:
            yield f"NIMService {name}: NIM_MODEL_PATH is to be read, and NIM_CACHE_PATH to be written"
    for name, service in _by_kind(example, "InferenceService", "serving.kserve.io").items():
        model = service["spec"]["predictor"]["model"]
        if not model.get("storageUri", "pvc://").startswith("pvc://"):
            yield f"InferenceService {name}: {model['storageUri']} is downloaded by an init container"
        if model.get("storageUri") and model.get("volumeMounts"):
            yield f"InferenceService {name}: storageUri and a volume of one's own are two models at /mnt/models"
        yield from (f"InferenceService {name}: {error}" for error in probe_errors(model))
    for name, service in _by_kind(example, "LLMInferenceService", "serving.kserve.io").items():
        if service["spec"].get("storageInitializer", {}).get("enabled") is not False:
            yield f"LLMInferenceService {name}: its storageInitializer downloads"
    for name, service in _by_kind(example, "Service", "inference.llmaz.io").items():
        if service["metadata"].get("annotations", {}).get("llmaz.io/skip-model-loader") != "true":
            yield f"Service {name}: llmaz adds its model-loader"


RULES: dict[str, Callable[[Example], Iterator[str]]] = {
    "uses Manta": uses_manta,
    "GPUs": asks_for_gpus,
    "volumes": _of_pods(_volumes),
    "containers": _of_pods(_containers),
    "persistent volumes": persistent_volumes,
    "names": names,
    "services": services,
    "operators": operators,
}


def errors(example: Example) -> list[str]:
    return [error for rule in RULES.values() for error in rule(example)]
