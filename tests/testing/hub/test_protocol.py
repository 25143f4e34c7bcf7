"""The protocol over real HTTP, endpoint by endpoint, as facts about the real Hub have it."""

import re
from urllib.parse import parse_qs, quote, urljoin, urlsplit

import pytest

from manta.testing.hub import GeneratedContent, HubProcess, QuotaLimits, Quotas, Text, changes
from manta.testing.hub.admin import SettingsUpdate
from manta.testing.hub.standard import (
    DATASET,
    EMPTY,
    GATED,
    MANY,
    MANY_COUNT,
    MODEL,
    NAMES,
    OLD_NAME,
    OWNER_TOKEN,
    OWNERLESS,
    PRIVATE,
    READER_TOKEN,
    RENAMED,
    STRANGER_TOKEN,
    XET,
)
from tests.testing.hub.conftest import Answer, fetch

WEIGHTS = "model.safetensors"


def _api(hub: HubProcess, path: str, **options: str) -> Answer:
    return fetch(f"{hub.endpoint}/api/{path}", **options)  # type: ignore[arg-type]


def _resolve(hub: HubProcess, repo: str, file: str = WEIGHTS, revision: str = "main", **options: str) -> Answer:
    url = f"{hub.endpoint}/{repo}/resolve/{quote(revision, safe='')}/{quote(file)}"
    return fetch(url, **options)  # type: ignore[arg-type]


def _location(hub: HubProcess, repo: str = MODEL, file: str = WEIGHTS) -> str:
    return _resolve(hub, repo, file).headers["location"]


# -- info, refs, commits, list ------------------------------------------------------------------------------


def test_info(hub: HubProcess) -> None:
    info = _api(hub, f"models/{MODEL}").json()
    facts = hub.files(MODEL)
    assert info["id"] == MODEL
    assert info["sha"] == facts.commit
    assert (info["private"], info["gated"]) == (False, False)
    assert [sibling["rfilename"] for sibling in info["siblings"]] == sorted(facts.files)
    assert all(set(sibling) == {"rfilename"} for sibling in info["siblings"])


def test_info_with_blobs(hub: HubProcess) -> None:
    siblings = {row["rfilename"]: row for row in _api(hub, f"models/{MODEL}?blobs=True").json()["siblings"]}
    facts = hub.files(MODEL).files
    assert siblings[WEIGHTS]["lfs"]["sha256"] == facts[WEIGHTS].sha256
    assert siblings["config.json"]["blobId"] == facts["config.json"].oid
    assert "lfs" not in siblings["config.json"]


def test_info_can_be_narrowed(hub: HubProcess) -> None:
    assert set(_api(hub, f"models/{MODEL}?expand=sha&expand=gated").json()) == {"_id", "id", "sha", "gated"}


@pytest.mark.parametrize(
    ("revision", "commit"),
    [("main", "second"), ("dev", "dev"), ("feature/slash", "dev"), ("v1.0", "first"), ("refs/pr/1", "proposal")],
)
def test_revisions(hub: HubProcess, revision: str, commit: str) -> None:
    sha = hub.files(MODEL, commit).commit
    for name in (revision, sha):
        assert _api(hub, f"models/{MODEL}/revision/{quote(name, safe='')}").json()["sha"] == sha
        assert _resolve(hub, MODEL, "config.json", name).headers["x-repo-commit"] == sha


def test_revisions_share_blobs(hub: HubProcess) -> None:
    first, second = hub.files(MODEL, "first").files, hub.files(MODEL, "second").files
    assert first[WEIGHTS] == second[WEIGHTS]
    assert first["README.md"] != second["README.md"]


def test_refs(hub: HubProcess) -> None:
    refs = _api(hub, f"models/{MODEL}/refs").json()
    assert [ref["name"] for ref in refs["branches"]] == ["dev", "feature/slash", "main"]
    first = hub.files(MODEL, "first").commit
    assert refs["tags"] == [{"name": "v1.0", "ref": "refs/tags/v1.0", "targetCommit": first}]
    assert refs["converts"] == [{"name": "parquet", "ref": "refs/convert/parquet", "targetCommit": first}]
    assert "pullRequests" not in refs
    assert _api(hub, f"models/{MODEL}/refs?include_prs=1").json()["pullRequests"][0]["ref"] == "refs/pr/1"


def test_commits(hub: HubProcess) -> None:
    commits = _api(hub, f"models/{MODEL}/commits/main").json()
    assert [commit["id"] for commit in commits] == [hub.files(MODEL, name).commit for name in ("second", "first")]


