"""What a node has in its cache: a bit a chunk, as in `manta.swarm.protocol.Have`. Here and only here."""

from __future__ import annotations

from collections.abc import Mapping

from manta.model.ids import BlobId


class Holdings:
    """`files` are the model's blobs and how many chunks each has."""

    def __init__(self, files: Mapping[BlobId, int]) -> None:
        self._files = files
        self._bits = {blob: bytearray(-(-chunks // 8)) for blob, chunks in files.items()}
        self._counts = dict.fromkeys(files, 0)
        self.generation = 0
        """Another number whenever chunks are lost."""

    def has(self, blob: BlobId, chunk: int) -> bool:
        return bool(self._bits[blob][chunk >> 3] & 1 << (chunk & 7))

    def put(self, blob: BlobId, chunk: int) -> None:
        if not self.has(blob, chunk):
            self._bits[blob][chunk >> 3] |= 1 << (chunk & 7)
            self._counts[blob] += 1

    def lose_all(self) -> None:
        self._bits = {blob: bytearray(len(bits)) for blob, bits in self._bits.items()}
        self._counts = dict.fromkeys(self._files, 0)
        self.generation += 1

    def bitmap(self, blob: BlobId) -> bytes:
        return bytes(self._bits[blob])

    def complete(self, blob: BlobId) -> bool:
        return self._counts[blob] == self._files[blob]

    @property
    def all(self) -> bool:
        """Whether nothing is missing of any."""
        return self._counts == self._files

    def next_missing(self, blob: BlobId, chunk: int) -> int | None:
        """The first at or after `chunk`."""
        if self.complete(blob):
            return None
        return next((c for c in range(chunk, self._files[blob]) if not self.has(blob, c)), None)

    def missing(self, blob: BlobId) -> list[int]:
        return [chunk for chunk in range(self._files[blob]) if not self.has(blob, chunk)]
