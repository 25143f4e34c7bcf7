"""The Hugging Face adapter: against a scripted hub for what goes wrong, against the faithful one for what goes right."""

from __future__ import annotations

import http.client
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urljoin, urlsplit

import pytest
import trio
from huggingface_hub import close_session

from manta.config import HubConfig
from manta.errors import Absent, Corrupt, Denied, Invalid, MantaError, Throttled, Unavailable
from manta.hub import client, huggingface
from manta.hub.huggingface import HuggingFaceHub
from manta.hub.origin import Access, Location
from manta.model.ids import BlobAlgorithm, BlobId, Commit, RepoId, RepoKind
from manta.model.snapshot import FileEntry, Snapshot
from manta.testing.hub import (
    CommitSpec,
    Generated,
    HubProcess,
    HubSpec,
    RepoSpec,
    Settings,
    Text,
    UserSpec,
    faults,
)
from tests.hub.scripted_hub import Answer, Asked, ScriptedHub, free_port, json_answer, scripted_hub, wait_until

REPO = RepoId(RepoKind.MODEL, "org/name")
SHA = "c" * 40
OID, SHA256 = "2e" * 20, "1f" * 32
ANONYMOUS = Access.anonymous()
USER = Access("hf_user")

INFO = {"id": "org/name", "sha": SHA, "private": False, "gated": False, "siblings": []}


def file(path: str, size: int = 3, sha256: str = "", oid: str = OID) -> dict[str, object]:
    lfs = {"lfs": {"oid": sha256, "size": size, "pointerSize": 130}, "xetHash": sha256} if sha256 else {}
    return {"type": "file", "oid": oid, "size": size, "path": path, **lfs}


def serves(tree: object, info: object = INFO) -> Callable[[Asked], Answer]:
    return lambda asked: json_answer(tree if "/tree/" in asked.path else info)


def adapter(hub: ScriptedHub, timeout_s: float = 5.0) -> HuggingFaceHub:
    return HuggingFaceHub(HubConfig(endpoint=hub.url, timeout_s=timeout_s))


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "RETRY_WAITS_S", (0.01, 0.01))


@pytest.mark.parametrize("endpoint", ["hub.example", "ftp://hub", "https://user:pass@hub.example", "https://hub/?x=1"])
def test_a_bad_endpoint_is_refused_without_showing_what_is_in_it(endpoint: str) -> None:
    with pytest.raises(Invalid) as caught:
        HuggingFaceHub(HubConfig(endpoint=endpoint))
    assert "pass" not in caught.value.message


def test_the_library_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, manta.hub.huggingface, manta.hub.catalog; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"huggingface_hub", "httpx", "httpx2", "asyncio", "aiohttp"} & set(loaded)