def test_list(hub: HubProcess) -> None:
    names = [row["id"] for row in _api(hub, "models?author=manta").json()]
    assert MODEL in names
    assert OWNERLESS not in names
    assert PRIVATE not in names
    assert PRIVATE in [row["id"] for row in _api(hub, "models", token=READER_TOKEN).json()]
    assert [row["id"] for row in _api(hub, "models?search=GATED").json()] == [GATED]
    first = _api(hub, "models?limit=2")
    assert len(first.json()) == 2
    assert 'rel="next"' in first.headers["link"]


def test_empty_repo(hub: HubProcess) -> None:
    info = _api(hub, f"models/{EMPTY}").json()
    assert info["siblings"] == []
    assert re.fullmatch("[0-9a-f]{40}", info["sha"])
    assert _api(hub, f"models/{EMPTY}/tree/main").json() == []


# -- tree and paths-info ------------------------------------------------------------------------------------


def test_tree_entries(hub: HubProcess) -> None:
    rows = {row["path"]: row for row in _api(hub, f"models/{MODEL}/tree/main").json()}
    facts = hub.files(MODEL).files
    assert rows["tokenizer"]["type"] == "directory"
    assert rows["config.json"] == {
        "type": "file",
        "oid": facts["config.json"].oid,
        "size": facts["config.json"].size,
        "path": "config.json",
    }
    weights = facts[WEIGHTS]
    assert rows[WEIGHTS]["oid"] == weights.oid != weights.sha256
    assert rows[WEIGHTS]["lfs"] == {"oid": weights.sha256, "size": weights.size, "pointerSize": 132}
    assert "tokenizer/vocab.txt" not in rows
    below = _api(hub, f"models/{MODEL}/tree/main/tokenizer").json()
    assert [row["path"] for row in below] == ["tokenizer/vocab.txt"]


def test_tree_pages(hub: HubProcess) -> None:
    url, paths, pages = f"{hub.endpoint}/api/models/{MANY}/tree/main?recursive=true&expand=false", [], 0
    while url:
        answer = fetch(url)
        rows = answer.json()
        assert len(rows) <= 1000
        paths += [row["path"] for row in rows]
        pages += 1
        link = re.fullmatch(r'<([^>]+)>; rel="next"', answer.headers.get("link", ""))
        url = link[1] if link else ""
        assert not url or url.startswith(hub.endpoint)
    assert pages == 11
    assert paths == sorted(set(paths))
    assert len(paths) == MANY_COUNT + 7


def test_expanded_pages_are_shorter(hub: HubProcess) -> None:
    rows = _api(hub, f"models/{MANY}/tree/main?recursive=true&expand=true").json()
    assert len(rows) == 50
    assert rows[1]["lastCommit"]["id"] == hub.files(MANY).commit


def test_paths_info(hub: HubProcess) -> None:
    path = "ünïcödé/poids été.bin"
    form = f"paths={quote(path)}&paths=nowhere&paths=a/b&expand=False".encode()
    url = f"{hub.endpoint}/api/models/{NAMES}/paths-info/main"
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    rows = fetch(url, method="POST", body=form, headers=headers).json()
    assert [(row["path"], row["type"]) for row in rows] == [(path, "file"), ("a/b", "directory")]
    assert rows[0]["lfs"]["oid"] == hub.files(NAMES).files[path].sha256
    as_json = fetch(url, method="POST", body=b'{"paths": ["a.txt"]}', headers={"Content-Type": "application/json"})
    assert [row["path"] for row in as_json.json()] == ["a.txt"]
    assert fetch(url, method="POST", body=b"[]", headers={"Content-Type": "application/json"}).status == 400


# -- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_git_file(hub: HubProcess, method: str) -> None:
    redirect = _resolve(hub, MODEL, "config.json", method=method)
    facts = hub.files(MODEL)
    assert redirect.status == 307
    assert redirect.headers["x-repo-commit"] == facts.commit
    location = redirect.headers["location"]
    assert location.startswith(f"/api/resolve-cache/models/{MODEL}/{facts.commit}/config.json?")
    answer = fetch(urljoin(hub.endpoint, location), method=method)
    assert answer.status == 200
    assert answer.headers["etag"] == f'"{facts.files["config.json"].oid}"'
    assert answer.headers["x-repo-commit"] == facts.commit
    assert int(answer.headers["content-length"]) == facts.files["config.json"].size
    assert len(answer.body) == (facts.files["config.json"].size if method == "GET" else 0)


