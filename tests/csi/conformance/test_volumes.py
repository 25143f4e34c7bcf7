"""Publish, look, unpublish: what the CSI specification and a kubelet expect of volumes, with a real daemon and real mounts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from manta.testing.hub import HubProcess
from manta.testing.kubelet import Pod, Refused, Volume, inline, persistent
from tests.csi.conformance.conftest import BIG, BIG_FILE, BIG_SIZE, MODEL, Checked, outcome


def test_an_inline_volume_from_its_pod(node: Checked, hub: HubProcess) -> None:
    volume = node.volume(MODEL)
    with node.kubelet.volume(volume):
        assert node.published(volume)
        pod = node.pod(volume)
        weights = pod.run("sha256sum", str(node.models / "weights.bin"))
        assert weights.split()[0] == hub.files(MODEL).files["weights.bin"].sha256
        assert pod.run("cat", str(node.models / "sub/folder/tokenizer.json")) == "{}"
        pod.kill()
    assert node.gone(volume)


@pytest.mark.parametrize(
    ("mode", "readonly"),
    [("MULTI_NODE_READER_ONLY", False), ("SINGLE_NODE_READER_ONLY", True), ("SINGLE_NODE_WRITER", False)],
)
def test_a_static_persistent_volume(node: Checked, mode: str, readonly: bool) -> None:
    volume = persistent(
        Pod("serve-0"), "pv-model", "any/handle of:an_admin", {"model": MODEL}, access_mode=mode, readonly=readonly
    )
    with node.kubelet.volume(volume):
        assert node.published(volume)
    assert node.gone(volume)


@pytest.mark.parametrize("readonly", [False, True])
def test_nothing_can_be_written_or_executed_as_root_of_the_host(node: Checked, readonly: bool) -> None:
    """ "readonly" is false unless somebody set it: what is shown is read-only all the same."""
    volume = replace(node.volume(MODEL), readonly=readonly)
    with node.kubelet.volume(volume):
        (entry,) = node.entries(volume)
        assert {"ro", "nosuid", "nodev"} <= entry.options
        pod = node.pod(volume)
        said = pod.run("sh", "-c", f"touch {node.models}/new 2>&1; rm {node.models}/config.json 2>&1; true")
        assert said.count("Read-only file system") == 2


@pytest.mark.parametrize(
    ("attributes", "files"),
    [
        ({"revision": "v1"}, ["config.json", "weights.bin"]),
        ({"subfolder": "sub/folder"}, ["tokenizer.json"]),
        ({"prefetch": "background"}, ["config.json", "sub", "weights.bin"]),
        ({"prefetch": "blocking-open"}, ["config.json", "sub", "weights.bin"]),
        ({"view": "hub-cache"}, ["models--org--model"]),
    ],
)
def test_what_attributes_do(node: Checked, attributes: dict[str, str], files: list[str]) -> None:
    volume = node.volume(MODEL, **attributes)
    with node.kubelet.volume(volume):
        seen = node.pod(volume).run("ls", str(node.models)).split()
        assert [name for name in seen if name not in {"version.txt", "CACHEDIR.TAG"}] == files
        mount = node.client.status().mounts[-1]
        assert mount.prefetch == attributes.get("prefetch", "none")
        assert mount.pod is not None
        assert (mount.pod.uid, mount.pod.namespace) == (volume.pod.uid, "team")


@pytest.mark.parametrize(
    "wrong",
    [{"model": "org/nothing"}, {"revision": "nothing"}, {"subfolder": "nothing"}],
    ids=lambda it: next(iter(it)),
)
def test_what_the_hub_does_not_have_is_final_and_named(node: Checked, wrong: dict[str, str]) -> None:
    volume = node.volume(**wrong)
    refused = node.refusal(volume)
    assert refused.code in {"NOT_FOUND", "PERMISSION_DENIED", "INVALID_ARGUMENT"}
    assert "nothing" in refused.details
    assert node.gone(volume)


def test_a_publish_again_and_again_is_one_mount(node: Checked) -> None:
    volume = node.volume(MODEL)
    with node.kubelet.volume(volume):
        (first,) = node.entries(volume)
        for _ in range(5):
            node.kubelet.republish(volume)
        assert node.entries(volume) == [first], "not even replaced: the pod has bound this one"
        assert node.publications() == 1


def test_an_unpublish_again_and_again_is_done(node: Checked) -> None:
    volume = node.volume(MODEL)
    node.kubelet.set_up(volume)
    for _ in range(3):
        node.kubelet.tear_down(volume)
    assert node.gone(volume)


@pytest.mark.parametrize(
    "changes", [{"model": "org/many-00"}, {"revision": "v1"}, {"view": "hub-cache"}], ids=lambda it: next(iter(it))
)
def test_the_same_target_with_other_arguments_already_exists(node: Checked, changes: dict[str, str]) -> None:
    volume = node.volume(MODEL)
    with node.kubelet.volume(volume):
        other = replace(volume, attributes={**volume.attributes, **changes})
        with pytest.raises(Refused) as refused:
            node.kubelet.republish(other)
        assert refused.value.code == "ALREADY_EXISTS"
        assert node.published(volume)
        assert node.read(volume)


def test_the_same_target_for_another_volume_already_exists(node: Checked) -> None:
    volume = node.volume(MODEL)
    with node.kubelet.volume(volume):
        with pytest.raises(Refused) as refused:
            node.kubelet.republish(volume, volume_id="csi-" + "0" * 64)
        assert refused.value.code == "ALREADY_EXISTS"
        assert node.published(volume)


def test_one_persistent_volume_at_two_targets(node: Checked) -> None:
    first, second = (persistent(Pod(name), "pv-model", "shared", {"model": MODEL}) for name in ("a", "b"))
    with node.kubelet.volume(first):
        with node.kubelet.volume(second):
            assert node.published(first)
            assert node.published(second)
            assert node.entries(first)[0].device == node.entries(second)[0].device, "one filesystem, one page cache"
        assert node.gone(second)
        assert node.published(first)
        assert node.read(first)


def test_two_volumes_of_one_pod(node: Checked) -> None:
    pod = Pod("serve-0")
    one, two = (inline(pod, name, {"model": model}) for name, model in (("one", MODEL), ("two", "org/many-01")))
    with node.kubelet.volume(one), node.kubelet.volume(two):
        inside = node.pod(one, two)
        assert inside.run("cat", f"{node.models}/two/name.txt") == "org/many-01"
        assert inside.run("ls", f"{node.models}/one").split() == ["config.json", "sub", "weights.bin"]
        inside.kill()


def test_the_same_request_many_times_at_once(node: Checked) -> None:
    """Each is answered with success, or with ABORTED, which has a kubelet ask again."""
    volume = node.volume(MODEL)
    calls = [node.kubelet.begin_set_up(volume) for _ in range(20)]
    outcomes = [outcome(call.result) for call in calls]
    assert set(outcomes) <= {"OK", "ABORTED"}
    assert "OK" in outcomes
    assert node.published(volume)
    assert node.publications() == 1
    calls = [node.kubelet.begin_tear_down(volume) for _ in range(20)]
    assert {outcome(call.result) for call in calls} <= {"OK", "ABORTED"}
    node.kubelet.tear_down(volume)
    assert node.gone(volume)


def test_publish_and_unpublish_of_one_target_at_once_end_in_what_was_last(node: Checked) -> None:
    volume = node.volume(MODEL)
    for _ in range(5):
        publish, unpublish = node.kubelet.begin_set_up(volume), node.kubelet.begin_tear_down(volume)
        assert {outcome(publish.result), outcome(unpublish.result)} <= {"OK", "ABORTED", "UNAVAILABLE"}
        node.kubelet.make_parent(volume)
        node.kubelet.republish(volume)
        assert node.published(volume)
        node.kubelet.tear_down(volume)
        assert node.gone(volume)


def test_fifty_different_at_once(node: Checked) -> None:
    volumes = [node.volume(f"org/many-{number:02d}", pod=f"serve-{number}") for number in range(50)]
    calls = [node.kubelet.begin_set_up(volume) for volume in volumes]
    for call in calls:
        call.result()
    assert all(node.published(volume) for volume in volumes)
    assert node.publications() == 50
    assert [node.read(volume, "name.txt") for volume in volumes[::10]] == [
        f"org/many-{n:02d}" for n in range(0, 50, 10)
    ]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(node.kubelet.tear_down, volumes))
    assert all(node.gone(volume) for volume in volumes)


# NodeGetVolumeStats -------------------------------------------------------------------------------------------------


def test_stats_tell_what_there_is_and_what_is_cached(node: Checked, hub: HubProcess) -> None:
    volume = node.volume(BIG)
    size = sum(facts.size for facts in hub.files(BIG).files.values())
    with node.kubelet.volume(volume):
        before = node.kubelet.stats(volume)
        assert before["BYTES"].total == size
        assert before["INODES"].total >= 2
        assert all(part.available >= 0 and part.used >= 0 for part in before.values())
        node.host.run(
            "dd", f"if={node.kubelet.target(volume)}/{BIG_FILE}", "of=/dev/null", "bs=1M", f"count={BIG_SIZE >> 20}"
        )
        after = node.kubelet.stats(volume)
        assert after["BYTES"].used > before["BYTES"].used
        assert after["BYTES"].used <= size
        path = str(node.kubelet.target(volume))
        looked = node.kubelet.call("NodeGetVolumeStats", {"volume_id": volume.volume_id, "volume_path": path})
        assert not looked.volume_condition.abnormal
        assert looked.volume_condition.message


def test_node_get_volume_stats_should_fail_when_volume_does_not_exist_on_the_specified_path(node: Checked) -> None:
    volume = node.volume(MODEL)
    with node.kubelet.volume(volume):
        for changes in (
            {"volume_path": "some/path"},
            {"volume_path": str(node.kubelet.folder)},
            {"volume_id": "other"},
        ):
            fields = {"volume_id": volume.volume_id, "volume_path": str(node.kubelet.target(volume)), **changes}
            with pytest.raises(Refused) as refused:
                node.kubelet.call("NodeGetVolumeStats", fields)
            assert refused.value.code == "NOT_FOUND", changes
    with pytest.raises(Refused) as refused:
        node.kubelet.stats(volume)
    assert refused.value.code == "NOT_FOUND"


# What is in the way -------------------------------------------------------------------------------------------------


def test_a_directory_that_is_there_already_is_used(node: Checked) -> None:
    volume = node.volume(MODEL)
    node.kubelet.make_parent(volume)
    node.kubelet.target(volume).mkdir()
    with node.kubelet.volume(volume):
        assert node.published(volume)
    assert node.gone(volume)


def test_a_file_in_the_targets_way_is_not_overwritten(node: Checked) -> None:
    volume = node.volume(MODEL)
    node.kubelet.make_parent(volume)
    target = node.kubelet.target(volume)
    target.write_text("somebody's")
    with pytest.raises(Refused) as refused:
        node.kubelet.republish(volume)
    assert refused.value.code in {
        "INTERNAL",
        "INVALID_ARGUMENT",
        "FAILED_PRECONDITION",
        "UNAVAILABLE",
        "ALREADY_EXISTS",
    }
    assert "mount" in refused.value.details
    assert target.read_text() == "somebody's"
    outcome(lambda: node.kubelet.begin_tear_down(volume).result())
    if target.exists():
        assert target.read_text() == "somebody's", "deleted or left, and nothing else"
        target.unlink()
    node.kubelet.tear_down(volume)
    assert node.gone(volume)


def test_a_symlink_as_target_is_not_followed(node: Checked) -> None:
    volume: Volume = node.volume(MODEL)
    elsewhere = node.host.directory("kubelet/elsewhere")
    node.kubelet.make_parent(volume)
    target = node.kubelet.target(volume)
    target.symlink_to(elsewhere)
    outcome(lambda: node.kubelet.republish(volume))
    assert node.kubelet.mounted(elsewhere) == 0
    if target.is_symlink():
        target.unlink()
    node.kubelet.tear_down(volume)
    assert node.gone(volume)


def test_a_target_that_somebody_else_has_mounted_on_is_left_to_them(node: Checked) -> None:
    volume = node.volume(MODEL)
    node.kubelet.make_parent(volume)
    target = node.kubelet.target(volume)
    target.mkdir()
    node.host.run("mount", "-n", "-t", "tmpfs", "somebody", str(target))
    with pytest.raises(Refused) as refused:
        node.kubelet.republish(volume)
    assert refused.value.code in {"ALREADY_EXISTS", "INTERNAL", "FAILED_PRECONDITION"}
    assert [entry.fstype for entry in node.entries(volume)] == ["tmpfs"]
    node.host.run("umount", "-n", str(target))
    node.kubelet.tear_down(volume)
    assert node.gone(volume)


def test_a_mount_that_somebody_else_has_unmounted_is_mounted_again(node: Checked) -> None:
    volume = node.volume(MODEL)
    with node.kubelet.volume(volume):
        node.host.run("umount", "-n", "--lazy", str(node.kubelet.target(volume)))
        node.kubelet.republish(volume)
        assert node.published(volume)
        assert node.read(volume)


def test_a_target_that_is_gone_is_unpublished(node: Checked) -> None:
    volume = node.volume(MODEL)
    node.kubelet.set_up(volume)
    target = node.kubelet.target(volume)
    node.host.run("umount", "-n", "--lazy", str(target))
    node.host.run("rm", "-r", str(target.parent))
    node.kubelet.tear_down(volume)
    assert node.gone(volume)


def test_an_open_file_does_not_keep_a_volume(node: Checked) -> None:
    volume = node.volume(MODEL)
    node.kubelet.set_up(volume)
    pod = node.pod(volume)
    holder = pod.popen(["sh", "-c", f"exec 3< {node.models}/weights.bin; echo open; sleep 60"], stdout=-1)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"open\n"
    node.kubelet.tear_down(volume)
    assert node.gone(volume)
    pod.kill()
    holder.communicate(timeout=20)
