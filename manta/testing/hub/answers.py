"""The Hub's protocol as a function: a Request goes in, a Reply comes out. No sockets, no clock of its own.

Defines what each endpoint answers, who may see what, and how the Hub words its errors; here and only here.
server.py calls it from its event loop for every request; faults are applied to its replies afterwards.
"""

from __future__ import annotations

import base64
import bisect
import hashlib
import hmac
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal, TypeVar
from urllib.parse import parse_qs, quote, urlencode, urlsplit

from manta.testing.hub import routes
from manta.testing.hub.limits import Allowance, Caller, QuotaLedger
from manta.testing.hub.reply import Reply, Request, content_reply, json_reply, text_reply, xml_error
from manta.testing.hub.repository import EPOCH, Blob, Catalogue, Commit, Entry, Repository, User
from manta.testing.hub.routes import Origin, Route
from manta.testing.hub.signing import Signer

# What stands in for a sha256 in the tree of a gated repo that the caller may not read.
MASK = "*" * 64

_Row = TypeVar("_Row")

_UNPRINTABLE = re.compile(r"[^\x20-\x7e]")

TREE_PAGE = 1000
TREE_PAGE_EXPANDED = 50
LIST_PAGE = 1000


@dataclass(frozen=True)
class Policy:
    """How a hub behaves where hubs differ.

    signed_url_lifetime_s: seconds a CDN URL stays good. redirect_blobs: send LFS files through the CDN, as
    the Hub does, or answer them directly on the hub's own port. cdn_allows_head: whether HEAD works on a
    signed URL (the Hub signs for GET only). required_token: without it nothing is readable. any_token:
    accept unknown tokens as anonymous instead of 401, for hubs with no users of their own.
    """

    signed_url_lifetime_s: float = 3600
    redirect_blobs: bool = True
    cdn_allows_head: bool = False
    required_token: str = ""
    any_token: bool = False
    quota_headers: bool = True


def error(status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None) -> Reply:
    """An error as the Hub words it: JSON for people, X-Error-Code for the client library."""
    all_headers = {"X-Error-Message": _UNPRINTABLE.sub("?", message), **(headers or {})}
    if code:
        all_headers["X-Error-Code"] = code
    return json_reply({"error": message}, status, all_headers)


def entry_not_found(path: str, commit: Commit) -> Reply:
    """404 for a file that a commit does not have."""
    return error(404, f"Entry not found: {path}", "EntryNotFound", {"X-Repo-Commit": commit.id})


def expired_or_forged(verdict: Literal["expired", "forged"]) -> Reply:
    """403 as the CDN words it."""
    if verdict == "expired":
        return xml_error(403, "AccessDenied", "Request has expired")
    return xml_error(403, "SignatureDoesNotMatch", "The request signature does not match")