def test_git_file_range(hub: HubProcess) -> None:
    location = _resolve(hub, MODEL, "config.json").headers["location"]
    answer = fetch(urljoin(hub.endpoint, location), range_="bytes=2-5")
    assert answer.status == 206
    assert answer.headers["content-range"] == f"bytes 2-5/{hub.files(MODEL).files['config.json'].size}"
    assert len(answer.body) == 4


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_lfs_file(hub: HubProcess, method: str) -> None:
    redirect = _resolve(hub, MODEL, method=method)
    facts = hub.files(MODEL)
    weights = facts.files[WEIGHTS]
    assert redirect.status == 302
    assert redirect.headers["x-repo-commit"] == facts.commit
    assert redirect.headers["x-linked-size"] == str(weights.size)
    assert redirect.headers["x-linked-etag"] == f'"{weights.sha256}"'
    assert "x-xet-hash" not in redirect.headers
    location = redirect.headers["location"]
    assert location.startswith(f"{hub.cdn_endpoint}/repos/")
    assert {"Expires", "Signature", "Key-Pair-Id"} <= set(parse_qs(urlsplit(location).query))


def test_cdn_serves_ranges(hub: HubProcess) -> None:
    url = _location(hub)
    whole = fetch(url)
    assert whole.status == 200
    assert len(whole.body) == hub.files(MODEL).files[WEIGHTS].size
    part = fetch(url, range_="bytes=1000000-1999999")
    assert part.status == 206
    assert part.body == whole.body[1_000_000:2_000_000]
    assert part.headers["etag"].strip('"') != hub.files(MODEL).files[WEIGHTS].sha256
    beyond = fetch(url, range_=f"bytes={len(whole.body)}-")
    assert beyond.status == 416
    assert beyond.headers["content-range"] == f"bytes */{len(whole.body)}"


def test_third_origin_honours_signed_urls(hub: HubProcess) -> None:
    url = _location(hub).replace(hub.cdn_endpoint, hub.other_endpoint)
    assert fetch(url, range_="bytes=0-9").status == 206


def test_authorization_at_the_cdn_is_refused_and_remembered(hub: HubProcess) -> None:
    assert fetch(_location(hub), token=READER_TOKEN).status == 400
    (violation,) = hub.stats().violations
    assert "Authorization reached cdn" in violation


def test_signed_urls_expire(hub: HubProcess) -> None:
    hub.update(SettingsUpdate(signed_url_lifetime_s=-1))
    answer = fetch(_location(hub))
    assert answer.status == 403
    assert b"expired" in answer.body


@pytest.mark.parametrize("change", ["Signature=0", "Expires=9999999999", "path"])
def test_forged_urls_are_refused(hub: HubProcess, change: str) -> None:
    url = _location(hub)
    if change == "path":
        url = url.replace(hub.files(MODEL).files[WEIGHTS].sha256, "0" * 64)
    else:
        name = change.partition("=")[0]
        url = re.sub(rf"{name}=[^&]*", change, url)
    assert fetch(url).status == 403


def test_head_on_a_signed_url_is_refused_unless_allowed(hub: HubProcess) -> None:
    assert fetch(_location(hub), method="HEAD").status == 403
    hub.update(SettingsUpdate(cdn_allows_head=True))
    assert fetch(_location(hub), method="HEAD").status == 200


def test_xet_files_announce_themselves(hub: HubProcess) -> None:
    headers = _resolve(hub, XET, method="HEAD").headers
    assert re.fullmatch("[0-9a-f]{64}", headers["x-xet-hash"])
    assert re.findall(r'rel="([^"]+)"', headers["link"]) == ["xet-auth", "xet-reconstruction-info"]
    rows = {row["path"]: row for row in _api(hub, f"models/{XET}/tree/main").json()}
    assert rows[WEIGHTS]["xetHash"] == headers["x-xet-hash"]


@pytest.mark.parametrize(
    "file",
    ["with space.txt", "ünïcödé/模型 权重.json", "percent%20sign.txt", "hash#question?.txt", "a/b/c/d/e/f/deep.txt"],
)
def test_awkward_names(hub: HubProcess, file: str) -> None:
    location = _resolve(hub, NAMES, file).headers["location"]
    assert fetch(urljoin(hub.endpoint, location)).body == f"content of {file}\n".encode()


@pytest.mark.parametrize("file", ["empty.txt", "empty.safetensors"])
def test_empty_files_are_git_files(hub: HubProcess, file: str) -> None:
    location = _resolve(hub, NAMES, file).headers["location"]
    answer = fetch(urljoin(hub.endpoint, location))
    assert (answer.status, answer.body, answer.headers["content-length"]) == (200, b"", "0")
    assert fetch(urljoin(hub.endpoint, location), range_="bytes=0-0").status == 416