@pytest.mark.trio
async def test_it_says_who_it_is_and_keeps_to_the_token_it_is_given(
    hub: ScriptedHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_environment")
    hub.answer = serves([])
    origin = adapter(hub)
    resolved = await origin.resolve(REPO, None, ANONYMOUS)
    assert (resolved.commit, resolved.gated, resolved.private) == (SHA, False, False)
    await origin.resolve(REPO, "refs/pr/1", USER)
    first, second = hub.asked
    path, _, query = first.path.partition("?")
    assert path == "/api/models/org/name"
    assert sorted(parse_qs(query)["expand"]) == ["gated", "private", "sha"]  # and not the names of all files
    assert first.headers["user-agent"].startswith("manta/")
    assert "authorization" not in first.headers
    assert second.path.partition("?")[0] == "/api/models/org/name/revision/refs%2Fpr%2F1"
    assert second.headers["authorization"] == "Bearer hf_user"


@pytest.mark.trio
async def test_a_tree_becomes_a_snapshot(hub: ScriptedHub) -> None:
    tree = [
        file("config.json"),
        {"type": "directory", "oid": OID, "size": 0, "path": "weights"},
        file("weights/ü 1.bin", 1 << 40, SHA256),
    ]
    hub.answer = serves(tree, {**INFO, "private": True})
    snapshot = await adapter(hub).snapshot(REPO, Commit(SHA), USER)
    assert snapshot.private
    assert not snapshot.gated
    assert list(snapshot.files.values()) == [
        FileEntry("config.json", 3, BlobId(BlobAlgorithm.GIT_SHA1, OID), OID),
        FileEntry("weights/ü 1.bin", 1 << 40, BlobId(BlobAlgorithm.SHA256, SHA256), OID),
    ]


@pytest.mark.trio
async def test_a_tree_of_many_pages_is_read_from_the_endpoint_wherever_its_links_point(hub: ScriptedHub) -> None:
    def answer(asked: Asked) -> Answer:
        if "/tree/" not in asked.path:
            return json_answer(INFO)
        found = re.search(r"cursor=(\d+)", asked.path)
        page = int(found[1]) if found else 0
        link = f'<https://huggingface.co/api/models/org/name/tree/{SHA}?recursive=true&cursor={page + 1}>; rel="next"'
        return json_answer([file(f"f{page}-{n}") for n in range(600)], headers={"Link": link} if page < 2 else None)

    hub.answer = answer
    snapshot = await adapter(hub).snapshot(REPO, Commit(SHA), USER)
    assert len(snapshot.files) == 1800
    assert all(asked.headers["authorization"] == "Bearer hf_user" for asked in hub.asked)


@pytest.mark.trio
async def test_a_tree_that_is_too_large_is_refused(hub: ScriptedHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "ENTRIES_MAX", 1500)
    hub.answer = serves([file(f"f{n}") for n in range(2100)])
    with pytest.raises(Unavailable, match="more than 1500 entries"):
        await adapter(hub).snapshot(REPO, Commit(SHA), ANONYMOUS)


@pytest.mark.trio
async def test_a_tree_in_which_one_digest_is_masked_has_none_at_all(hub: ScriptedHub) -> None:
    hub.answer = serves([file("config.json"), file("model.bin", 9, "*" * 64)], {**INFO, "gated": "auto"})
    snapshot = await adapter(hub).snapshot(REPO, Commit(SHA), ANONYMOUS)
    assert snapshot.gated
    assert [entry.blob for entry in snapshot.files.values()] == [None, None]


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.trio
async def test_a_gated_tree_with_nothing_to_mask_is_tried_with_one_file(hub: ScriptedHub, allowed: bool) -> None:
    def answer(asked: Asked) -> Answer:
        if asked.method == "HEAD":
            return Answer(200, b"abc") if allowed else Answer(403, headers={"X-Error-Code": "GatedRepo"})
        return json_answer([file("a.csv"), file("b.csv")] if "/tree/" in asked.path else {**INFO, "gated": "manual"})

    hub.answer = answer
    snapshot = await adapter(hub).snapshot(REPO, Commit(SHA), USER)
    assert [entry.blob is not None for entry in snapshot.files.values()] == [allowed] * 2


@pytest.mark.parametrize(
    "entry",
    [
        file("x", oid="nonsense"),
        file("x", 3, "abc"),
        file("x", -1),
        {**file("x"), "oid": None},
        {**file("x"), "path": 7},
        {**file("x"), "size": "7"},
    ],
)
@pytest.mark.trio
async def test_an_entry_that_is_no_file_is_corrupt(hub: ScriptedHub, entry: dict[str, object]) -> None:
    hub.answer = serves([entry])
    with pytest.raises(Corrupt, match="org/name"):
        await adapter(hub).snapshot(REPO, Commit(SHA), ANONYMOUS)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(200, b"<html>log in</html>", {"content-type": "text/html"}),
        Answer(200, b""),
        Answer(200, b"\xff\xfe\x00"),
        json_answer([1, 2]),
        json_answer("text"),
        json_answer({}),
        json_answer({**INFO, "sha": "short"}),
    ],
)
@pytest.mark.trio
async def test_an_answer_of_another_shape_is_not_a_hub(hub: ScriptedHub, answer: Answer) -> None:
    hub.answer = lambda _: answer
    with pytest.raises(Unavailable, match="HF_ENDPOINT"):
        await adapter(hub).resolve(REPO, "main", ANONYMOUS)


@pytest.mark.parametrize("tree", ["text", [1], [{}], [{"type": "file"}], {"error": "none"}])
@pytest.mark.trio
async def test_a_tree_of_another_shape_is_not_a_hub(hub: ScriptedHub, tree: object) -> None:
    hub.answer = serves(tree)
    with pytest.raises(Unavailable, match="HF_ENDPOINT"):
        await adapter(hub).snapshot(REPO, Commit(SHA), ANONYMOUS)


