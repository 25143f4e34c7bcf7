"""A mounted repo as programs see it: names, sizes, bytes, attributes, and that nothing can be written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from manta.testing.hub import HubProcess
from manta.testing.hub.standard import DATASET, MANY, MANY_COUNT, MODEL, NAMES, RENAMED, SHARDED
from tests.mount.conftest import BIG, BIG_FILE, BIG_SIZE
from tests.mount.node import Node, python, run

DIGESTS = """
import hashlib, json, os, sys
found = {}
for folder, _, names in os.walk(sys.argv[1]):
    for name in names:
        path = os.path.join(folder, name)
        data = open(path, "rb").read()
        git = hashlib.sha1(b"blob %d\\0" % len(data) + data).hexdigest()
        found[os.path.relpath(path, sys.argv[1])] = [os.stat(path).st_size, hashlib.sha256(data).hexdigest(), git]
print(json.dumps(found))
"""


def digests(directory: Path, hub_has: dict[str, list[object]]) -> dict[str, list[object]]:
    """Path -> [size, digest] as a program sees them, with the kind of digest that the hub has of each."""
    found = python(DIGESTS, directory)
    return {
        path: [size, sha256 if len(str(hub_has.get(path, ["", ""])[1])) == 64 else git]
        for path, (size, sha256, git) in found.items()
    }


def expected(hub: HubProcess, repo: str, revision: str = "main", repo_type: str = "model") -> dict[str, list[object]]:
    """Path -> [size, digest] as the hub has them: sha256 for LFS files, git's sha1 for the others."""
    files = hub.files(repo, revision, repo_type=repo_type).files  # type: ignore[arg-type]
    return {path: [file.size, file.sha256 or file.oid] for path, file in files.items()}


def check(directory: Path, hub_has: dict[str, list[object]]) -> None:
    assert digests(directory, hub_has) == hub_has


@pytest.mark.parametrize("repo", [MODEL, NAMES, SHARDED, RENAMED])
def test_every_file_has_the_hubs_bytes(hub: HubProcess, node: Node, repo: str) -> None:
    """Unicode, spaces, deep folders, empty files, shards."""
    directory = node.mount(repo)
    check(directory, expected(hub, repo))


def test_a_dataset_and_a_subfolder(hub: HubProcess, node: Node) -> None:
    check(node.mount(f"datasets/{DATASET}"), expected(hub, DATASET, repo_type="dataset"))
    all_files = expected(hub, NAMES).items()
    check(node.mount(f"hf://{NAMES}/a/b"), {p.removeprefix("a/b/"): f for p, f in all_files if p.startswith("a/b/")})


@pytest.mark.parametrize("revision", ["main", "dev", "v1.0", "refs/pr/1", "feature%2Fslash"])
def test_a_revision_may_be_a_branch_a_tag_or_a_pull_request(hub: HubProcess, node: Node, revision: str) -> None:
    directory = node.mount(f"{MODEL}@{revision}")
    check(directory, expected(hub, MODEL, revision.replace("%2F", "/")))
    [mount] = node.status()["mounts"]
    assert mount["commit"] == hub.files(MODEL, revision.replace("%2F", "/")).commit
    again = node.mount(f"{MODEL}@{mount['commit']}")
    check(again, expected(hub, MODEL, revision.replace("%2F", "/")))


