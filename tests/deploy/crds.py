"""The schemas of the custom resources in deploy/examples, as the API server reads them: strictly. Here and only here.

`crds/` has the kinds that the examples use, each in the one version that they use, copied from the projects' CustomResourceDefinitions
without descriptions and with what they say twice said once (`$defs`); 9 MB become 0.2. A newer copy, from a folder of CRDs:

    python -m tests.deploy.crds FOLDER

A schema of a CRD is *structural*: every field is declared once, and what is not declared is dropped by the API server, silently. Here it is
an error, unless the schema says x-kubernetes-preserve-unknown-fields. What cannot be checked offline is x-kubernetes-validations (CEL), and
what the operators' own webhooks ask for.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

FOLDER = Path(__file__).parent / "crds"

COPIED = (
    ("apps.nvidia.com", "NIMService", "v1alpha1"),
    ("inference.llmaz.io", "Playground", "v1alpha1"),
    ("inference.llmaz.io", "Service", "v1alpha1"),
    ("kaito.sh", "Workspace", "v1beta1"),
    ("leaderworkerset.x-k8s.io", "LeaderWorkerSet", "v1"),
    ("llmaz.io", "OpenModel", "v1alpha1"),
    ("ray.io", "RayService", "v1"),
    ("serving.kserve.io", "InferenceService", "v1beta1"),
    ("serving.kserve.io", "LLMInferenceService", "v1alpha2"),
)
"""Group, kind and version."""

SHARED_CHARACTERS_MIN = 200
"""Of a piece that is said twice: a reference to it has 20."""

PRESERVE = "x-kubernetes-preserve-unknown-fields"
INT_OR_STRING = "x-kubernetes-int-or-string"
LIST_TYPE = "x-kubernetes-list-type"
LIST_KEYS = "x-kubernetes-list-map-keys"
EMBEDDED = "x-kubernetes-embedded-resource"


def path_of(group: str, kind: str, version: str) -> Path:
    return FOLDER / f"{group}_{kind.lower()}_{version}.json"


def find(document: dict[str, Any]) -> Path | None:
    """Where the schema of this object's kind is; None where it is not one of the copied."""
    group, _, version = document["apiVersion"].rpartition("/")
    path = path_of(group, document["kind"], version)
    return path if path.exists() else None


def errors(document: dict[str, Any], path: Path) -> Iterator[str]:
    """What the API server would refuse or drop, a sentence each. The metadata are not looked at: their schema is Kubernetes' own."""
    body = {key: value for key, value in document.items() if key != "metadata"}
    for error in _validator(path).iter_errors(body):
        yield sentence(error, document["kind"])


def sentence(error: jsonschema.ValidationError, kind: str) -> str:
    """Where, and what is wrong there."""
    deepest = jsonschema.exceptions.best_match([error])
    return f"{'.'.join(map(str, deepest.absolute_path)) or kind}: {deepest.message[:400]}"


@functools.cache
def _validator(path: Path) -> Any:
    return validator(json.loads(path.read_text()))


# From a CRD's schema to a strict one -------------------------------------------------------------------------------------


def validator(schema: dict[str, Any]) -> Any:
    """Of a schema as a CRD has it."""
    kinds = jsonschema.validators.extend(jsonschema.Draft202012Validator, {LIST_TYPE: _no_doubles})
    return kinds(strict(schema))


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """The structural `schema` with every object closed, and with what `nullable` and the like mean said in JSON Schema's words."""
    made = _structural(schema)
    made["$defs"] = {name: _structural(piece) for name, piece in schema.get("$defs", {}).items()}
    made["properties"] = {key: value for key, value in made["properties"].items() if key != "metadata"}
    return made


