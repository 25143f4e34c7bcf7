"""The Hugging Face Hub as an origin, here and only here. Contract: `manta.hub.origin.Origin`.

Metadata goes through huggingface_hub, which is synchronous, so in a bounded number of threads; file bytes go through the workers.
Built by the daemon; its methods belong to the trio thread. huggingface_hub is imported at the first question, in a thread: 16 MB and
0.3 s, which a process that only handles locations, or serves what is cached, does not pay.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import trio

from manta import __version__
from manta.config import HubConfig
from manta.errors import Absent, Corrupt, Denied, Invalid, MantaError, Throttled, Unavailable, Unreachable
from manta.hub import location
from manta.hub.origin import Access, Location, OriginRequest, Resolved, origin_of
from manta.hub.quota import Quota, parse_quota
from manta.hub.refusal import Question, refusal, unusable
from manta.model.ids import BlobAlgorithm, BlobId, Commit, RepoId, RepoKind, is_commit
from manta.model.snapshot import FileEntry, Snapshot

if TYPE_CHECKING:
    from huggingface_hub.hf_api import HfApi

    from manta.hub.client import Broken

T = TypeVar("T")

THREADS_MAX = 8
"""Questions to the hub in flight, each a thread. More wait, within their own deadlines.

A thread whose asker has gone still counts until it ends. That is soon after its deadline, but for one thing: the system's name lookup has
no deadline and may take half a minute. So eight is the bound also when DNS hangs. The Hub's own clients use 8 connections.
"""

GRACE_S = 0.5
"""How much longer than the thread the asker waits, so that the thread's own account of what went wrong arrives."""

PAGE_ENTRIES = 1000
"""Entries of a page of the Hub's tree listing: as many as one thread takes per deadline."""

ENTRIES_MAX = 250_000
"""The largest tree that is shown. The Hub advises against more than 100,000 files in a repo; 200,000 take about 110 MB here."""

_MEMORY_MAX = 1024
"""How many repos' gated/private marks are remembered."""

_OUT_OF_REACH = frozenset({"name", "unconnected", "refused", "connection"})
"""What no answer came of. The other failures say that something is there."""

_MASK = "*"


