"""What the examples run, on a real mount: the prefetch Job's command, the hub-cache view's environment, and a path below mountDir."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from manta.testing.hub import HubProcess
from manta.testing.hub.standard import MODEL, SHARDED, standard_spec
from tests.deploy.manifests import EXAMPLES, parse, pods
from tests.mount.node import Node, needs_fuse, python, run

pytestmark = [pytest.mark.fuse, pytest.mark.skipif(bool(needs_fuse()), reason=needs_fuse())]

BY_ID = """
import json, sys
from huggingface_hub import snapshot_download
from transformers import AutoConfig
config = AutoConfig.from_pretrained(sys.argv[1])
print(json.dumps([type(config).__name__, snapshot_download(sys.argv[1], allow_patterns=["*.safetensors"])]))
"""
"""What an engine does with an id: the configuration first, then the weights."""


@pytest.fixture(scope="module")
def hub() -> Iterator[HubProcess]:
    with HubProcess(standard_spec()) as hub:
        yield hub


@pytest.fixture
def node(hub: HubProcess) -> Iterator[Node]:
    with Node(hub.endpoint) as node:
        yield node


def container(name: str) -> dict[str, Any]:
    (pod,) = [pod for document in parse((EXAMPLES / name).read_text()) for pod in pods(document)]
    (only,) = pod.spec["containers"]
    return dict(only)


def prefetch(directory: Path | str) -> subprocess.CompletedProcess[str]:
    """The Job's command, with bash in the place of busybox's shell, as the Job's user."""
    shell, *arguments = container("prefetch-job.yaml")["command"]
    assert shell == "sh"
    command = ["bash", *(argument.replace("/models", str(directory)) for argument in arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, cwd="/", user=65534, group=65534,
        extra_groups=[], env={"PATH": os.environ["PATH"]},
    )  # fmt: skip


def test_the_prefetch_job_ends_when_everything_is_cached(hub: HubProcess, node: Node) -> None:
    directory = node.mount(SHARDED)
    node.path.chmod(0o755)  # the Job's user is not ours
    done = prefetch(directory)
    size = sum(file.size for file in hub.files(SHARDED).files.values())
    assert (done.returncode, done.stdout) == (0, f"{size} bytes are in the cache of this node.\n"), done.stderr
    (shown,) = node.status()["mounts"]
    assert (shown["cached"], shown["size"]) == (size, size)


def test_the_prefetch_job_fails_where_a_file_cannot_be_read() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to the Job's user
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "right").write_text("right")
        (folder / "wrong").write_text("wrong")
        (folder / "wrong").chmod(0)
        done = prefetch(folder)
    assert done.returncode != 0
    assert "in the cache" not in done.stdout


def test_the_hub_cache_view_answers_by_id(hub: HubProcess, node: Node) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    directory = node.mount(SHARDED, "--view", "hub-cache")
    server = container("hub-cache.yaml")
    environment = {variable["name"]: variable["value"] for variable in server["env"]}
    assert environment["HF_HUB_CACHE"] in {mount["mountPath"] for mount in server["volumeMounts"]}
    environment |= {"HF_HUB_CACHE": str(directory), "HOME": str(node.path / "home"), "PATH": os.environ["PATH"]}
    kind, folder = python(BY_ID, SHARDED, env=environment)
    assert kind == "BertConfig"
    assert folder == f"{directory}/models--manta--sharded/snapshots/{hub.files(SHARDED).commit}"


def test_a_model_can_be_mounted_below_the_runtime_directory(node: Node) -> None:
    """As the page of llmaz says to do: what is below mountDir is on the node, where a hostPath finds it."""
    directory = node.path / "run/models/tiny"
    directory.parent.mkdir(parents=True)
    node.manta("mount", MODEL, str(directory))
    assert "config.json" in run('ls "$1"', directory)
    node.manta("umount", str(directory))