def _structural(schema: dict[str, Any]) -> dict[str, Any]:
    # Only these three nest structure; anyOf, not and the like constrain values and declare no fields: they stay as they are.
    made = dict(schema)
    if "properties" in schema:
        made["properties"] = {key: _structural(value) for key, value in schema["properties"].items()}
    if isinstance(schema.get("items"), dict):
        made["items"] = _structural(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        made["additionalProperties"] = _structural(schema["additionalProperties"])
    elif schema.get("type") == "object" and not schema.get(PRESERVE) and "additionalProperties" not in schema:
        made["additionalProperties"] = False
        if schema.get(EMBEDDED):
            made["properties"] = {"apiVersion": {}, "kind": {}, "metadata": {}} | made.get("properties", {})
    if schema.get(INT_OR_STRING):
        made["type"] = ["integer", "string"]
    if schema.get("nullable") and "type" in made:
        types = made["type"]
        made["type"] = [*([types] if isinstance(types, str) else types), "null"]
        if "enum" in made:
            made["enum"] = [*made["enum"], None]
    if "required" in schema:
        # A default is put in before the schema is asked.
        declared = schema.get("properties", {})
        made["required"] = [name for name in schema["required"] if "default" not in declared.get(name, {})]
    return made


def _no_doubles(_: Any, kind: str, instance: Any, schema: dict[str, Any]) -> Iterator[jsonschema.ValidationError]:
    """A list that is a map, or a set, has no two elements of one key."""
    if kind not in {"map", "set"} or not isinstance(instance, list):
        return
    keys = [
        tuple(str(element.get(key)) for key in schema.get(LIST_KEYS, [])) if isinstance(element, dict) else element
        for element in instance
    ]
    for key, times in Counter(keys).items():
        if times > 1:
            yield jsonschema.ValidationError(f"{key!r} is there {times} times")


# The copies --------------------------------------------------------------------------------------------------------------


def copy(folder: Path) -> None:
    """Writes `crds/` from the CRDs in `folder`."""
    definitions = [
        document for path in sorted(folder.glob("*.yaml")) for document in yaml.safe_load_all(path.read_text())
    ]
    for group, kind, version in COPIED:
        (spec,) = (
            document["spec"]
            for document in definitions
            if (document["spec"]["group"], document["spec"]["names"]["kind"]) == (group, kind)
        )
        (served,) = (entry for entry in spec["versions"] if entry["name"] == version)
        schema = shared(_bare(served["schema"]["openAPIV3Schema"]))
        # A definition a line, so that a newer copy is a diff that can be read.
        pieces = ",\n".join(f"{json.dumps(name)}:{_text(piece)}" for name, piece in schema.pop("$defs").items())
        path_of(group, kind, version).write_text(f'{_text(schema)[:-1]},"$defs":{{\n{pieces}\n}}}}\n')


def _bare(schema: Any, *, named: bool = False) -> Any:
    """Without descriptions, status and CEL rules. `named`: these are the names of fields, of which one may be "description"."""
    if isinstance(schema, list):
        return [_bare(element) for element in schema]
    if not isinstance(schema, dict):
        return schema
    dropped = set() if named else {"description", "x-kubernetes-validations"}
    return {
        key: {"type": "object", PRESERVE: True} if named and key == "status" and "spec" in schema
        else _bare(value, named=key == "properties" and not named)
        for key, value in schema.items()
        if key not in dropped
    }  # fmt: skip


def shared(schema: dict[str, Any]) -> dict[str, Any]:
    """The same with each large piece that is there more than once in `$defs`."""
    times: Counter[str] = Counter()

    def count(piece: dict[str, Any]) -> None:
        text = _text(piece)
        times[text] += 1
        if times[text] == 1:
            for _, child in _children(piece):
                count(child)

    names: dict[str, str] = {}
    pieces: dict[str, dict[str, Any]] = {}

    def share(piece: dict[str, Any]) -> dict[str, Any]:
        made = dict(piece)
        for where, child in _children(piece):
            text = _text(child)
            # `strict` looks at the defaults of fields where they are declared.
            if times[text] > 1 and len(text) >= SHARED_CHARACTERS_MIN and "default" not in child:
                if text not in names:
                    names[text] = f"{re.sub(r'[^A-Za-z]', '', where[-1])}{len(names)}"
                    pieces[names[text]] = share(child)
                replaced: dict[str, Any] = {"$ref": f"#/$defs/{names[text]}"}
            else:
                replaced = share(child)
            if len(where) == 1:
                made[where[0]] = replaced
            else:
                made[where[0]] = made[where[0]] | {where[1]: replaced}
        return made

    count(schema)
    made = share(schema)
    return made | {"$defs": dict(sorted(pieces.items()))}


def _children(piece: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """The schemas right below, where structure nests."""
    for name, child in piece.get("properties", {}).items():
        yield ("properties", name), child
    for key in ("items", "additionalProperties"):
        if isinstance(piece.get(key), dict):
            yield (key,), piece[key]


def _text(piece: dict[str, Any]) -> str:
    return json.dumps(piece, separators=(",", ":"))


if __name__ == "__main__":
    copy(Path(sys.argv[1]))
