"""benchmarks.rig: the files it makes up, and the hub behind its link as curl sees it."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import pytest

from benchmarks import origin, readers
from benchmarks.rig import REPO, Rig, rig_options, seeded_tensors
from manta.testing import netns
from manta.testing.hub.files import read_spec

MEBIBYTE = 1024 * 1024


@pytest.mark.parametrize("size", [0, 2, 4096, 8192 + 6, 64 * MEBIBYTE, 200 * MEBIBYTE])
def test_the_tensors_are_as_many_bytes_as_asked(size: int) -> None:
    spec = seeded_tensors("a", size)
    elements = 0
    for tensor in spec.tensors:
        count = 1
        for length in tensor.shape:
            count *= length
        elements += count
    assert 2 * elements == size
    assert len({tensor.name for tensor in spec.tensors}) == len(spec.tensors)
    assert size <= read_spec(spec).size <= size + 4096


def test_safetensors_reads_them(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    content = read_spec(seeded_tensors("a", 3 * 8192 + 10))
    path = tmp_path / "model.safetensors"
    path.write_bytes(content.read())
    assert sum(array.nbytes for array in safetensors.load_file(path).values()) == 3 * 8192 + 10


@pytest.mark.netns
@pytest.mark.skipif(bool(netns.obstacle()), reason=netns.obstacle() or "possible")
def test_the_hub_answers_behind_its_link(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    rig_options(parser, size="4MiB")
    options = parser.parse_args(["--scratch", str(tmp_path), "--rate", "4e8"])
    name = "model.safetensors"
    with Rig.set_up(options, {name: options.size}) as rig:
        found = rig.download(name)
        traffic = rig.traffic(name)
        assert found.size == traffic.size == traffic.sent == traffic.unique > options.size
        assert traffic.repeated == 0
        assert found.rate <= 1.2 * netns.payload_rate(400_000_000)  # 4 MiB: what the bucket holds at the start is 6 %
        assert found.usage["hub"].rss_peak > MEBIBYTE
        content = read_spec(seeded_tensors(name, options.size))
        fetched = origin.fetch(origin.file_url(rig.endpoint, REPO, name), 1000, 4096)
        assert fetched.digest == hashlib.sha256(content.read(1000, 5096)).hexdigest()
        assert fetched.seconds == fetched.resolve_s + fetched.range_s
        rig.await_quiet()
        namespace = Path("/run/netns", rig.link.name)
        assert namespace.exists()
    assert not namespace.exists()
    assert list(tmp_path.iterdir()) == []
    assert (
        readers.blocks_digest([content.read()]) == hashlib.sha256(hashlib.sha256(content.read()).digest()).hexdigest()
    )
