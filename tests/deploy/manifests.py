"""The objects in deploy/examples: how they are read, which pods they make, whether the schemas allow them. Here and only here."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from kubernetes_validate import utils
from referencing import Registry, Resource

from tests.deploy import crds

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "deploy/examples"

KUBERNETES = "1.37"
"""Whose schemas of Kubernetes' own kinds are asked."""

QUANTITY = re.compile(r"([0-9]+(\.[0-9]*)?)([KMGTPE]i|[mkMGTPE]|)")
"""The quantities that examples need; Kubernetes knows more."""


@dataclass(frozen=True)
class Example:
    """A file of deploy/examples."""

    path: Path
    text: str
    documents: list[dict[str, Any]]

    @property
    def comments(self) -> str:
        return "\n".join(line.partition("#")[2] for line in self.text.splitlines())


@dataclass(frozen=True)
class Pod:
    """A pod that an object makes. `where` says which of its pods, for a message."""

    where: str
    template: dict[str, Any]

    @property
    def spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = self.template["spec"]
        return spec

    @property
    def labels(self) -> dict[str, str]:
        labels: dict[str, str] = self.template.get("metadata", {}).get("labels", {})
        return labels


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        doubles = {key for key in keys if keys.count(key) > 1}
        if doubles:
            raise yaml.constructor.ConstructorError(None, None, f"twice: {sorted(doubles)}", node.start_mark)
        return super().construct_mapping(node, deep)


def parse(text: str) -> list[dict[str, Any]]:
    """The objects of a file. Raises yaml.YAMLError."""
    return [document for document in yaml.load_all(text, _Loader) if document is not None]


def examples() -> list[Example]:
    texts = [(path, path.read_text()) for path in sorted(EXAMPLES.glob("*.yaml"))]
    return [Example(path, text, parse(text)) for path, text in texts]


# Pods --------------------------------------------------------------------------------------------------------------------


def _workload(document: dict[str, Any]) -> Iterator[Pod]:
    yield Pod("template", document["spec"]["template"])


def _leader_workers(templates: dict[str, Any]) -> Iterator[Pod]:
    for name in ("leaderTemplate", "workerTemplate"):
        if name in templates:
            yield Pod(name, templates[name])


def _ray(document: dict[str, Any]) -> Iterator[Pod]:
    cluster = document["spec"]["rayClusterConfig"]
    yield Pod("head", cluster["headGroupSpec"]["template"])
    for group in cluster["workerGroupSpecs"]:
        yield Pod(group["groupName"], group["template"])


def _kserve(document: dict[str, Any]) -> Iterator[Pod]:
    """KServe puts `model` together with the container of its runtime, and the rest of the predictor is the pod's."""
    predictor = document["spec"]["predictor"]
    server = {"name": "kserve-container"} | {
        key: value
        for key, value in predictor["model"].items()
        if key not in {"modelFormat", "runtime", "runtimeVersion", "protocolVersion", "storageUri", "storage"}
    }
    rest = {key: value for key, value in predictor.items() if key not in {"model", "minReplicas", "maxReplicas"}}
    yield Pod("predictor", {"spec": rest | {"containers": [server]}})


def _kserve_llm(document: dict[str, Any]) -> Iterator[Pod]:
    for name in ("template", "worker"):
        if name in document["spec"]:
            yield Pod(name, {"spec": document["spec"][name]})


_PODS: dict[str, Callable[[dict[str, Any]], Iterator[Pod]]] = {
    "Deployment": _workload,
    "Job": _workload,
    "inference.llmaz.io/Service": lambda document: _leader_workers(document["spec"]["workloadTemplate"]),
    "LeaderWorkerSet": lambda document: _leader_workers(document["spec"]["leaderWorkerTemplate"]),
    "Workspace": lambda document: iter([Pod("template", document["inference"]["template"])]),
    "RayService": _ray,
    "InferenceService": _kserve,
    "LLMInferenceService": _kserve_llm,
}


