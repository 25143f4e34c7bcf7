"""Routes: URLs as clients write them."""

import pytest

from manta.testing.hub.routes import UNKNOWN, Route, api_path, blob_path, parse_route, resolve_cache_path, resolve_path

SHA = "0123456789abcdef0123456789abcdef01234567"
DIGEST = "ab" * 32


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/api/whoami-v2", Route("whoami")),
        ("/api/models", Route("list")),
        ("/api/datasets/", Route("list", "dataset")),
        ("/api/models/org/name", Route("info", "model", "org/name")),
        ("/api/models/gpt2", Route("info", "model", "gpt2")),
        ("/api/models/org%2Fname", Route("info", "model", "org/name")),
        ("/api/models/org/name/revision/refs%2Fpr%2F1", Route("info", "model", "org/name", "refs/pr/1")),
        ("/api/models/org/name/revision/feature/slash", Route("info", "model", "org/name", "feature/slash")),
        ("/api/models/gpt2/revision/main", Route("info", "model", "gpt2", "main")),
        ("/api/models/org/name/refs", Route("refs", "model", "org/name")),
        ("/api/models/gpt2/refs", Route("refs", "model", "gpt2")),
        ("/api/spaces/org/name/commits/main", Route("commits", "space", "org/name", "main")),
        ("/api/models/org/name/tree/main", Route("tree", "model", "org/name", "main")),
        ("/api/models/org/name/tree/main/a%2Fb%20c", Route("tree", "model", "org/name", "main", "a/b c")),
        ("/api/models/org/name/tree/main/a/b/", Route("tree", "model", "org/name", "main", "a/b")),
        ("/api/models/org/name/tree/refs/pr/1/a", Route("tree", "model", "org/name", "refs/pr/1", "a")),
        ("/api/models/gpt2/tree/main", Route("tree", "model", "gpt2", "main")),
        ("/api/models/org/tree/tree/main", Route("tree", "model", "org/tree", "main")),
        ("/api/models/org/name/paths-info/v1", Route("paths-info", "model", "org/name", "v1")),
        (f"/api/resolve-cache/models/org/name/{SHA}/a/b", Route("resolve-cache", "model", "org/name", SHA, "a/b")),
        (f"/api/resolve-cache/models/gpt2/{SHA}/a", Route("resolve-cache", "model", "gpt2", SHA, "a")),
        ("/org/name/resolve/main/a/b.txt", Route("resolve", "model", "org/name", "main", "a/b.txt")),
        ("/gpt2/resolve/main/a", Route("resolve", "model", "gpt2", "main", "a")),
        ("/datasets/org/name/resolve/main/a", Route("resolve", "dataset", "org/name", "main", "a")),
        (
            "/org/name/resolve/refs%2Fpr%2F1/%E6%A8%A1.json",
            Route("resolve", "model", "org/name", "refs/pr/1", "模.json"),
        ),
        ("/org/name/resolve/refs/pr/1/a", Route("resolve", "model", "org/name", "refs/pr/1", "a")),
        ("/_hub/faults/3", Route("admin", path="faults/3")),
        ("/", UNKNOWN),
        ("/org/name", UNKNOWN),
        ("/org/name/resolve/main", UNKNOWN),
        ("/org/name/resolve/main/", UNKNOWN),
        ("/api", UNKNOWN),
        ("/api/nonsense/a", UNKNOWN),
        ("/api/models/org/name/xet-read-token/main", UNKNOWN),
        ("/api/models/org/name/tree", UNKNOWN),
        ("/api/resolve-cache/models/org/name/main/a", UNKNOWN),
    ],
)
def test_hub_paths(path: str, expected: Route) -> None:
    assert parse_route("hub", path) == expected


def test_cdn_paths() -> None:
    path = blob_path("cd" * 32, DIGEST)
    assert parse_route("cdn", path) == parse_route("other", path) == Route("blob", repo_key="cd" * 32, sha256=DIGEST)
    assert parse_route("cdn", "/org/name/resolve/main/a") == UNKNOWN
    assert parse_route("cdn", "/_hub/stats") == UNKNOWN
    assert parse_route("hub", path) == UNKNOWN


@pytest.mark.parametrize("id_", ["org/name", "gpt2"])
@pytest.mark.parametrize("path", ["a", "a b/ü?#%.txt", "x/resolve/y"])
def test_paths_survive_the_round_trip(id_: str, path: str) -> None:
    revision = "refs/pr/1"
    assert parse_route("hub", resolve_path("space", id_, revision, path)) == Route(
        "resolve", "space", id_, revision, path
    )
    cached = resolve_cache_path("dataset", id_, SHA, path)
    assert parse_route("hub", cached) == Route("resolve-cache", "dataset", id_, SHA, path)
    assert parse_route("hub", api_path("model", id_)) == Route("info", "model", id_)
