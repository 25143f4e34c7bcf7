"""Independent clients against the hub: huggingface_hub's own functions, and transformers where installed."""

import hashlib
import importlib.util
from pathlib import Path

import pytest

from manta.testing.hub import HubProcess
from manta.testing.hub.standard import (
    DATASET,
    EMPTY,
    GATED,
    MANY,
    MANY_COUNT,
    MODEL,
    NAMES,
    OLD_NAME,
    PRIVATE,
    READER_TOKEN,
    SHARDED,
    STRANGER_TOKEN,
    XET,
)
from tests.testing.hub.conftest import Client


def _digests(folder: Path) -> dict[str, tuple[int, str]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*")
        if path.is_file()
    }


def _check_snapshot(hub: HubProcess, repo: str, folder: str, revision: str = "main") -> None:
    facts = hub.files(repo, revision)
    digests = _digests(Path(folder))
    assert set(digests) == set(facts.files)
    assert Path(folder).name == facts.commit
    for path, file in facts.files.items():
        size, sha256 = digests[path]
        assert size == file.size
        assert not file.sha256 or sha256 == file.sha256


@pytest.mark.parametrize("xet", [False, True])
@pytest.mark.parametrize("repo", [SHARDED, NAMES])
def test_snapshot_download(hub: HubProcess, client: Client, repo: str, xet: bool) -> None:
    folder = client(f"from huggingface_hub import snapshot_download\nresult = snapshot_download({repo!r})", xet=xet)
    _check_snapshot(hub, repo, folder)
    stats = hub.stats()
    assert stats.violations == []
    assert all(blob.repeated == 0 and blob.unique == blob.size for blob in stats.blobs.values())


def test_snapshots_of_several_revisions_share_blobs(hub: HubProcess, client: Client) -> None:
    code = f"""
from huggingface_hub import snapshot_download
result = [snapshot_download({MODEL!r}, revision=name) for name in ("main", "v1.0", "refs/pr/1")]
"""
    folders = client(code)
    for folder, commit in zip(folders, ("second", "first", "proposal"), strict=True):
        _check_snapshot(hub, MODEL, folder, commit)
    assert hub.blob_traffic(MODEL, "model.safetensors").repeated == 0


def test_snapshot_of_a_renamed_repo_and_of_an_empty_one(hub: HubProcess, client: Client) -> None:
    code = f"""
from huggingface_hub import snapshot_download
import os
result = [sorted(os.listdir(snapshot_download({OLD_NAME!r}))), snapshot_download({EMPTY!r})]
"""
    files, _ = client(code)
    assert files == ["config.json", "model.safetensors"]


def test_snapshot_of_what_needs_a_token(hub: HubProcess, client: Client) -> None:
    code = f"""
from huggingface_hub import snapshot_download
result = [snapshot_download(repo) for repo in ({GATED!r}, {PRIVATE!r})]
"""
    for repo, folder in zip((GATED, PRIVATE), client(code, token=READER_TOKEN), strict=True):
        _check_snapshot(hub, repo, folder)
    assert hub.stats().violations == []