def test_a_large_text_file_is_lfs(hub: HubProcess) -> None:
    answer = fetch(_location(hub, NAMES, "big.txt"), range_="bytes=11000000-11000009")
    assert answer.body == GeneratedContent("big text", 11 << 20).read(11_000_000, 11_000_010)


def test_repos_without_owner_and_of_other_types(hub: HubProcess) -> None:
    assert _api(hub, f"models/{OWNERLESS}").json()["id"] == OWNERLESS
    assert _resolve(hub, OWNERLESS).status == 302
    assert _api(hub, f"datasets/{DATASET}").json()["id"] == DATASET
    assert _api(hub, f"models/{DATASET}").status == 401
    assert fetch(f"{hub.endpoint}/datasets/{DATASET}/resolve/main/data/train.parquet").status == 302


# -- errors and rights --------------------------------------------------------------------------------------


def test_missing_file(hub: HubProcess) -> None:
    for path in ("nowhere.json", "tokenizer"):
        answer = _resolve(hub, MODEL, path)
        assert (answer.status, answer.headers["x-error-code"]) == (404, "EntryNotFound")
        assert answer.headers["x-repo-commit"] == hub.files(MODEL).commit
    assert _api(hub, f"models/{MODEL}/tree/main/nowhere").headers["x-error-code"] == "EntryNotFound"


def test_missing_revision(hub: HubProcess) -> None:
    for answer in (_api(hub, f"models/{MODEL}/revision/no"), _resolve(hub, MODEL, revision="0" * 40)):
        assert (answer.status, answer.headers["x-error-code"]) == (404, "RevisionNotFound")


@pytest.mark.parametrize("repo", ["manta/missing", PRIVATE])
def test_missing_and_private_repos_look_alike(hub: HubProcess, repo: str) -> None:
    for path in (f"/api/models/{repo}", f"/{repo}/resolve/main/config.json", f"/api/models/{repo}/tree/main"):
        anonymous = fetch(hub.endpoint + path)
        assert anonymous.status == 401
        assert "x-error-code" not in anonymous.headers
        stranger = fetch(hub.endpoint + path, token=STRANGER_TOKEN)
        assert (stranger.status, stranger.headers["x-error-code"]) == (404, "RepoNotFound")


@pytest.mark.parametrize("token", [READER_TOKEN, OWNER_TOKEN])
def test_private_repo_for_those_with_access(hub: HubProcess, token: str) -> None:
    assert _api(hub, f"models/{PRIVATE}", token=token).json()["private"] is True
    assert _resolve(hub, PRIVATE, token=token).status == 302
    assert _resolve(hub, PRIVATE, "config.json", token=token).status == 200


def test_gated_repo_without_access(hub: HubProcess) -> None:
    assert _api(hub, f"models/{GATED}").json()["gated"] == "manual"
    (weights,) = [row for row in _api(hub, f"models/{GATED}/tree/main").json() if "lfs" in row]
    assert weights["lfs"]["oid"] == "*" * 64
    for token, status in (("", 401), (STRANGER_TOKEN, 403)):
        for file in (WEIGHTS, "config.json", "nowhere"):
            answer = _resolve(hub, GATED, file, token=token)
            assert (answer.status, answer.headers["x-error-code"]) == (status, "GatedRepo")


def test_gated_repo_with_access(hub: HubProcess) -> None:
    sha256 = hub.files(GATED).files[WEIGHTS].sha256
    rows = _api(hub, f"models/{GATED}/tree/main", token=READER_TOKEN).json()
    assert [row["lfs"]["oid"] for row in rows if "lfs" in row] == [sha256]
    assert _resolve(hub, GATED, token=READER_TOKEN).headers["x-linked-etag"] == f'"{sha256}"'
    direct = _resolve(hub, GATED, "config.json", token=READER_TOKEN)
    assert (direct.status, direct.body) == (200, b"{}")


def test_unknown_token(hub: HubProcess) -> None:
    for path in (f"/api/models/{MODEL}", f"/{MODEL}/resolve/main/config.json", "/api/whoami-v2"):
        answer = fetch(hub.endpoint + path, token="hf_nonsense")
        assert answer.status == 401
        assert answer.headers["x-error-message"] == "Invalid credentials in Authorization header"


def test_whoami(hub: HubProcess) -> None:
    answer = _api(hub, "whoami-v2", token=OWNER_TOKEN).json()
    assert (answer["name"], answer["isPro"]) == ("manta", True)
    assert _api(hub, "whoami-v2").status == 401


