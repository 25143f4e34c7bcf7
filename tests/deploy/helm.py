"""The chart, rendered and linted by a real helm, for tests and for what is made of it. Here and only here.

`python -m tests.deploy.helm` writes what is made of the chart: deploy/manifests/manta.yaml, and the table of values in docs/kubernetes.md.
tests/deploy/test_made.py fails where they are not current.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy/charts/manta"
MANIFEST = ROOT / "deploy/manifests/manta.yaml"
MANIFEST_VALUES = ROOT / "deploy/manifests/values.yaml"
PAGE = ROOT / "docs/kubernetes.md"
PROGRAM = Path(sys.prefix) / "bin/helm"
NAMESPACE = "manta"
TIMEOUT_S = 60.0

_BEGIN, _END = "<!-- values: made by `python -m tests.deploy.helm` -->", "<!-- values end -->"
_HEADER = """\
# Made of deploy/charts/manta and values.yaml beside this file by `python -m tests.deploy.helm`: do not edit. kustomization.yaml is
# where the image and the rest are adapted.
"""


class Value(NamedTuple):
    """One value of the chart: `name` is its path with dots."""

    name: str
    default: Any
    meaning: str


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """helm, which sees no configuration, plugins or cluster of this machine's user."""
    env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "KUBECONFIG": "/dev/null"}
    for folder in ("CACHE", "CONFIG", "DATA"):
        env[f"HELM_{folder}_HOME"] = "/nonexistent"
    return subprocess.run(
        [PROGRAM, *arguments], capture_output=True, text=True, check=False, timeout=TIMEOUT_S, env=env
    )


def lint(values: Path) -> subprocess.CompletedProcess[str]:
    return run("lint", str(CHART), "--strict", "--values", str(values))


def template(values: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return run("template", "manta", str(CHART), "--namespace", NAMESPACE, "--values", str(values), *options)


@cache
def objects(values: Path) -> list[dict[str, Any]]:
    """What the chart makes with `values`. Raises RuntimeError with what helm says."""
    done = template(values)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def values_of_chart() -> list[Value]:
    """Each value with the comment above it. What holds a map or a list as its default counts as one value where the schema does not name
    its fields."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    leaves = set(leaves_of(schema))
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    found: list[Value] = []
    path: list[tuple[int, str]] = []
    comment: list[str] = []
    meanings: dict[str, str] = {}
    for line in (CHART / "values.yaml").read_text().splitlines():
        if match := re.match(r"(\s*)# (.*)", line):
            comment.append(match[2])
        elif match := re.match(r"(\s*)([A-Za-z]\w*):", line):
            path = [(depth, name) for depth, name in path if depth < len(match[1])] + [(len(match[1]), match[2])]
            meanings[".".join(name for _, name in path)] = " ".join(comment)
            comment = []
        else:
            comment = []
    for name, meaning in meanings.items():
        if name in leaves:
            value: Any = defaults
            for part in name.split("."):
                value = value[part]
            found.append(Value(name, value, meaning))
    return found


def leaves_of(schema: dict[str, Any], above: str = "") -> Iterator[str]:
    """The paths of all values that the schema knows, but for `settings`, whose fields are Manta's, and for `global`, which is helm's."""
    for name, part in schema["properties"].items():
        path = f"{above}{name}"
        if path == "global":
            continue
        if "properties" in part and path not in {"settings", "affinity", "updateStrategy"}:
            yield from leaves_of(part, f"{path}.")
        else:
            yield path


def plain() -> str:
    """The plain manifests. What only helm would ask for is left out."""
    done = template(MANIFEST_VALUES)
    if done.returncode:
        raise RuntimeError(done.stderr)
    lines = [
        line
        for line in done.stdout.splitlines()
        if not re.match(r"\s+(helm\.sh/chart|app\.kubernetes\.io/managed-by):|# Source:", line)
        and not line.startswith("# Source:")
    ]
    return f"{_HEADER}" + "\n".join(lines) + "\n"


def table() -> str:
    rows = ["| value | default | |", "|---|---|---|"]
    for value in values_of_chart():
        meaning = value.meaning.replace("|", "\\|").replace("<", "&lt;")
        rows.append(f"| `{value.name}` | `{json.dumps(value.default)}` | {meaning} |")
    return "\n".join(rows)


def page() -> str:
    """docs/kubernetes.md with the table of values as it should be."""
    before, found, rest = PAGE.read_text().partition(_BEGIN)
    _, ended, after = rest.partition(_END)
    if not found or not ended:
        raise RuntimeError(f"{PAGE} has no place for the table of values: {_BEGIN} and {_END} are missing.")
    return f"{before}{_BEGIN}\n\n{table()}\n\n{_END}{after}"


if __name__ == "__main__":
    MANIFEST.write_text(plain())
    PAGE.write_text(page())
