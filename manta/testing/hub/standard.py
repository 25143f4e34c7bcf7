"""The standard content of Manta's tests: one spec with every kind of repo, file name and revision.

Everything is seeded, so digests, commits and bytes are the same in every run. The private, gated, renamed,
ownerless and Xet repos have the same weights, so one blob is reachable through several repos. Sizes are small enough to be
hashed in well under a second. Used by test fixtures across the project and by `python -m manta.testing.hub`.
"""

from __future__ import annotations

import json

from manta.testing.hub.content import TensorShape
from manta.testing.hub.files import FileSpec, Generated, Safetensors, Tensor, Text
from manta.testing.hub.spec import CommitSpec, HubSpec, RepoSpec, UserSpec

# Tokens: READER may read the gated and the private repo, OWNER owns the namespace, STRANGER has no rights.
READER_TOKEN = "hf_testreader"
OWNER_TOKEN = "hf_testowner"
STRANGER_TOKEN = "hf_teststranger"

MODEL = "manta/tiny"  # three commits, a branch, a tag and a PR that share most blobs
SHARDED = "manta/sharded"  # three shards of safetensors and their index
NAMES = "manta/names"  # spaces, unicode, quotes, deep folders, empty files
MANY = "manta/many"  # more entries than ten pages of a tree
PRIVATE = "manta/private"
GATED = "manta/gated"
EMPTY = "manta/empty"  # a commit without files
RENAMED = "manta/renamed"
OLD_NAME = "manta/old-name"  # redirects to RENAMED
OWNERLESS = "tiny-gpt"  # a repo without a namespace, as gpt2
XET = "manta/xet"  # announces Xet hashes
DATASET = "manta/data"
SPACE = "manta/app"

MANY_COUNT = 10_500

_CONFIG = {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}


def sharded_safetensors(
    seed: str, *, size: int, shards: int, tensors_per_shard: int = 4, stem: str = "model"
) -> dict[str, FileSpec]:
    """Files of a sharded checkpoint of about `size` bytes of BF16 tensors, with its index.json.

    Each tensor has rows of 1024 values; `size` is rounded down to whole rows.
    """
    rows = max(1, size // (shards * tensors_per_shard * 2048))
    files: dict[str, FileSpec] = {}
    weight_map: dict[str, str] = {}
    total = 0
    for shard in range(1, shards + 1):
        name = f"{stem}-{shard:05d}-of-{shards:05d}.safetensors" if shards > 1 else f"{stem}.safetensors"
        tensors = [
            Tensor(f"layers.{shard - 1}.weight_{place}", "BF16", [rows, 1024]) for place in range(tensors_per_shard)
        ]
        files[name] = Safetensors(f"{seed}/{shard}", tensors)
        weight_map |= {tensor.name: name for tensor in tensors}
        total += sum(TensorShape(tensor.name, tensor.dtype, tuple(tensor.shape)).size for tensor in tensors)
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        files[f"{stem}.safetensors.index.json"] = Text(json.dumps(index, indent=2))
    return files


def _model_files() -> dict[str, FileSpec]:
    return {
        "README.md": Text("---\nlicense: mit\n---\n# Tiny\n"),
        "config.json": Text(json.dumps(_CONFIG, indent=2)),
        "tokenizer/vocab.txt": Text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nhello\nworld\n"),
        **sharded_safetensors("tiny", size=3 << 20, shards=1),
    }


def _model() -> RepoSpec:
    readme: dict[str, FileSpec] = {"README.md": Text("# Tiny, second edition\n")}
    return RepoSpec(
        id=MODEL,
        commits=[
            CommitSpec(name="first", files=_model_files()),
            CommitSpec(name="second", base="first", files=readme, title="Rewrite the readme"),
            CommitSpec(
                name="dev",
                base="second",
                files=sharded_safetensors("tiny-dev", size=2 << 20, shards=1),
                removed=["tokenizer/vocab.txt"],
            ),
            CommitSpec(name="proposal", base="second", files={"config.json": Text('{"model_type": "bert"}')}),
        ],
        branches={"main": "second", "dev": "dev", "feature/slash": "dev"},
        tags={"v1.0": "first"},
        pulls={"1": "proposal"},
        converts={"parquet": "first"},
    )


def _names() -> RepoSpec:
    paths = [
        "with space.txt",
        "ünïcödé/模型 权重.json",
        "quote'and\"double.txt",
        "percent%20sign.txt",
        "hash#question?.txt",
        "plus+and&amp.txt",
        "a/b/c/d/e/f/deep.txt",
        "a/b.txt",
        "a.txt",
        "UPPER.txt",
        ".hidden",
    ]
    files: dict[str, FileSpec] = {path: Text(f"content of {path}\n") for path in paths}
    files |= {
        "empty.txt": Text(""),
        "empty.safetensors": Text(""),
        "one byte.bin": Generated("one", 1),
        "ünïcödé/poids été.bin": Generated("names", 300_000),
        "big.txt": Generated("big text", 11 << 20),
    }
    return RepoSpec(id=NAMES, files=files)


def standard_spec() -> HubSpec:
    """The standard hub."""
    weights: dict[str, FileSpec] = sharded_safetensors("restricted", size=1 << 20, shards=1)
    restricted: dict[str, FileSpec] = {"config.json": Text("{}"), **weights}
    return HubSpec(
        repos=[
            _model(),
            RepoSpec(
                id=SHARDED,
                files={
                    "config.json": Text(json.dumps(_CONFIG)),
                    **sharded_safetensors("sharded", size=36 << 20, shards=3),
                },
            ),
            _names(),
            RepoSpec(
                id=MANY,
                files={f"shelf-{at % 7}/part-{at:05d}.json": Text(f'{{"at": {at}}}') for at in range(MANY_COUNT)},
            ),
            RepoSpec(id=PRIVATE, files=restricted, private=True),
            RepoSpec(id=GATED, files=restricted, gated="manual"),
            RepoSpec(id=EMPTY),
            RepoSpec(id=RENAMED, files={"config.json": Text("{}"), **weights}, renamed_from=[OLD_NAME]),
            RepoSpec(id=OWNERLESS, files={"config.json": Text("{}"), **weights}),
            RepoSpec(id=XET, files={"config.json": Text("{}"), **weights}, xet=True),
            RepoSpec(id=DATASET, type="dataset", files={"data/train.parquet": Generated("train", 200_000)}),
            RepoSpec(id=SPACE, type="space", files={"app.py": Text("print('hello')\n")}),
        ],
        users=[
            UserSpec(name="reader", token=READER_TOKEN, access=[GATED, PRIVATE]),
            UserSpec(name="manta", token=OWNER_TOKEN, pro=True),
            UserSpec(name="stranger", token=STRANGER_TOKEN),
        ],
    )