def test_dataset(hub: HubProcess, client: Client) -> None:
    code = f"""
from huggingface_hub import hf_hub_download
result = hf_hub_download({DATASET!r}, "data/train.parquet", repo_type="dataset")
"""
    path = Path(client(code))
    facts = hub.files(DATASET, repo_type="dataset").files["data/train.parquet"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == facts.sha256


def test_api_calls(hub: HubProcess, client: Client) -> None:
    code = f"""
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
api = HfApi()
info = api.model_info({MODEL!r}, files_metadata=True)
refs = api.list_repo_refs({MODEL!r}, include_pull_requests=True)
tree = list(api.list_repo_tree({MODEL!r}, recursive=True, expand=True))
paths = api.get_paths_info({MODEL!r}, ["config.json", "tokenizer", "missing"], expand=True)
big = get_hf_file_metadata(hf_hub_url({MODEL!r}, "model.safetensors"))
small = get_hf_file_metadata(hf_hub_url({MODEL!r}, "config.json", revision="refs/pr/1"))
result = dict(
    sha=info.sha,
    sizes={{s.rfilename: s.size for s in info.siblings}},
    refs=[[ref.ref for ref in group] for group in (refs.branches, refs.tags, refs.converts, refs.pull_requests)],
    tree=[entry.path for entry in tree],
    paths=[entry.path for entry in paths],
    commits=[commit.commit_id for commit in api.list_repo_commits({MODEL!r})],
    models=sorted(model.id for model in api.list_models(author="manta")),
    big=[big.commit_hash, big.etag, big.size, big.location],
    small=[small.commit_hash, small.etag, small.size],
    exists=[api.file_exists({MODEL!r}, "config.json"), api.file_exists({MODEL!r}, "nope"),
            api.revision_exists({MODEL!r}, "v1.0"), api.revision_exists({MODEL!r}, "v9")],
)
"""
    result = client(code)
    facts = hub.files(MODEL)
    assert result["sha"] == facts.commit
    assert result["sizes"] == {path: file.size for path, file in facts.files.items()}
    assert [len(group) for group in result["refs"]] == [3, 1, 1, 1]
    assert result["tree"] == sorted([*facts.files, "tokenizer"])
    assert result["paths"] == ["config.json", "tokenizer"]
    assert result["commits"][0] == facts.commit
    assert MODEL in result["models"]
    weights = facts.files["model.safetensors"]
    assert result["big"][:3] == [facts.commit, weights.sha256, weights.size]
    assert result["big"][3].startswith(hub.cdn_endpoint)
    proposal = hub.files(MODEL, "proposal")
    config = proposal.files["config.json"]
    assert result["small"] == [proposal.commit, config.oid, config.size]
    assert result["exists"] == [True, False, True, False]


def test_a_long_tree(hub: HubProcess, client: Client) -> None:
    code = f"""
from huggingface_hub import HfApi
result = sum(1 for entry in HfApi().list_repo_tree({MANY!r}, recursive=True) if hasattr(entry, "size"))
"""
    assert client(code) == MANY_COUNT
    assert hub.stats().kinds["tree"] == 11


def test_file_system(hub: HubProcess, client: Client) -> None:
    code = f"""
import hashlib
from huggingface_hub import HfFileSystem
fs = HfFileSystem()
with fs.open({(NAMES + "/ünïcödé/poids été.bin")!r}) as file:
    file.seek(123_456)
    middle = hashlib.sha256(file.read(1000)).hexdigest()
result = dict(
    ls=fs.ls({MODEL!r}, detail=False),
    find=len(fs.find({MANY!r})),
    text=fs.read_text({(MODEL + "@v1.0/README.md")!r}),
    middle=middle,
    whole=hashlib.sha256(fs.cat({(MODEL + "/model.safetensors")!r})).hexdigest(),
)
"""
    result = client(code)
    assert f"{MODEL}/tokenizer" in result["ls"]
    assert result["find"] == MANY_COUNT
    assert result["text"].startswith("---\nlicense")
    assert result["whole"] == hub.files(MODEL).files["model.safetensors"].sha256
    from manta.testing.hub import GeneratedContent

    assert result["middle"] == hashlib.sha256(GeneratedContent("names", 300_000).read(123_456, 124_456)).hexdigest()
    assert hub.stats().violations == []


def test_errors_arrive_as_the_library_names_them(client: Client) -> None:
    code = f"""
from huggingface_hub import hf_hub_download, HfApi
def name(*args, **kwargs):
    try:
        hf_hub_download(*args, **kwargs)
    except Exception as error:
        return type(error).__name__
result = [
    name({MODEL!r}, "missing.json"),
    name({MODEL!r}, "config.json", revision="missing"),
    name("manta/missing", "config.json"),
    name({PRIVATE!r}, "config.json"),
    name({GATED!r}, "config.json"),
    name({GATED!r}, "config.json", token=False),
]
"""
    assert client(code, token=STRANGER_TOKEN) == [
        "RemoteEntryNotFoundError",
        "RevisionNotFoundError",
        "RepositoryNotFoundError",
        "RepositoryNotFoundError",
        "GatedRepoError",
        "GatedRepoError",
    ]


def test_xet_repos_download_over_http(hub: HubProcess, client: Client) -> None:
    folder = client(f"from huggingface_hub import snapshot_download\nresult = snapshot_download({XET!r})", xet=False)
    _check_snapshot(hub, XET, folder)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_reads_a_configuration(client: Client) -> None:
    code = f"""
from transformers import AutoConfig
result = AutoConfig.from_pretrained({MODEL!r}).hidden_size
"""
    assert client(code) == 32