class _Refused(Exception):
    """Ends an answer early with an error reply."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.status)
        self.reply = reply


class Answers:
    """Answers requests about one catalogue.

    `ports` tells on which port each origin listens, for absolute URLs; the driver fills it in.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        *,
        policy: Policy,
        quotas: QuotaLedger,
        now: Callable[[], float],
    ) -> None:
        self.catalogue = catalogue
        self.policy = policy
        self.quotas = quotas
        self.signer = Signer()
        self.ports: dict[Origin, int] = {}
        self._now = now

    def files_of(self, route: Route) -> tuple[str, Sequence[str]]:
        """The repo a request is about and the paths it may mean, for the log and for faults.

        A CDN URL names a digest; every path of the repo that ever had it counts.
        """
        if route.kind != "blob":
            return route.repo_id, (route.path,) if route.path else ()
        repo = self.catalogue.repo_by_key(route.repo_key)
        if repo is None:
            return "", ()
        return repo.id, repo.paths_of(route.sha256)

    def answer(self, request: Request, route: Route) -> Reply:
        """The reply to a request, as the Hub would give it with nothing wrong."""
        try:
            if request.origin != "hub":
                return self._blob(request, route)
            return self._hub(request, route)
        except _Refused as refused:
            return refused.reply

    # -- the hub ------------------------------------------------------------------------------------------

    def _hub(self, request: Request, route: Route) -> Reply:
        user = self._user(request)
        allowance: Allowance = "resolvers" if route.kind == "resolve" else "api"
        if route.kind == "resolve-cache":  # the redirect to it has been counted already
            return self._dispatch(request, route, user)
        caller: Caller = "anonymous" if user is None else "pro" if user.pro else "user"
        state = self.quotas.take(allowance, caller, user.name if user else request.client, self._now())
        if state.exhausted:
            reply = error(429, "You have reached your rate limit.")
        else:
            try:
                reply = self._dispatch(request, route, user)
            except _Refused as refused:
                reply = refused.reply
        return replace(reply, headers={**reply.headers, **state.headers()}) if self.policy.quota_headers else reply

    def _dispatch(self, request: Request, route: Route, user: User | None) -> Reply:
        if route.kind == "unknown":
            return error(404, "Sorry, we can't find the page you are looking for.")
        if route.kind == "paths-info":
            if request.method != "POST":
                return error(405, "paths-info is asked with POST")
        elif request.method not in ("GET", "HEAD"):
            return error(405, "this hub is read-only")
        if route.kind == "whoami":
            return self._whoami(user)
        if route.kind == "list":
            return self._list(request, route, user)
        return self._repo_endpoint(request, route, user)

    def _repo_endpoint(self, request: Request, route: Route, user: User | None) -> Reply:
        repo = self._repo(request, route, user)
        open_ = not repo.gated or (user is not None and user.may_read(repo))
        if route.kind == "refs":
            return self._refs(request, repo)
        commit = repo.commit(route.revision)
        if commit is None:
            return error(404, f"Invalid rev id: {route.revision}", "RevisionNotFound")
        match route.kind:
            case "info":
                return self._info(request, repo, commit, open_=open_)
            case "tree":
                return self._tree(request, route, commit, open_=open_)
            case "commits":
                return _commits(repo, commit)
            case "paths-info":
                return _paths_info(request, commit, open_=open_)
            case _:
                return self._file(request, route, repo, commit, user)

    def _user(self, request: Request) -> User | None:
        """Who asks; refuses tokens that nobody has."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        token = token.strip() if scheme.lower() == "bearer" else ""
        required = self.policy.required_token
        if required and not hmac.compare_digest(token.encode(), required.encode()):
            raise _Refused(error(401, "This hub answers only with its token: set HF_TOKEN."))
        user = self.catalogue.users.get(token)
        if token and user is None and not self.policy.any_token:
            raise _Refused(error(401, "Invalid credentials in Authorization header"))
        return user

    def _repo(self, request: Request, route: Route, user: User | None) -> Repository:
        """The repo asked for; refuses what must not be seen and redirects old names."""
        new_id = self.catalogue.renamed.get((route.repo_type, route.repo_id))
        old_part = quote(route.repo_id)
        if new_id is not None and old_part in request.raw_path:
            path = request.raw_path.replace(old_part, quote(new_id), 1)
            raise _Refused(_redirect(307, path + (f"?{request.raw_query}" if request.raw_query else "")))
        repo = self.catalogue.repo(route.repo_type, new_id or route.repo_id)
        hidden = repo is not None and repo.private and (user is None or not user.may_read(repo))
        if repo is None or hidden:
            # The Hub does not tell strangers whether a repo exists, and anonymous callers not even a code.
            if user is None and not self.policy.any_token:
                raise _Refused(error(401, "Invalid username or password."))
            raise _Refused(error(404, "Repository not found", "RepoNotFound"))
        return repo

    def _whoami(self, user: User | None) -> Reply:
        if user is None:
            return error(401, "Invalid username or password.")
        return json_reply(
            {
                "type": "user",
                "id": hashlib.sha1(user.name.encode(), usedforsecurity=False).hexdigest()[:24],
                "name": user.name,
                "fullname": user.name,
                "isPro": user.pro,
                "orgs": [],
                "auth": {"type": "access_token", "accessToken": {"displayName": user.name, "role": "read"}},
            }
        )

    def _list(self, request: Request, route: Route, user: User | None) -> Reply:
        author, search = request.first("author"), request.first("search").lower()
        repos = [
            repo
            for (type_, _), repo in sorted(self.catalogue.repos.items())
            if type_ == route.repo_type
            and not repo.deleted
            and (not repo.private or (user is not None and user.may_read(repo)))
            and (not author or repo.namespace == author)
            and search in repo.id.lower()
        ]
        limit = _whole_number(request.first("limit"), LIST_PAGE)
        rows, link = _page(request, repos, limit, key=lambda repo: repo.id)
        return json_reply([_repo_facts(repo, repo.commit("main")) for repo in rows], headers=link)

    def _info(self, request: Request, repo: Repository, commit: Commit, *, open_: bool) -> Reply:
        facts = _repo_facts(repo, commit)
        siblings: list[dict[str, object]] = []
        for path, blob in commit.tree.files.items():
            sibling: dict[str, object] = {"rfilename": path}
            if request.first("blobs").lower() in ("true", "1"):
                sibling |= {"size": blob.size, "blobId": blob.oid}
                if blob.sha256:
                    sibling["lfs"] = {
                        "sha256": blob.sha256 if open_ else MASK,
                        "size": blob.size,
                        "pointerSize": blob.pointer_size,
                    }
            siblings.append(sibling)
        facts |= {
            "siblings": siblings,
            "spaces": [],
            "usedStorage": sum(blob.size for blob in commit.tree.files.values()),
        }
        wanted = request.query.get("expand") or request.query.get("expand[]")
        if wanted:
            facts = {key: value for key, value in facts.items() if key in {"_id", "id", *wanted}}
        return json_reply(facts)

    def _refs(self, request: Request, repo: Repository) -> Reply:
        def rows(prefix: str, refs: Mapping[str, str]) -> list[dict[str, str]]:
            return [
                {"name": name, "ref": f"refs/{prefix}/{name}", "targetCommit": sha}
                for name, sha in sorted(refs.items())
            ]

        answer = {
            "branches": rows("heads", repo.refs.branches),
            "tags": rows("tags", repo.refs.tags),
            "converts": rows("convert", repo.refs.converts),
        }
        if request.first("include_prs") in ("1", "true"):
            answer["pullRequests"] = rows("pr", repo.refs.pulls)
        return json_reply(answer)

    def _tree(self, request: Request, route: Route, commit: Commit, *, open_: bool) -> Reply:
        recursive = request.first("recursive").lower() in ("true", "1")
        expand = request.first("expand").lower() in ("true", "1")
        entries = commit.tree.walk(route.path) if recursive else commit.tree.children(route.path)
        if entries is None:
            return entry_not_found(route.path, commit)
        size = TREE_PAGE_EXPANDED if expand else TREE_PAGE
        limit = min(size, _whole_number(request.first("limit"), size))
        rows, link = _page(request, entries, limit, key=lambda row: row[0])
        return json_reply(
            [_entry_facts(path, entry, commit, expand=expand, open_=open_) for path, entry in rows], headers=link
        )

    # -- files --------------------------------------------------------------------------------------------

    def _file(self, request: Request, route: Route, repo: Repository, commit: Commit, user: User | None) -> Reply:
        if repo.gated and (user is None or not user.may_read(repo)):
            status, advice = (401, "Please log in.") if user is None else (403, "Ask for access on its page.")
            message = f"Access to {repo.type} {repo.id} is restricted. {advice}"
            return error(status, message, "GatedRepo")
        blob = commit.tree.files.get(route.path)
        if blob is None or (blob.sha256 and route.kind == "resolve-cache"):
            return entry_not_found(route.path, commit)
        common = {
            "X-Repo-Commit": commit.id,
            "Accept-Ranges": "bytes",
            "Content-Disposition": f"inline; filename*=UTF-8''{quote(route.path.rpartition('/')[2])};",
        }
        if blob.sha256:
            return self._lfs_file(request, route, repo, commit, blob, common)
        if route.kind == "resolve" and self.policy.redirect_blobs and not (repo.gated or repo.private):
            cached = routes.resolve_cache_path(repo.type, repo.id, commit.id, route.path)
            query = urlencode({request.raw_path: "", "etag": f'"{blob.oid}"'})
            return _redirect(307, f"{cached}?{query}", {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"})
        headers = {**common, "Content-Type": "text/plain; charset=utf-8", "ETag": f'"{blob.id}"'}
        return content_reply(request, blob.content, headers, blob=blob.id)

    def _lfs_file(
        self,
        request: Request,
        route: Route,
        repo: Repository,
        commit: Commit,
        blob: Blob,
        common: Mapping[str, str],
    ) -> Reply:
        headers = {
            "X-Repo-Commit": commit.id,
            "X-Linked-Size": str(blob.size),
            "X-Linked-ETag": f'"{blob.sha256}"',
            "Accept-Ranges": "bytes",
        }
        if not self.policy.redirect_blobs:
            headers |= {**common, "Content-Type": "application/octet-stream", "ETag": f'"{blob.sha256}"'}
            return content_reply(request, blob.content, headers, blob=blob.id)
        if blob.xet_hash:
            token = f"{self.base_url(request)}{routes.api_path(repo.type, repo.id)}/xet-read-token/{commit.id}"
            server = f"{self.base_url(request, 'other')}/v1/reconstructions/{blob.xet_hash}"
            headers["X-Xet-Hash"] = blob.xet_hash
            headers["Link"] = f'<{token}>; rel="xet-auth", <{server}>; rel="xet-reconstruction-info"'
        expires = int(self._now() + self.policy.signed_url_lifetime_s)
        return _redirect(302, self.signed_url(request, repo, blob.sha256, route.path, expires), headers)

    def signed_url(self, request: Request, repo: Repository, sha256: str, path: str, expires: int) -> str:
        """A CDN URL for an LFS object, good until `expires` (Unix seconds)."""
        blob_path = routes.blob_path(repo.key, sha256)
        return f"{self.base_url(request, 'cdn')}{blob_path}?{self.signer.query(blob_path, expires, path)}"

    def base_url(self, request: Request, origin: Origin = "hub") -> str:
        """scheme://host:port of an origin, with the host name the client itself used."""
        if origin == request.origin:
            return f"{request.scheme}://{request.host}"
        name = urlsplit(f"//{request.host}").hostname or "127.0.0.1"
        name = f"[{name}]" if ":" in name else name
        return f"{request.scheme}://{name}:{self.ports[origin]}"

    def _blob(self, request: Request, route: Route) -> Reply:
        if "authorization" in request.headers:
            return xml_error(400, "InvalidArgument", "Only one auth mechanism allowed")
        if request.method not in ("GET", "HEAD"):
            return xml_error(405, "MethodNotAllowed", "The specified method is not allowed")
        verdict = self.signer.check(request.raw_path, request.query, self._now())
        if request.method == "HEAD" and not self.policy.cdn_allows_head:
            verdict = "forged"  # the URL was signed for GET
        if verdict != "valid":
            return expired_or_forged(verdict)
        repo = self.catalogue.repo_by_key(route.repo_key)
        blob = None if repo is None else repo.lfs_blob(route.sha256)
        if blob is None:
            return xml_error(404, "NoSuchKey", "The specified key does not exist.")
        headers = {
            "Content-Type": "application/octet-stream",
            # The storage's own ETag: looks like a digest of the content and is not one.
            "ETag": f'"{hashlib.sha1(blob.sha256.encode(), usedforsecurity=False).hexdigest()[:32]}"',
            "Content-Disposition": request.first("response-content-disposition"),
        }
        return content_reply(request, blob.content, headers, blob=blob.id)


