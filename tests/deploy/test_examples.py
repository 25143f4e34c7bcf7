"""deploy/examples: every object of every example against its schema and our rules, and that a mistake in any of them is seen."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy import crds, manifests, rules, snippets
from tests.deploy.manifests import ROOT, Example

EXAMPLES = {example.path.name: example for example in manifests.examples()}

KINDS = {document["kind"] for example in EXAMPLES.values() for document in example.documents}

FREE = {"labels", "annotations", "matchLabels", "nodeSelector", "volumeAttributes", "stringData", "rayStartParams"}
"""Maps whose keys are anybody's to choose. Attributes of volumes are looked at by our rules."""

READINESS = """\
          readinessProbe:
            httpGet: {path: /health, port: http}
            periodSeconds: 10
"""


def edited(name: str, old: str, new: str) -> Example:
    """The example with one thing wrong."""
    example = EXAMPLES[name]
    assert old in example.text, f"{name} no longer says {old!r}"
    text = example.text.replace(old, new, 1)
    return Example(example.path, text, manifests.parse(text))


def errors(example: Example) -> list[str]:
    """The rules read what the schemas allow."""
    return [error for document in example.documents for error in manifests.errors(document)] or rules.errors(example)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_right(name: str) -> None:
    assert errors(EXAMPLES[name]) == []


def test_what_was_asked_for_is_there() -> None:
    assert len(EXAMPLES) == 18
    assert {kind for _, kind, _ in crds.COPIED} <= KINDS
    assert {crds.path_of(*copied) for copied in crds.COPIED} == set(crds.FOLDER.glob("*.json"))
    views = [text for example in EXAMPLES.values() if (text := example.text) and "view: hub-cache" in text]
    assert len(views) == 1
    handles = re.findall(r"volumeHandle: (\S+)", "".join(example.text for example in EXAMPLES.values()))
    assert len(set(handles)) == len(handles)


def test_the_driver_itself_takes_the_attributes() -> None:
    driver = pytest.importorskip("manta_csi.attributes", reason="manta_csi is not installed")
    assert set(rules.ATTRIBUTES) == set(driver.MEANINGS)
    for example in EXAMPLES.values():
        for attributes in found_in(example.documents, "volumeAttributes"):
            driver.parse(driver.given(attributes))


def found_in(value: Any, key: str) -> Iterator[Any]:
    """Every value of that key, however deep."""
    if isinstance(value, dict):
        if key in value:
            yield value[key]
        value = list(value.values())
    if isinstance(value, list):
        for child in value:
            yield from found_in(child, key)