class HuggingFaceHub:
    """One hub that speaks the Hugging Face protocol: huggingface.co, a mirror, a test hub. Raises Invalid for a bad endpoint.

    `latest` says with what to ask on behalf of an access: see `manta.hub.identity`.
    """

    def __init__(self, config: HubConfig, latest: Callable[[Access], Access] = lambda access: access) -> None:
        self._latest = latest
        self._endpoint = config.endpoint.rstrip("/")
        self._timeout_s = config.timeout_s
        parts = urlsplit(self._endpoint)
        origin_of(self._endpoint)
        if parts.username or parts.query or parts.fragment:
            # Credentials in it would end up in sentences, and would replace the token.
            raise Invalid(
                "The hub's endpoint (HF_ENDPOINT) must be a plain http or https URL, such as https://huggingface.co."
            )
        self._limiter = trio.CapacityLimiter(THREADS_MAX)
        self._api: HfApi | None = None
        self._quotas: dict[str, tuple[Quota, float]] = {}  # and when it was told, by the monotonic clock
        self._marks: OrderedDict[tuple[RepoId, Access], tuple[bool, bool]] = OrderedDict()
        self._throttled_until: dict[Access, float] = {}
        self.throttles = 0
        """Questions that were answered with a request to wait (HTTP 429)."""

    @property
    def endpoint(self) -> str:
        return self._endpoint

    @property
    def quotas(self) -> Mapping[str, Quota]:
        """The hub's request quotas by kind ("api", "resolvers"), each as the last answer had it, whoever asked; `reset_s` is from now."""
        now = time.monotonic()
        # Of a copy: threads write to it.
        return {
            kind: replace(quota, reset_s=max(0, round(quota.reset_s - (now - told))))
            for kind, (quota, told) in dict(self._quotas).items()
        }

    def note_headers(self, headers: Mapping[str, str]) -> None:
        """Takes the quota from an answer's headers (names in lower case): also from one that a worker got."""
        quota = parse_quota(headers)
        # A hub has two or three kinds; whoever sends more is not a hub.
        if quota is not None and (quota.kind in self._quotas or len(self._quotas) < 8):
            self._quotas[quota.kind] = quota, time.monotonic()

    async def resolve(self, repo: RepoId, revision: str | None, access: Access) -> Resolved:
        access = self._latest(access)
        question = Question(self._endpoint, repo, revision, access)

        # Without it the answer names every file: 10 MB and a second for 200,000. Spaces have no gate. (The library annotates it wrongly.)
        expand: Any = ["sha", "private"] if repo.kind is RepoKind.SPACE else ["sha", "private", "gated"]

        def ask(api: HfApi) -> tuple[str, str | None, bool, bool]:
            info = api.repo_info(
                repo.name,
                repo_type=_type(repo),
                revision=revision,
                expand=expand,
                token=access.token or False,
            )
            return info.id, info.sha, bool(getattr(info, "gated", False)), bool(info.private)

        name, sha, gated, private = await self._ask(question, ask)
        if sha is None:
            raise Absent(f"{repo} has no commits on {self._endpoint}: there is nothing to read yet.")
        if not is_commit(sha):
            raise unusable(question, "a commit that is none")
        if revision is not None and is_commit(revision) and sha != revision:
            raise Corrupt(
                f"{self._endpoint} was asked for {question.subject} and answered with commit {sha[:12]}: try again later."
            )
        try:
            canonical = RepoId(repo.kind, name)
        except Invalid:
            canonical = repo
        self._marks[repo, access] = (gated, private)
        self._marks.move_to_end((repo, access))
        if len(self._marks) > _MEMORY_MAX:
            self._marks.popitem(last=False)
        return Resolved(repo, revision, Commit(sha), gated, private, canonical)

    async def snapshot(self, repo: RepoId, commit: Commit, access: Access) -> Snapshot:
        access = self._latest(access)
        if (repo, access) not in self._marks:
            # The listing does not say whether the repo is gated or private.
            await self.resolve(repo, commit, access)
        gated, private = self._marks[repo, access]
        question = Question(self._endpoint, repo, commit, access)

        def begin(api: HfApi) -> Iterator[Any]:
            return iter(
                api.list_repo_tree(
                    repo.name,
                    recursive=True,
                    expand=False,
                    revision=commit,
                    repo_type=_type(repo),
                    token=access.token or False,
                )
            )

        listing = await self._ask(question, begin)
        files: list[FileEntry] = []
        entries = 0
        while True:
            # The listing asks for its next page when it runs out, so this is at most one question for a hub with full pages.
            page = await self._ask(question, lambda _: _files(question, itertools.islice(listing, PAGE_ENTRIES)))
            files.extend(page.files)
            entries += page.entries
            if page.entries < PAGE_ENTRIES:
                break
            if entries > ENTRIES_MAX:
                raise Unavailable(
                    f"{question.subject} has more than {ENTRIES_MAX} entries, more than Manta shows: mount another revision."
                )
        masked = any(entry.blob is None for entry in files)
        if gated and files and not masked and not any(_is_lfs(entry) for entry in files):
            # Only LFS digests are ever masked, so this tree does not tell whether its files may be had.
            masked = not await self.may_read(repo, commit, files[0], access)
        if masked:
            # Whoever may not have one file of a gated repo may have none, also of those that a cache shared with others holds.
            gated, files = True, [replace(entry, blob=None) for entry in files]
        return Snapshot.of(repo, commit, files, gated=gated, private=private)

    async def may_read(self, repo: RepoId, commit: Commit, entry: FileEntry, access: Access) -> bool:
        access = self._latest(access)
        request = self.location_request(repo, commit, entry.path, access)

        def ask(_: HfApi) -> None:
            from huggingface_hub import get_session

            get_session().request(request.method, request.url, headers=dict(request.headers))

        try:
            await self._ask(Question(self._endpoint, repo, commit, access, entry.path), ask)
        except Denied:
            return False
        return True

    def location_request(self, repo: RepoId, commit: Commit, path: str, access: Access) -> OriginRequest:
        return location.location_request(self._endpoint, repo, commit, path, self._latest(access))

    def parse_location(
        self,
        repo: RepoId,
        commit: Commit,
        entry: FileEntry,
        access: Access,
        *,
        status: int,
        url: str,
        headers: Mapping[str, str],
        now: float,
    ) -> Location:
        return location.parse_location(
            self._endpoint, repo, commit, entry, self._latest(access), status=status, url=url, headers=headers, now=now
        )

    def same_origin(self, url: str) -> bool:
        try:
            return origin_of(url) == origin_of(self._endpoint)
        except Invalid:
            return False

    async def _ask(self, question: Question, work: Callable[[HfApi], T]) -> T:
        """Runs `work` in a thread, within the deadline, and gives its failure as a sentence."""
        self._refuse_while_throttled(question)
        over = threading.Event()
        try:
            with trio.fail_after(self._timeout_s + GRACE_S):
                return await trio.to_thread.run_sync(
                    self._in_thread,
                    question,
                    work,
                    over,
                    time.monotonic() + self._timeout_s,
                    abandon_on_cancel=True,
                    limiter=self._limiter,
                )
        except trio.TooSlowError:
            raise self._silence(question) from None
        except Throttled as error:
            self.throttles += 1
            self._throttled_until[question.access] = trio.current_time() + error.retry_after_s
            raise
        finally:
            over.set()

    def _in_thread(self, question: Question, work: Callable[[HfApi], T], over: threading.Event, deadline: float) -> T:
        from manta.hub import client

        bounds = client.Exchange(self._endpoint, deadline, self.note_headers, over)
        try:
            with client.exchange(bounds):
                return work(self._library())
        except client.Refused as error:
            raise refusal(question, error.status, error.headers, time.time(), error.body) from None
        except client.Broken as error:
            raise self._failure(question, error) from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            # The library takes an answer apart as it comes: what is no JSON, or JSON of another shape, fails in one of these ways.
            raise unusable(question, f"something else than the Hub's JSON ({type(error).__name__})") from error

    def _library(self) -> HfApi:
        if self._api is None:
            from huggingface_hub.hf_api import HfApi

            self._api = HfApi(endpoint=self._endpoint, token=False, library_name="manta", library_version=__version__)
        return self._api

    def _refuse_while_throttled(self, question: Question) -> None:
        """A hub that asked for a pause is not asked: that would only prolong it."""
        now = trio.current_time()
        for access, until in list(self._throttled_until.items()):
            if until <= now:
                del self._throttled_until[access]
        until = self._throttled_until.get(question.access, now)
        if until > now:
            raise Throttled(
                f"{self._endpoint} asked for a pause that ends in {until - now:.0f} s, so it was not asked for"
                f" {question.subject}: try again then.",
                until - now,
            )

    def _silence(self, question: Question) -> Unreachable:
        return Unreachable(
            f"{self._endpoint} did not answer within {self._timeout_s:.0f} s when asked for {question.subject}:"
            " check the network, or try again."
        )

    def _failure(self, question: Question, broken: Broken) -> MantaError:
        hub, subject = self._endpoint, question.subject
        match broken.kind:
            case "timeout" | "abandoned":
                return self._silence(question)
            case "name":
                host = urlsplit(hub).hostname
                why = f"the name {host!r} has no address. Check HF_ENDPOINT, DNS and the network"
            case "unconnected":
                why = "it took no connection in time. Check the network and its firewalls, or try again"
            case "refused":
                why = "nothing listens there (connection refused). Check HF_ENDPOINT and that the hub runs"
            case "tls":
                why = (
                    f"no trusted TLS connection came about ({broken.detail or 'handshake failed'}). Check HF_ENDPOINT;"
                    " for a private certificate authority set SSL_CERT_FILE"
                )
            case "proxy":
                why = "the proxy did not pass the question on. Check HTTPS_PROXY, HTTP_PROXY and NO_PROXY"
            case "redirect":
                where = f"it sends on to {broken.detail}" if broken.detail else "it redirects in circles"
                why = f"{where}. Set HF_ENDPOINT to the hub itself"
            case "size":
                return unusable(question, broken.detail)
            case "connection":
                why = "the connection broke. Check the network, or try again"
            case "protocol":
                why = f"what answers there does not keep to HTTP ({broken.detail}). Check HF_ENDPOINT"
        kind = Unreachable if broken.kind in _OUT_OF_REACH else Unavailable
        return kind(f"{hub} could not be asked for {subject}: {why}.")