def pods(document: dict[str, Any]) -> list[Pod]:
    """What its controller will run, as far as the object says it: a NIMService or a Playground says nothing of volumes."""
    group = document["apiVersion"].rpartition("/")[0]
    of = _PODS.get(f"{group}/{document['kind']}") or _PODS.get(document["kind"])
    return list(of(document)) if of and not (document["kind"] == "Service" and not group) else []


# Schemas -----------------------------------------------------------------------------------------------------------------


def errors(document: dict[str, Any]) -> list[str]:
    """What Kubernetes would refuse or drop without a word, a sentence each."""
    schema = crds.find(document)
    if schema is None:
        found = _core_errors(document)
    else:
        # An object of nothing but metadata, for the schema of metadata; and the pods, which a CRD may leave open.
        found = _core_errors({"apiVersion": "v1", "kind": "ConfigMap", "metadata": document["metadata"]})
        found += list(crds.errors(document, schema))
        if not found:
            for pod in pods(document):
                body = {"apiVersion": "v1", "kind": "PodTemplate", "template": pod.template}
                found += [f"{pod.where}: {error}" for error in _core_errors(body)]
            found += [error for pod in pods(document) for error in _doubles(pod)]
    return found + list(_bad_quantities(document, ""))


def _core_errors(document: dict[str, Any]) -> list[str]:
    api, kind = str(document.get("apiVersion")), str(document.get("kind"))
    validator = _core_validator(api, kind)
    if validator is None:
        return [f"{api} {kind}: no such kind in Kubernetes {KUBERNETES}, and no schema of it in {crds.FOLDER}"]
    found = [crds.sentence(error, kind) for error in validator.iter_errors(document)]
    return found or [error for pod in pods(document) for error in _doubles(pod)]


@functools.cache
def _core_validator(api: str, kind: str) -> Any:
    """Of one of Kubernetes' own kinds; None where there is none of that name. kubernetes_validate.validate() reads 2 MB for each object."""
    folder = f"kubernetes-json-schema/v{KUBERNETES}.0-local-strict"
    group, slash, version = api.partition("/")
    try:
        schema = utils.schema_contents(
            f"{folder}/{kind.lower()}-{group.split('.')[0]}{'-' if slash else ''}{version}.json", KUBERNETES
        )
    except FileNotFoundError:
        return None
    return jsonschema.Draft202012Validator(schema, registry=Resource.from_contents(schema) @ _definitions())


@functools.cache
def _definitions() -> Registry[Any]:
    """What the schemas refer to."""
    path = f"kubernetes-json-schema/v{KUBERNETES}.0-local-strict/_definitions.json"
    return Resource.from_contents(utils.schema_contents(path, KUBERNETES)) @ Registry()


def _doubles(pod: Pod) -> Iterator[str]:
    """Lists that are maps by name: the offline schemas do not say so."""
    lists = {"volumes": pod.spec.get("volumes", []), "containers": pod.spec["containers"]}
    for container in pod.spec["containers"]:
        lists |= {f"{container['name']}.{key}": container.get(key, []) for key in ("env", "ports", "volumeMounts")}
    for where, entries in lists.items():
        names = [entry.get("mountPath") or entry.get("name") for entry in entries]
        for name in {name for name in names if name and names.count(name) > 1}:
            yield f"{pod.where}.{where}: {name!r} is there {names.count(name)} times"


def _bad_quantities(value: Any, where: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, child in value.items():
            if key in {"requests", "limits", "capacity"} and isinstance(child, dict):
                for resource, amount in child.items():
                    if not QUANTITY.fullmatch(str(amount)):
                        yield f"{where}.{key}.{resource}: {amount!r} is no quantity"
            else:
                yield from _bad_quantities(child, f"{where}.{key}")
    elif isinstance(value, list):
        for place, child in enumerate(value):
            yield from _bad_quantities(child, f"{where}.{place}")
