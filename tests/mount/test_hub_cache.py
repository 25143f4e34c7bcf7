"""`--view hub-cache`: unmodified Hugging Face libraries read a mount through HF_HUB_CACHE, online and offline."""

from __future__ import annotations

from pathlib import Path

import pytest

from manta.testing.hub import HubProcess
from manta.testing.hub.standard import MODEL, SHARDED
from tests.mount.node import Node, python, run

LIBRARY = """
import json, sys
from huggingface_hub import hf_hub_download, scan_cache_dir, snapshot_download, try_to_load_from_cache
folder = snapshot_download(sys.argv[1])
config = open(hf_hub_download(sys.argv[1], "config.json")).read()
absent = try_to_load_from_cache(sys.argv[1], "nothing_here.json")
cache = scan_cache_dir()
print(json.dumps([folder, len(config), repr(absent), [str(w) for w in cache.warnings], [r.repo_id for r in cache.repos]]))
"""

TRANSFORMERS = """
import json, sys
from transformers import AutoConfig
print(json.dumps(AutoConfig.from_pretrained(sys.argv[1]).model_type))
"""

SAFETENSORS = """
import json, pathlib, sys
from safetensors import safe_open
total = 0
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.safetensors")):
    with safe_open(path, "numpy") as tensors:
        total += len(list(tensors.keys()))
print(json.dumps(total))
"""


def client(hub: HubProcess, node: Node, directory: Path, *, offline: bool) -> dict[str, str]:
    """The environment of a program that uses the mount as its HF cache."""
    environment = hub.environment(node.path / "home/hf") | {"HF_HUB_CACHE": str(directory)}
    return environment | ({"HF_HUB_OFFLINE": "1"} if offline else {})


@pytest.mark.parametrize("offline", [False, True], ids=["online", "offline"])
def test_huggingface_hub_finds_everything(hub: HubProcess, node: Node, offline: bool) -> None:
    directory = node.mount(MODEL, "--view", "hub-cache")
    folder, size, absent, warnings, repos = python(LIBRARY, MODEL, env=client(hub, node, directory, offline=offline))
    commit = hub.files(MODEL).commit
    assert folder == f"{directory}/models--{MODEL.replace('/', '--')}/snapshots/{commit}"
    assert size > 0
    assert "object object" in absent  # huggingface_hub's mark for a name that is known not to exist
    assert (warnings, repos) == ([], [MODEL])


@pytest.mark.parametrize("offline", [False, True], ids=["online", "offline"])
def test_transformers_and_safetensors_load(hub: HubProcess, node: Node, offline: bool) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    directory = node.mount("--view", "hub-cache")
    environment = client(hub, node, directory, offline=offline)
    assert python(TRANSFORMERS, SHARDED, env=environment) == "bert"
    commit = hub.files(SHARDED).commit
    assert python(SAFETENSORS, directory / f"models--manta--sharded/snapshots/{commit}", env=environment) == 12


def test_an_online_client_survives_a_moved_branch(hub: HubProcess, node: Node) -> None:
    directory = node.mount(f"{MODEL}@main", "--view", "hub-cache")
    environment = client(hub, node, directory, offline=False)
    before = python(LIBRARY, MODEL, env=environment)[0]
    hub.move_branch(MODEL, "dev")
    # What a client sees of the new commit it sees as soon as it knows it.
    commit = hub.files(MODEL).commit
    repo = directory / "models--manta--tiny"
    assert "config.json" in run('ls "$1"', repo / "snapshots" / commit)
    assert before.rsplit("/", 1)[1] in run('ls "$1"', repo / "snapshots")


def test_the_layout_is_the_one_of_the_libraries(hub: HubProcess, node: Node) -> None:
    directory = node.mount(f"{MODEL}@v1.0", "--view", "hub-cache")
    repo, commit = directory / "models--manta--tiny", hub.files(MODEL, "v1.0").commit
    assert run('cat "$1/refs/v1.0"; echo; cat "$1/refs/refs/pr/1"', repo).split() == [
        commit,
        hub.files(MODEL, "refs/pr/1").commit,
    ]
    etag = hub.files(MODEL, "v1.0").files["model.safetensors"].sha256
    assert run('readlink "$1"', repo / f"snapshots/{commit}/model.safetensors").strip() == f"../../blobs/{etag}"
    assert run('readlink "$1"', repo / f"snapshots/{commit}/tokenizer/vocab.txt").startswith("../../../blobs/")
    assert run('cat "$1" | wc -c', repo / f".no_exist/{commit}/adapter_config.json").strip() == "0"
    assert "No such file" in run('cat "$1"', repo / f".no_exist/{commit}/config.json", code=1)
    assert '"format_version": 1' in run('cat "$1"', repo / f"trees/{commit}.json")