@pytest.mark.trio
async def test_a_repo_without_commits_is_said(hub: ScriptedHub) -> None:
    hub.answer = serves([], {**INFO, "sha": None})
    with pytest.raises(Absent, match="no commits"):
        await adapter(hub).resolve(REPO, None, ANONYMOUS)


@pytest.mark.trio
async def test_an_answer_about_another_commit_is_corrupt(hub: ScriptedHub) -> None:
    hub.answer = serves([], INFO)
    with pytest.raises(Corrupt):
        await adapter(hub).resolve(REPO, "d" * 40, ANONYMOUS)


@pytest.mark.trio
async def test_a_missing_repo_and_a_bad_token_are_told_apart_on_plain_http(hub: ScriptedHub) -> None:
    hub.answer = lambda asked: Answer(401)
    with pytest.raises(Absent, match=r"does not exist .* or it is private"):
        await adapter(hub).resolve(REPO, None, ANONYMOUS)
    with pytest.raises(Denied, match="does not accept the token"):
        await adapter(hub).resolve(REPO, None, USER)


@pytest.mark.trio
async def test_a_hub_that_asked_for_a_pause_is_left_alone_by_the_same_access(hub: ScriptedHub) -> None:
    hub.answer = lambda asked: (
        json_answer(INFO) if "authorization" in asked.headers else Answer(429, headers={"RateLimit": '"api";r=0;t=99'})
    )
    origin = adapter(hub)
    for _ in range(3):
        with pytest.raises(Throttled) as caught:
            await origin.resolve(REPO, None, ANONYMOUS)
        assert 95 < caught.value.retry_after_s <= 100
    assert len(hub.asked) == 1
    assert (await origin.resolve(REPO, None, USER)).commit == SHA


@pytest.mark.trio
async def test_the_quota_is_kept_from_each_answer(hub: ScriptedHub) -> None:
    hub.answer = lambda _: json_answer(INFO, headers={"RateLimit": '"api";r=499;t=300'})
    origin = adapter(hub)
    await origin.resolve(REPO, None, ANONYMOUS)
    assert origin.quotas["api"].remaining == 499
    origin.note_headers({"ratelimit": '"resolvers";r=7;t=12'})
    assert {kind: quota.remaining for kind, quota in origin.quotas.items()} == {"api": 499, "resolvers": 7}
    for n in range(100):
        origin.note_headers({"ratelimit": f'"kind{n}";r=7;t=12'})
    assert len(origin.quotas) == 8


@pytest.mark.trio
async def test_a_hub_that_does_not_listen_is_said() -> None:
    origin = HuggingFaceHub(HubConfig(endpoint=f"http://127.0.0.1:{free_port()}"))
    with pytest.raises(Unavailable, match=r"connection refused.*HF_ENDPOINT"):
        await origin.resolve(REPO, None, ANONYMOUS)


@pytest.mark.trio
async def test_a_silent_hub_is_given_up_at_the_deadline(hub: ScriptedHub) -> None:
    hub.answer = lambda _: Answer(200, delay_s=30)
    began = time.monotonic()
    with pytest.raises(Unavailable, match="did not answer within"):
        await adapter(hub, 0.3).resolve(REPO, None, ANONYMOUS)
    assert time.monotonic() - began < 2