def test_more_than_ten_thousand_entries(node: Node) -> None:
    directory = node.mount(MANY)
    listed = run('find "$1" -type f | wc -l; ls -f "$1/shelf-3" | wc -l', directory).split()
    assert listed == [str(MANY_COUNT), str(MANY_COUNT // 7)]
    assert run('cat "$1/shelf-3/part-10489.json"; ls "$1/shelf-3" | sort | uniq -d', directory) == '{"at": 10489}'


def test_stat_statfs_and_inodes_are_stable(node: Node) -> None:
    first, second = node.mount(MODEL), node.mount(f"{MODEL}@v1.0")
    show = 'cd "$1" && stat -c "%n %i %s %f %h" config.json tokenizer tokenizer/vocab.txt && stat -f -c "%T %a %f" .'
    shown = run(show, first)
    assert "config.json" in shown
    assert " 81a4 " not in shown  # 0644: nothing is writable
    assert shown.splitlines()[0].split()[3] == "8124"
    assert shown.splitlines()[-1].split()[1:] == ["0", "0"]
    # The same blob is the same inode under another commit.
    assert run('stat -c %i "$1/config.json"', first) == run('stat -c %i "$1/config.json"', second)
    node.unmount_all()
    assert run(show, node.mount(MODEL)) == shown


@pytest.mark.parametrize(
    "command",
    [
        'touch "$1/new"',
        'echo x > "$1/config.json"',
        'echo x >> "$1/config.json"',
        'mkdir "$1/folder"',
        'rm "$1/config.json"',
        'mv "$1/config.json" "$1/other"',
        'ln -s x "$1/link"',
        'chmod 600 "$1/config.json"',
        'truncate -s 0 "$1/config.json"',
        "python3 -c \"import os, sys; os.setxattr(sys.argv[1], 'user.x', b'1')\" \"$1/config.json\"",
        'python3 -c "import os, sys; os.utime(sys.argv[1])" "$1/config.json"',
    ],
)
def test_nothing_can_be_written(shared_mount: os.PathLike[str], command: str) -> None:
    assert "Read-only file system" in run(command, shared_mount, code=1)


def test_extended_attributes_tell_blob_state_and_commit(hub: HubProcess, node: Node) -> None:
    directory = node.mount(BIG)
    show = """
import json, os, sys
def attributes(path):
    return {name: os.getxattr(path, name).decode() for name in os.listxattr(path)}
before = attributes(sys.argv[1] + "/weights.bin")
with open(sys.argv[1] + "/weights.bin", "rb") as f:
    while f.read(1 << 20):
        pass
print(json.dumps([before, attributes(sys.argv[1] + "/weights.bin"), attributes(sys.argv[1])]))
"""
    before, after, folder = python(show, directory)
    facts = hub.files(BIG)
    blob = f"sha256-{facts.files[BIG_FILE].sha256}"
    assert before == {"user.manta.blob": blob, "user.manta.state": "absent", "user.manta.cached_bytes": "0"}
    assert after["user.manta.cached_bytes"] == str(BIG_SIZE)
    assert after["user.manta.state"] in {"complete", "sealed"}
    assert folder == {
        "user.manta.repo": BIG,
        "user.manta.commit": facts.commit,
        "user.manta.cached_bytes": str(BIG_SIZE),
    }


def test_absent_names_are_absent_and_cost_the_hub_nothing(hub: HubProcess, node: Node) -> None:
    directory = node.mount(MODEL)
    before = sum(hub.stats().kinds.values())
    assert "No such file" in run('for i in 1 2 3; do cat "$1/adapter_config.json"; done', directory, code=1)
    assert sum(hub.stats().kinds.values()) == before


def test_the_whole_hub_by_name(hub: HubProcess, node: Node) -> None:
    directory = node.mount()
    check(directory / MODEL, expected(hub, MODEL))
    check(directory / f"{MODEL}@v1.0", expected(hub, MODEL, "v1.0"))
    check(directory / f"{MODEL}@refs%2Fpr%2F1", expected(hub, MODEL, "refs/pr/1"))
    check(directory / "datasets" / DATASET, expected(hub, DATASET, repo_type="dataset"))
    assert run('cd "$1" && ls && ls manta', directory).split() == [
        "datasets", "manta", "spaces", "tiny", "tiny@refs%2Fpr%2F1", "tiny@v1.0",
    ]  # fmt: skip
    assert "No such file" in run('ls "$1/manta/nothing-here"', directory, code=2)


def test_mmap_pread_and_copy(hub: HubProcess, node: Node) -> None:
    directory = node.mount(BIG)
    script = """
import hashlib, json, mmap, os, random, sys
with open(sys.argv[1], "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as view:
    tail = view[-1000:]
    places = list(range(0, len(view), 1 << 20))
    random.Random(1).shuffle(places)
    pieces = {at: os.pread(f.fileno(), 1 << 20, at) for at in places}
    beyond = os.pread(f.fileno(), 100, len(view) + 5)
    whole = hashlib.sha256(b"".join(pieces[at] for at in sorted(places)))
    end = pieces[max(places) - (1 << 20)] + pieces[max(places)]
    print(json.dumps([whole.hexdigest(), hashlib.sha256(view).hexdigest(), end[-1000:] == tail, len(beyond)]))
"""
    digest = hub.files(BIG).files[BIG_FILE].sha256
    assert python(script, directory / BIG_FILE) == [digest, digest, True, 0]
    copied = run('cp "$1/$3" "$2" && sha256sum "$2"', directory, node.path / "copy", BIG_FILE)
    assert copied.split()[0] == digest
    assert hub.blob_traffic(BIG, BIG_FILE).repeated == 0


def test_a_mount_freezes_its_commit(hub: HubProcess, node: Node) -> None:
    first = node.mount(MODEL)
    before = expected(hub, MODEL)
    hub.move_branch(MODEL, "dev")
    after = expected(hub, MODEL)
    assert before != after
    check(first, before)
    check(node.mount(MODEL), after)
    check(first, before)


def test_tools_of_the_trade(node: Node) -> None:
    """find, tar, grep, du and rsync-like copying see an ordinary directory."""
    directory = node.mount(NAMES)
    assert run('tar -C "$1" -cf - . | tar -tf - | wc -l', directory).strip() != "0"
    assert run('cp -r "$1" "$2" && diff -r "$1" "$2" && echo same', directory, node.path / "copy").strip() == "same"
    assert run('grep -rl "content of a.txt" "$1" | wc -l', directory).strip() == "1"
