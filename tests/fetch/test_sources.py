"""Where bytes come from: the latest asked for first, a bounded few, and what leads nowhere last."""

from __future__ import annotations

from manta.fetch.sources import PROVENANCES_MAX, Provenance, Sources
from manta.hub.origin import Access
from manta.model.ids import BlobAlgorithm, BlobId, Commit, RepoId, RepoKind
from manta.model.snapshot import FileEntry

ENTRY = FileEntry("model.bin", 5, BlobId(BlobAlgorithm.SHA256, "0" * 64), "1" * 40)


def provenance(number: int) -> Provenance:
    return Provenance(RepoId(RepoKind.MODEL, f"org/repo{number}"), Commit("a" * 40), ENTRY, Access("hf_secret"))


def test_what_was_asked_for_last_is_tried_first() -> None:
    sources = Sources()
    for number in (1, 2, 1, 1):
        sources.add(provenance(number))
    assert list(sources) == [provenance(1), provenance(2)]
    assert sources.best == provenance(1)


def test_only_a_few_are_kept() -> None:
    sources = Sources()
    for number in range(10):
        sources.add(provenance(number))
    assert list(sources) == [provenance(number) for number in (9, 8, 7, 6)]
    assert len(list(sources)) == PROVENANCES_MAX


def test_each_place_is_turned_to_once_and_those_elsewhere_last() -> None:
    sources = Sources()
    for number in (1, 2):
        sources.add(provenance(number))
    refused: set[Provenance] = set()
    tried = []
    while True:
        tried.append(sources.best)
        refused.add(sources.best)
        if not sources.turn_to(sources.best, refused, lambda _: [provenance(2), provenance(3)]):
            break
    assert tried == [provenance(2), provenance(1), provenance(3)]
    assert list(sources) == [provenance(3), provenance(1), provenance(2)]


def test_elsewhere_is_not_asked_while_there_is_another() -> None:
    sources = Sources()
    for number in (1, 2):
        sources.add(provenance(number))
    asked: list[BlobId] = []

    def elsewhere(blob: BlobId) -> list[Provenance]:
        asked.append(blob)
        return []

    assert sources.turn_to(provenance(2), {provenance(2)}, elsewhere)
    assert not asked
    assert sources.best == provenance(1)
    assert not sources.turn_to(provenance(1), {provenance(1), provenance(2)}, elsewhere)
    assert asked == [ENTRY.blob]


def test_its_text_names_the_file_and_no_token() -> None:
    assert str(provenance(1)) == "org/repo1/model.bin"
    assert "hf_secret" not in repr(provenance(1))