@dataclass(frozen=True, slots=True)
class _Page:
    files: list[FileEntry]
    entries: int
    """Files and folders."""


def _type(repo: RepoId) -> str:
    """The library's word for a kind of repo: the singular of the URL's."""
    return repo.kind.value.removesuffix("s")


def _files(question: Question, entries: Iterator[Any]) -> _Page:
    """Reads entries of the library's listing. Raises Corrupt for what no tree can hold."""
    files: list[FileEntry] = []
    count = 0
    for entry in entries:
        count += 1
        # Folders have no size.
        size = getattr(entry, "size", None)
        if size is None:
            continue
        path, oid = entry.path, entry.blob_id
        lfs = entry.lfs.sha256 if entry.lfs is not None else None
        if not isinstance(path, str) or not isinstance(size, int) or size < 0:
            raise Corrupt(f"The tree of {question.subject} on {question.endpoint} holds an entry that is no file.")
        try:
            blob = BlobId(BlobAlgorithm.GIT_SHA1, oid) if lfs is None else _lfs_blob(lfs)
        except (Invalid, TypeError):
            raise Corrupt(
                f"The tree of {question.subject} on {question.endpoint} has no digest for {path!r}."
            ) from None
        files.append(FileEntry(path, size, blob, oid if isinstance(oid, str) else ""))
    return _Page(files, count)


def _is_lfs(entry: FileEntry) -> bool:
    return entry.blob is None or entry.blob.algorithm is BlobAlgorithm.SHA256


def _lfs_blob(oid: str) -> BlobId | None:
    # Gated repos show the tree to everyone, with asterisks for what would identify the content.
    return None if oid and not oid.strip(_MASK) else BlobId(BlobAlgorithm.SHA256, oid)