def test_renamed_repo(hub: HubProcess) -> None:
    answer = _api(hub, f"models/{OLD_NAME}/revision/main?blobs=True")
    assert (answer.status, answer.headers["location"]) == (307, f"/api/models/{RENAMED}/revision/main?blobs=True")
    assert _resolve(hub, OLD_NAME).headers["location"] == f"/{RENAMED}/resolve/main/{WEIGHTS}"


def test_the_hub_is_read_only(hub: HubProcess) -> None:
    assert fetch(f"{hub.endpoint}/api/models/{MODEL}", method="DELETE").status == 405
    assert fetch(_location(hub), method="PUT", body=b"x").status == 405


def test_quota_counts_down_to_429(hub: HubProcess) -> None:
    hub.update(SettingsUpdate(quotas=Quotas(resolvers=QuotaLimits(anonymous=2, user=5))))
    answers = [_resolve(hub, MODEL) for _ in range(3)]
    assert [answer.status for answer in answers] == [302, 302, 429]
    left = [re.search(r'"resolvers";r=(\d+);t=(\d+)', answer.headers["ratelimit"]) for answer in answers]
    assert [match and match[1] for match in left] == ["1", "0", "0"]
    assert answers[0].headers["ratelimit-policy"] == '"fixed window";"resolvers";q=2;w=300'
    assert _api(hub, f"models/{MODEL}").status == 200
    assert _resolve(hub, MODEL, token=READER_TOKEN).status == 302


# -- changes while it runs ----------------------------------------------------------------------------------


def test_branch_moves(hub: HubProcess) -> None:
    hub.move_branch(MODEL, "first")
    assert _api(hub, f"models/{MODEL}").json()["sha"] == hub.files(MODEL, "first").commit
    hub.apply(changes.DeleteBranch(repo=MODEL))
    assert _api(hub, f"models/{MODEL}").headers["x-error-code"] == "RevisionNotFound"


def test_push(hub: HubProcess) -> None:
    before = hub.files(MODEL)
    hub.apply(changes.Push(repo=MODEL, files={"new.txt": Text("new")}, removed=["README.md"]))
    after = hub.files(MODEL)
    assert set(after.files) == set(before.files) - {"README.md"} | {"new.txt"}
    assert after.files[WEIGHTS] == before.files[WEIGHTS]
    assert [row["id"] for row in _api(hub, f"models/{MODEL}/commits/main").json()][:2] == [after.commit, before.commit]


def test_rights_change(hub: HubProcess) -> None:
    hub.apply(changes.SetGated(repo=MODEL))
    assert _resolve(hub, MODEL).headers["x-error-code"] == "GatedRepo"
    hub.apply(changes.GrantAccess(user="stranger", repo=MODEL))
    assert _resolve(hub, MODEL, token=STRANGER_TOKEN).status == 302
    hub.apply(changes.RevokeAccess(user="stranger", repo=MODEL))
    assert _resolve(hub, MODEL, token=STRANGER_TOKEN).status == 403
    hub.apply(changes.RevokeToken(token=STRANGER_TOKEN))
    assert _resolve(hub, MODEL, token=STRANGER_TOKEN).status == 401
    hub.apply(changes.SetGated(repo=MODEL, gated=False))
    hub.apply(changes.SetPrivate(repo=MODEL))
    assert _resolve(hub, MODEL).status == 401
    hub.apply(changes.SetPrivate(repo=MODEL, private=False))
    hub.apply(changes.SetDeleted(repo=MODEL))
    assert _api(hub, f"models/{MODEL}", token=READER_TOKEN).headers["x-error-code"] == "RepoNotFound"


def test_rename_at_run_time(hub: HubProcess) -> None:
    url = _location(hub)
    hub.apply(changes.Rename(repo=MODEL, to="manta/renamed-now"))
    assert _api(hub, f"models/{MODEL}").headers["location"] == "/api/models/manta/renamed-now"
    assert _resolve(hub, "manta/renamed-now").status == 302
    assert fetch(url, range_="bytes=0-0").status == 206


def test_a_signed_url_outlives_revoked_access(hub: HubProcess) -> None:
    url = _resolve(hub, PRIVATE, token=READER_TOKEN).headers["location"]
    hub.apply(changes.RevokeAccess(user="reader", repo=PRIVATE))
    assert _resolve(hub, PRIVATE, token=READER_TOKEN).status == 404
    assert fetch(url, range_="bytes=0-0").status == 206