# What is wrong is seen ---------------------------------------------------------------------------------------------------


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every mapping in a document."""
    if isinstance(value, dict):
        yield path
        for key, child in value.items():
            yield from places(child, (*path, key))
    elif isinstance(value, list):
        for place, child in enumerate(value):
            yield from places(child, (*path, place))


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_field_that_does_not_exist_is_seen_wherever_it_is(name: str) -> None:
    for document in EXAMPLES[name].documents:
        for path in places(document):
            if path and (path[-1] in FREE or (path[-1] == "selector" and document["apiVersion"] == "v1")):
                continue
            wrong = copy.deepcopy(document)
            place: Any = wrong
            for step in path:
                place = place[step]
            place["tpyo"] = "x"
            found = manifests.errors(wrong)
            assert found, f"{document['kind']}: nobody saw {'.'.join(map(str, path))}.tpyo"


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        # By the schemas: a typo in each kind, and wrong values.
        ("vllm.yaml", "containerPort:", "containerport:", "containerport"),
        ("vllm.yaml", "replicas: 1", 'replicas: "one"', "'one' is not of type"),
        ("vllm.yaml", "memory: 48Gi", "memory: 48GiB", "48GiB"),
        ("vllm.yaml", "kind: Deployment", "kind: Deploymnet", "no such kind"),
        ("vllm.yaml", "targetPort: http", "targetport: http", "targetport"),
        ("vllm.yaml", "- name: shm\n", "- name: model\n", "is there 2 times"),
        ("prefetch-job.yaml", "parallelism", "paralellism", "paralellism"),
        ("gated.yaml", "stringData", "stringdata", "stringdata"),
        ("static-pv.yaml", "volumeHandle", "volumehandle", "volumehandle"),
        ("static-pv.yaml", "volumeName", "volumename", "volumename"),
        ("static-pv.yaml", "revision: main", "revision: 1.0", "not of type 'string'"),
        ("nim-operator.yaml", "pullSecrets", "imagePullSecrets", "imagePullSecrets"),
        ("kserve.yaml", "volumeMounts", "volumeMount", "volumeMount"),
        ("kserve.yaml", "driver:", "drivr:", "drivr"),
        ("kserve-llm.yaml", "storageInitializer", "storageInitialiser", "storageInitialiser"),
        ("kserve-llm.yaml", "readOnly: true\n          volumeAttributes", "readonly: true\n          volumeAttributes", "readonly"),
        ("kuberay.yaml", "serveConfigV2", "serveConfig", "serveConfig"),
        ("kuberay.yaml", "minReplicas: 1", "minReplicas: many", "'many' is not of type"),
        ("kaito.yaml", "labelSelector", "labelselector", "labelselector"),
        ("kaito.yaml", "volumeMounts", "volumeMount", "volumeMount"),
        ("llmaz-host.yaml", "familyName", "family", "family"),
        ("llmaz-host.yaml", "backendName", "backend", "backend"),
        ("llmaz-service.yaml", "workloadTemplate", "template", "workloadTemplate"),
        ("llmaz-service.yaml", "role: main", "role: first", "'first' is not one of"),
        ("leaderworkerset.yaml", "leaderTemplate", "leadertemplate", "leadertemplate"),
        ("leaderworkerset.yaml", "restartPolicy: RecreateGroupOnPodRestart", "restartPolicy: Never", "'Never' is not one of"),
        # By our rules.
        ("vllm.yaml", "driver: csi.manta.dev", "driver: csi.manta.io", "csi.manta.io"),
        ("vllm.yaml", "prefetch: background", "prefetch: eager", "'eager' is no prefetch"),
        ("vllm.yaml", "revision: main", "branch: main", "branch is no attribute"),
        ("vllm.yaml", "model: Qwen/Qwen3-8B", "model: hf://Qwen/Qwen3-8B", "is no model"),
        ("vllm.yaml", "model: Qwen/Qwen3-8B", "view: tree", "has a model"),
        ("prefetch-job.yaml", 'pin: "true"', 'pin: "yes"', "'yes' is no pin"),
        ("kserve.yaml", "prefetch: background", "prefetch: everything", "is no prefetch"),
        ("vllm.yaml", "mountPath: /models, readOnly: true", "mountPath: /models", "to write"),
        ("vllm.yaml", "            readOnly: true\n", "", "not readOnly"),
        ("static-pv.yaml", "claimName: qwen3-8b, readOnly: true", "claimName: qwen3-8b", "not readOnly"),
        ("vllm.yaml", "{name: model, mountPath", "{name: models, mountPath", "no volume of the pod"),
        ("vllm.yaml", "emptyDir: {medium: Memory, sizeLimit: 8Gi}", "emptyDir: {}", "an emptyDir on disk"),
        ("vllm.yaml", "mountPath: /dev/shm", "mountPath: /cache", "/dev/shm is what it is for"),
        ("vllm.yaml", "      containers:", "      initContainers: [{name: get, image: 'a:1'}]\n      containers:", "an init container"),
        ("vllm.yaml", ":v0.28.0", ":latest", "no tag, or latest"),
        ("vllm.yaml", ":v0.28.0", "", "no tag, or latest"),
        ("vllm.yaml", "failureThreshold: 360", "failureThreshold: 30", "no startupProbe"),
        ("tgi.yaml", READINESS, "", "no readinessProbe"),
        ("vllm.yaml", ', nvidia.com/gpu: "1"', "", "asks for no GPU"),
        ("kuberay.yaml", ', nvidia.com/gpu: "1"', "", "nobody asks for nvidia.com/gpu"),
        ("vllm.yaml", "selector: {app: vllm}", "selector: {app: vlm}", "selects 0"),
        ("vllm.yaml", "targetPort: http", "targetPort: https", "no port https"),
        ("gated.yaml", "nodePublishSecretRef: {name: hf-token}", "nodePublishSecretRef: {name: hf}", "Secret hf:"),
        ("gated.yaml", "          ports:", "          env: [{name: HF_TOKEN, value: x}]\n          ports:", "HF_TOKEN is the volume's"),
        ("static-pv.yaml", "claimName: qwen3-8b", "claimName: qwen3-9b", "PersistentVolumeClaim qwen3-9b"),
        ("static-pv.yaml", "volumeName: qwen3-8b", "volumeName: qwen3-9b", "its volumeName"),
        ("static-pv.yaml", "namespace: default, name: qwen3-8b", "namespace: x, name: qwen3-8b", "its claimRef"),
        ("static-pv.yaml", "accessModes: [ReadOnlyMany]", "accessModes: [ReadWriteMany]", "not ReadOnlyMany"),
        ("static-pv.yaml", "Retain", "Delete", "is retained"),
        ("nim.yaml", "- name: ngc-secret", "- name: regcred", "Secret regcred"),
        ("nim-operator.yaml", "pullSecrets: [ngc-secret]", "pullSecrets: [nvidia]", "Secret nvidia"),
        ("nim-operator.yaml", "create: false", "create: true", "a claim of its own"),
        ("nim-operator.yaml", "NIM_CACHE_PATH", "NIM_CACHE", "NIM_CACHE_PATH to be written"),
        ("kserve-pvc.yaml", "pvc://kserve-qwen3-8b/", "pvc://qwen/", "PersistentVolumeClaim qwen:"),
        ("kserve-pvc.yaml", "pvc://kserve-qwen3-8b/", "hf://Qwen/Qwen3-8B", "is downloaded by an init container"),
        ("kserve-llm.yaml", "enabled: false", "enabled: true", "its storageInitializer downloads"),
        ("llmaz-service.yaml", "name: qwen3-8b, role: main", "name: qwen3, role: main", "OpenModel qwen3:"),
        ("llmaz-host.yaml", "modelName: qwen3-8b-host", "modelName: qwen", "OpenModel qwen:"),
        ("llmaz-host.yaml", "host:///run/manta/", "host:///models/", "no volume of Manta"),
    ],
)  # fmt: skip
def test_a_mistake_is_seen(name: str, old: str, new: str, said: str) -> None:
    found = errors(edited(name, old, new))
    assert any(said in error for error in found), found


def test_llmaz_service_without_the_annotation() -> None:
    example = EXAMPLES["llmaz-service.yaml"]
    documents = copy.deepcopy(example.documents)
    del documents[1]["metadata"]["annotations"]
    assert "Service qwen3-8b: llmaz adds its model-loader" in rules.errors(
        Example(example.path, example.text, documents)
    )


def test_a_key_that_is_there_twice_is_seen() -> None:
    with pytest.raises(yaml.YAMLError, match="twice"):
        edited("vllm.yaml", "  replicas: 1\n", "  replicas: 1\n  replicas: 2\n")


# The schemas of CRDs -----------------------------------------------------------------------------------------------------


def test_a_strict_schema_says_what_the_api_server_does() -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {
            "spec": {
                "type": "object",
                "required": ["port", "protocol"],
                "properties": {
                    "port": {"x-kubernetes-int-or-string": True, "anyOf": [{"type": "integer"}, {"type": "string"}]},
                    "protocol": {"type": "string", "default": "TCP"},
                    "size": {"type": "string", "nullable": True, "enum": ["s", "l"]},
                    "open": {"x-kubernetes-preserve-unknown-fields": True, "properties": {"n": {"type": "integer"}}},
                    "labels": {"type": "object", "additionalProperties": {"type": "string"}},
                    "empty": {"type": "object"},
                    "list": {
                        "type": "array",
                        "x-kubernetes-list-type": "map",
                        "x-kubernetes-list-map-keys": ["name"],
                        "items": {"$ref": "#/$defs/entry"},
                    },
                },
                "anyOf": [{"properties": {"port": {"type": "integer"}}}, {"required": ["size"]}],
            }
        },
        "$defs": {"entry": {"type": "object", "properties": {"name": {"type": "string"}}}},
    }
    validator = crds.validator(schema)

    def refused(**spec: Any) -> bool:
        return not validator.is_valid({"spec": {"port": 1} | spec})

    assert not refused()
    assert not refused(port="http", size=None)
    assert not refused(open={"n": 1, "x": 2}, labels={"a": "b"}, list=[{"name": "a"}, {"name": "b"}])
    assert refused(port=1.5)
    assert refused(size="m")
    assert refused(other=1)
    assert refused(open={"n": "1"})
    assert refused(labels={"a": 1})
    assert refused(empty={"a": 1})
    assert refused(list=[{"nam": "a"}])
    assert refused(list=[{"name": "a"}, {"name": "a"}])


def test_the_copies_say_what_is_said_twice_once() -> None:
    piece = {"type": "object", "properties": {name: {"type": "string"} for name in "abcdefghij"}}
    schema = {"type": "object", "properties": {"x": piece, "y": {"type": "array", "items": piece}}}
    shared = crds.shared(schema)
    assert list(shared["$defs"].values()) == [piece]
    assert (
        shared["properties"]["x"]
        == shared["properties"]["y"]["items"]
        == {"$ref": f"#/$defs/{next(iter(shared['$defs']))}"}
    )


# The pages ---------------------------------------------------------------------------------------------------------------

PAGES = sorted(snippets.PAGES.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_shows_the_example_as_it_is(page: Path) -> None:
    text = page.read_text()
    assert snippets.included(text) == text, "run: python -m tests.deploy.snippets"
    assert text.count("```yaml") == len(snippets.shown(text)) + text.count("<!-- not an example -->\n```yaml")
    for link in re.findall(r"\]\(([^)#:]+)[^)]*\)", text):
        assert (page.parent / link).exists(), f"{page.name} leads to {link}, which does not exist"


def test_every_example_has_its_page_and_names_it() -> None:
    for example in EXAMPLES.values():
        (named,) = set(re.findall(r"docs/engines/[\w-]+\.md", example.text))
        assert example.path in snippets.shown((ROOT / named).read_text())


def test_every_page_is_in_the_index() -> None:
    index = (snippets.PAGES / "README.md").read_text()
    for page in PAGES:
        assert page.name == "README.md" or f"]({page.name})" in index
    assert "docs/engines/README.md" in (ROOT / "README.md").read_text()