def _redirect(status: int, location: str, headers: Mapping[str, str] | None = None) -> Reply:
    text = f"Redirecting to {location}"
    return text_reply(status, text, "text/plain; charset=utf-8", {"Location": location, **(headers or {})})


def _whole_number(text: str, default: int) -> int:
    return int(text) if text.isdecimal() and int(text) > 0 else default


def _page(
    request: Request, rows: Sequence[_Row], limit: int, *, key: Callable[[_Row], str]
) -> tuple[Sequence[_Row], dict[str, str]]:
    """One page of `rows`, which are sorted by `key`, and the Link header to the next, if any.

    The cursor names the last row sent, so that a page stays right when rows come and go in between.
    """
    cursor = request.first("cursor")
    first = 0
    if cursor:
        try:
            last = base64.urlsafe_b64decode(cursor.encode()).decode()
        except ValueError as broken:
            raise _Refused(error(400, "Invalid cursor")) from broken
        first = bisect.bisect_right(rows, last, key=key)
    page = rows[first : first + limit]
    if first + limit >= len(rows):
        return page, {}
    query = [(name, value) for name, values in request.query.items() if name != "cursor" for value in values]
    query.append(("cursor", base64.urlsafe_b64encode(key(page[-1]).encode()).decode()))
    url = f"{request.scheme}://{request.host}{request.raw_path}?{urlencode(query)}"
    return page, {"Link": f'<{url}>; rel="next"'}