@pytest.mark.trio
async def test_a_thread_that_hangs_is_left_behind_and_counted(
    hub: ScriptedHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the system's name lookup hangs: nothing can interrupt that thread, and there must not be more and more of them."""
    monkeypatch.setattr(huggingface, "THREADS_MAX", 1)
    monkeypatch.setattr(huggingface, "GRACE_S", 0.0)
    hub.answer = serves([])
    origin = adapter(hub, 0.2)
    hung, end = threading.Event(), threading.Event()

    def hang(*_: object, **__: object) -> None:
        hung.set()
        end.wait(10)

    with monkeypatch.context() as hanging:
        hanging.setattr(client.Client, "send", hang)
        with pytest.raises(Unavailable, match="did not answer within"):
            await origin.resolve(REPO, None, ANONYMOUS)
    assert hung.is_set()
    with pytest.raises(Unavailable, match="did not answer within"):
        await origin.resolve(REPO, None, ANONYMOUS)
    assert not hub.asked
    end.set()
    await trio.to_thread.run_sync(wait_until, lambda: origin._limiter.borrowed_tokens == 0)
    assert (await origin.resolve(REPO, None, ANONYMOUS)).commit == SHA


@pytest.mark.trio
async def test_whoever_stops_waiting_is_free_at_once(hub: ScriptedHub) -> None:
    hub.answer = lambda _: Answer(200, delay_s=2)
    origin = adapter(hub, 3)
    with trio.move_on_after(0.1) as scope:
        await origin.resolve(REPO, None, ANONYMOUS)
    assert scope.cancelled_caught


# Against the faithful hub ----------------------------------------------------------------------------------------------

SPEC = HubSpec(
    repos=[
        RepoSpec(
            id="org/public",
            commits=[
                CommitSpec(name="first", files={"config.json": Text("{}"), "model.bin": Generated(seed="a", size=70_000)}),
                CommitSpec(
                    name="second",
                    base="first",
                    files={"config.json": Text("{ }"), "empty.txt": Text(""), "a dir/ü 1#%.bin": Generated(seed="b", size=9)},
                ),
            ],
            tags={"v1": "first"},
            pulls={"1": "first"},
            branches={"feature/x": "first"},
            renamed_from=["org/old"],
        ),
        RepoSpec(id="org/xet", files={"model.safetensors": Generated(seed="c", size=12_000_000)}, xet=True),
        RepoSpec(
            id="org/gated",
            files={"config.json": Text("{}"), "model.safetensors": Generated(seed="d", size=12_000_000)},
            gated="manual",
        ),
        RepoSpec(id="org/private", files={"config.json": Text("{}")}, private=True),
        RepoSpec(id="org/data", type="dataset", files={f"d/{n:05}.txt": Text(str(n)) for n in range(2500)}),
    ],
    users=[
        UserSpec(name="member", token="hf_member", access=["org"]),
        UserSpec(name="stranger", token="hf_stranger"),
    ],
    settings=Settings(),
)  # fmt: skip
MEMBER, STRANGER, NOBODY = Access("hf_member"), Access("hf_stranger"), Access("hf_nobody")


@pytest.fixture(scope="module")
def process() -> Iterator[HubProcess]:
    with HubProcess(SPEC) as running:
        yield running


@pytest.fixture
def real(process: HubProcess) -> Iterator[HuggingFaceHub]:
    yield HuggingFaceHub(HubConfig(endpoint=process.endpoint))
    process.reset()


def model(name: str) -> RepoId:
    return RepoId(RepoKind.MODEL, name)


def locate(
    origin: HuggingFaceHub, snapshot: Snapshot, path: str, access: Access, method: str | None = None
) -> Location:
    """Asks as a worker does."""
    request = origin.location_request(snapshot.repo, snapshot.commit, path, access)
    url, headers = request.url, dict(request.headers)
    if method == "GET":
        headers["range"] = "bytes=0-0"
    for _ in range(5):
        parts = urlsplit(url)
        connection = http.client.HTTPConnection(parts.netloc, timeout=5)
        try:
            target = f"{parts.path}?{parts.query}" if parts.query else parts.path
            connection.request(method or request.method, target, headers=headers)
            answer = connection.getresponse()
            answer.read()
        finally:
            connection.close()
        named = {name.lower(): value for name, value in answer.getheaders()}
        onward = urljoin(url, named.get("location", ""))
        if answer.status not in {301, 302, 303, 307, 308} or not origin.same_origin(onward):
            break
        url = onward
    return origin.parse_location(
        snapshot.repo,
        snapshot.commit,
        snapshot.files[path],
        access,
        status=answer.status,
        url=url,
        headers=named,
        now=time.time(),
    )


@pytest.mark.trio
async def test_every_kind_of_revision_is_resolved(real: HuggingFaceHub, process: HubProcess) -> None:
    first, second = (process.files("org/public", name).commit for name in ("v1", "main"))
    for revision, commit in [
        (None, second),
        ("main", second),
        ("v1", first),
        ("feature/x", first),
        ("refs/pr/1", first),
        (first, first),
    ]:
        assert (await real.resolve(model("org/public"), revision, ANONYMOUS)).commit == commit
    with pytest.raises(Absent, match="no revision 'v2'"):
        await real.resolve(model("org/public"), "v2", ANONYMOUS)
    with pytest.raises(Absent):
        await real.resolve(model("org/public"), "0" * 40, ANONYMOUS)


@pytest.mark.trio
async def test_a_snapshot_has_the_true_digests(real: HuggingFaceHub, process: HubProcess) -> None:
    facts = process.files("org/public")
    snapshot = await real.snapshot(model("org/public"), Commit(facts.commit), ANONYMOUS)
    assert {path: (entry.size, entry.blob and entry.blob.hex) for path, entry in snapshot.files.items()} == {
        path: (fact.size, fact.sha256 or fact.oid) for path, fact in facts.files.items()
    }
    with pytest.raises(Absent):
        await real.snapshot(model("org/public"), Commit("0" * 40), ANONYMOUS)


@pytest.mark.trio
async def test_a_dataset_of_several_pages(real: HuggingFaceHub) -> None:
    repo = RepoId(RepoKind.DATASET, "org/data")
    resolved = await real.resolve(repo, None, ANONYMOUS)
    assert len((await real.snapshot(repo, resolved.commit, ANONYMOUS)).files) == 2500


@pytest.mark.trio
async def test_a_renamed_repo_keeps_working_under_its_old_name(real: HuggingFaceHub) -> None:
    resolved = await real.resolve(model("org/old"), None, ANONYMOUS)
    assert resolved.canonical == model("org/public")
    snapshot = await real.snapshot(model("org/old"), resolved.commit, ANONYMOUS)
    assert locate(real, snapshot, "model.bin", ANONYMOUS)


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.trio
async def test_files_are_located(real: HuggingFaceHub, process: HubProcess, method: str) -> None:
    for name in ("org/public", "org/xet"):
        resolved = await real.resolve(model(name), None, MEMBER)
        snapshot = await real.snapshot(model(name), resolved.commit, MEMBER)
        for path, entry in snapshot.files.items():
            location = locate(real, snapshot, path, MEMBER, method)
            assert entry.blob is not None
            if entry.blob.algorithm is BlobAlgorithm.SHA256:
                assert location.url.startswith(process.cdn_endpoint)
                assert "authorization" not in location.headers
                assert location.expires_at is not None
                assert time.time() + 3500 < location.expires_at < time.time() + 3700
            else:
                assert location.url.startswith(process.endpoint)
                assert location.headers["authorization"] == "Bearer hf_member"
    assert not process.stats().violations


@pytest.mark.trio
async def test_a_gated_repo(real: HuggingFaceHub) -> None:
    repo = model("org/gated")
    resolved = await real.resolve(repo, None, ANONYMOUS)
    assert resolved.gated
    open_tree = await real.snapshot(repo, resolved.commit, MEMBER)
    assert all(entry.blob is not None for entry in open_tree.files.values())
    assert open_tree.gated
    assert locate(real, open_tree, "config.json", MEMBER)
    assert locate(real, open_tree, "model.safetensors", MEMBER)
    for access, words in ((ANONYMOUS, "hf auth login"), (STRANGER, "no access")):
        masked = await real.snapshot(repo, resolved.commit, access)
        assert all(entry.blob is None for entry in masked.files.values())
        with pytest.raises(Denied, match=f"org/gated is gated.*{words}"):
            locate(real, open_tree, "config.json", access)


@pytest.mark.parametrize(
    ("name", "access", "kind", "words"),
    [
        ("org/missing", ANONYMOUS, Absent, "does not exist"),
        ("org/missing", MEMBER, Absent, "does not exist"),
        ("org/private", ANONYMOUS, Absent, "private"),
        ("org/private", STRANGER, Absent, "does not exist"),
        ("org/public", NOBODY, Denied, "does not accept the token"),
    ],
)
@pytest.mark.trio
async def test_who_may_not_see_a_repo_is_told_why(
    real: HuggingFaceHub, name: str, access: Access, kind: type[MantaError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        await real.resolve(model(name), None, access)


@pytest.mark.trio
async def test_a_private_repo_is_seen_by_its_members(real: HuggingFaceHub) -> None:
    resolved = await real.resolve(model("org/private"), None, MEMBER)
    assert resolved.private
    snapshot = await real.snapshot(model("org/private"), resolved.commit, MEMBER)
    assert snapshot.private
    assert locate(real, snapshot, "config.json", MEMBER)
    with pytest.raises(Absent):
        locate(real, snapshot, "config.json", STRANGER)


@pytest.mark.parametrize("form", ["ratelimit", "retry-after", "http-date"])
@pytest.mark.trio
async def test_each_form_of_429_is_understood(real: HuggingFaceHub, process: HubProcess, form: str) -> None:
    process.add_fault(faults.TooMany(form=form, seconds=60), origin="hub")  # type: ignore[arg-type]
    with pytest.raises(Throttled) as caught:
        await real.resolve(model("org/public"), None, ANONYMOUS)
    assert 55 < caught.value.retry_after_s <= 61


@pytest.mark.parametrize(
    "fault",
    [
        faults.Fail(status=503),
        faults.Fail(status=500, body="html"),
        faults.Reset(before_headers=True),
        faults.Reset(after_bytes=10),
        faults.Truncate(after_bytes=10),
    ],
)
@pytest.mark.trio
async def test_trouble_that_passes_is_not_noticed(
    real: HuggingFaceHub, process: HubProcess, fault: faults.Action
) -> None:
    process.add_fault(fault, origin="hub", times=1, skip=1)
    commit = Commit(process.files("org/public").commit)
    assert len((await real.snapshot(model("org/public"), commit, ANONYMOUS)).files) == 4


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (faults.Fail(status=503), "HTTP 503"),
        (faults.Fail(status=200, body="html"), "check that HF_ENDPOINT is a hub"),
        (faults.Reset(before_headers=True), "the connection broke|does not keep to HTTP"),
        (faults.RedirectLoop(), "redirects in circles"),
        (faults.Redirect(), "sends on to http://127.0.0.1"),
    ],
)
@pytest.mark.trio
async def test_trouble_that_stays_is_said(
    real: HuggingFaceHub, process: HubProcess, fault: faults.Action, words: str
) -> None:
    process.add_fault(fault, origin="hub")
    with pytest.raises(Unavailable, match=words):
        await real.resolve(model("org/public"), None, MEMBER)
    assert not process.stats().violations


@pytest.mark.parametrize(
    "put",
    [{"X-Repo-Commit": "0" * 40}, {"X-Linked-Size": "1"}, {"X-Linked-ETag": f'"{"0" * 64}"'}],
)
@pytest.mark.trio
async def test_a_location_that_contradicts_the_tree_is_corrupt(
    real: HuggingFaceHub, process: HubProcess, put: dict[str, str]
) -> None:
    commit = Commit(process.files("org/xet").commit)
    snapshot = await real.snapshot(model("org/xet"), commit, ANONYMOUS)
    process.add_fault(faults.Headers(put=put), origin="hub")
    with pytest.raises(Corrupt):
        locate(real, snapshot, "model.safetensors", ANONYMOUS)


@pytest.mark.trio
async def test_only_the_hub_is_the_hub(real: HuggingFaceHub, process: HubProcess) -> None:
    assert real.same_origin(f"{process.endpoint}/x?y")
    assert not real.same_origin(process.cdn_endpoint)
    assert not real.same_origin("/relative")


@pytest.mark.trio
async def test_a_private_certificate_authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost"
    names = "subjectAltName=IP:127.0.0.1,DNS:localhost"
    try:
        subprocess.run(
            [*command.split(), "-addext", names, "-keyout", key, "-out", certificate], check=True, capture_output=True
        )
    except FileNotFoundError:
        pytest.skip("needs the openssl command to make a certificate")
    with HubProcess(HubSpec(repos=[RepoSpec(id="org/name")]), tls=(certificate, key)) as process:
        origin = HuggingFaceHub(HubConfig(endpoint=process.endpoint))
        with pytest.raises(Unavailable, match=r"no trusted TLS connection .*self.signed.*SSL_CERT_FILE"):
            await origin.resolve(REPO, None, ANONYMOUS)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        close_session()
        assert (await origin.resolve(REPO, None, ANONYMOUS)).commit
        monkeypatch.undo()
        close_session()


@pytest.mark.trio
async def test_two_hubs_in_one_process_do_not_mix(real: HuggingFaceHub) -> None:
    with scripted_hub() as other:
        other.answer = serves([])
        second = adapter(other)
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(second.resolve, REPO, None, ANONYMOUS)
                nursery.start_soon(real.resolve, model("org/public"), None, MEMBER)
        assert len(other.asked) == 5
        assert all("authorization" not in asked.headers for asked in other.asked)
