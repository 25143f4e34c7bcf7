"""How a spec describes one file's content, as JSON-serialisable values. Used by spec.py and changes.py."""

from __future__ import annotations

import os

import msgspec

from manta.testing.hub.content import (
    BytesContent,
    Content,
    FileContent,
    GeneratedContent,
    TensorShape,
    safetensors_content,
)


class _File(msgspec.Struct, forbid_unknown_fields=True, frozen=True, tag_field="kind"):
    pass


class Text(_File, tag="text", frozen=True):
    """A short text."""

    text: str


class Bytes(_File, tag="bytes", frozen=True):
    """A few bytes (base64 in JSON)."""

    data: bytes


class Disk(_File, tag="disk", frozen=True):
    """A file on the hub's machine, served with sendfile."""

    path: str


class Generated(_File, tag="generated", frozen=True):
    """`size` bytes made from `seed`; see content.GeneratedContent."""

    seed: str
    size: int


class Tensor(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One tensor: name, safetensors dtype ("BF16", "F32", ...), shape."""

    name: str
    dtype: str
    shape: list[int]


class Safetensors(_File, tag="safetensors", frozen=True):
    """A valid safetensors file with generated tensor bytes."""

    seed: str
    tensors: list[Tensor]


FileSpec = Text | Bytes | Disk | Generated | Safetensors


def read_spec(spec: FileSpec) -> Content:
    """The content a spec describes. Raises OSError when a disk file cannot be found."""
    match spec:
        case Text():
            return BytesContent(spec.text.encode())
        case Bytes():
            return BytesContent(spec.data)
        case Disk():
            path = os.path.abspath(spec.path)
            return FileContent(path, os.stat(path))
        case Generated():
            return GeneratedContent(spec.seed, spec.size)
        case Safetensors():
            shapes = [TensorShape(tensor.name, tensor.dtype, tuple(tensor.shape)) for tensor in spec.tensors]
            return safetensors_content(shapes, spec.seed)
