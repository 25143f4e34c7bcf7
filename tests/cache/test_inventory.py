from __future__ import annotations

from dataclasses import replace

from manta.cache.inventory import BlobInfo, Inventory
from manta.model.ids import BlobAlgorithm, BlobId


def info(name: str, cached: int) -> BlobInfo:
    return BlobInfo(BlobId(BlobAlgorithm.SHA256, name * 32), 100, cached, sealed=False, last_used=1.0)


A, B = info("aa", 10), info("bb", 20)


def test_the_total_follows_every_change() -> None:
    inventory = Inventory([A])
    assert inventory.cached_bytes == 10
    inventory.put(B)
    assert inventory.cached_bytes == 30
    inventory.put(replace(B, cached=5))
    assert inventory.cached_bytes == 15
    inventory.update(A.id, cached=100, sealed=True)
    assert inventory.cached_bytes == 105
    inventory.drop(A.id)
    inventory.drop(A.id)
    assert inventory.cached_bytes == 5
    assert inventory.listing() == [replace(B, cached=5)]


def test_an_update_changes_what_it_names() -> None:
    inventory = Inventory([A])
    inventory.update(A.id, last_used=7.0, in_use=True)
    assert inventory.find(A.id) == replace(A, last_used=7.0, in_use=True)
    inventory.update(A.id, cached=0, in_use=False)
    assert inventory.find(A.id) == replace(A, last_used=7.0, cached=0)


def test_what_is_not_known_stays_unknown() -> None:
    inventory = Inventory()
    inventory.update(A.id, cached=5)
    assert inventory.find(A.id) is None
    assert inventory.cached_bytes == 0