def _date(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _repo_facts(repo: Repository, commit: Commit | None) -> dict[str, object]:
    """What info and list say about a repo itself."""
    facts: dict[str, object] = {
        "_id": repo.key[:24],
        "id": repo.id,
        "author": repo.namespace or repo.id,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "createdAt": _date(EPOCH),
    }
    if repo.type == "model":
        facts["modelId"] = repo.id
    if commit is not None:
        facts |= {"sha": commit.id, "lastModified": _date(commit.date)}
    return facts


def _entry_facts(path: str, entry: Entry, commit: Commit, *, expand: bool, open_: bool) -> dict[str, object]:
    """What tree and paths-info say about a file or folder."""
    facts: dict[str, object] = {"type": "directory", "oid": entry.oid, "size": 0, "path": path}
    if isinstance(entry, Blob):
        facts |= {"type": "file", "size": entry.size}
        if entry.sha256:
            facts["lfs"] = {
                "oid": entry.sha256 if open_ else MASK,
                "size": entry.size,
                "pointerSize": entry.pointer_size,
            }
        if entry.xet_hash:
            facts["xetHash"] = entry.xet_hash if open_ else MASK
    if expand:
        # The last commit of a path is not tracked: the whole tree counts as written by this one.
        facts["lastCommit"] = {"id": commit.id, "title": commit.title, "date": _date(commit.date)}
        if isinstance(entry, Blob):
            facts["securityFileStatus"] = {"status": "unscanned", "avScan": None, "pickleImportScan": None}
    return facts


def _commits(repo: Repository, commit: Commit) -> Reply:
    rows = [
        {
            "id": each.id,
            "title": each.title,
            "message": "",
            "authors": [{"user": "manta"}],
            "date": _date(each.date),
        }
        for each in repo.history(commit)
    ]
    return json_reply(rows)


def _paths_info(request: Request, commit: Commit, *, open_: bool) -> Reply:
    try:
        if "json" in request.headers.get("content-type", ""):
            form = json.loads(request.body)
            paths, expand = [str(path) for path in form["paths"]], bool(form.get("expand"))
        else:
            fields = parse_qs(request.body.decode(), keep_blank_values=True)
            paths, expand = fields["paths"], fields.get("expand", [""])[0].lower() in ("true", "1")
    except (ValueError, KeyError, TypeError, AttributeError):
        return error(400, "paths-info wants a form or JSON object with paths")
    found = ((path.strip("/"), commit.tree.entry(path.strip("/"))) for path in paths)
    return json_reply(
        [_entry_facts(path, entry, commit, expand=expand, open_=open_) for path, entry in found if entry is not None]
    )
