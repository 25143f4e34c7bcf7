"""The Hub's URLs: which endpoint, repo, revision and path a request names. Pure; the only parser of paths.

Works on the raw (still quoted) path, since a revision such as refs/pr/1 arrives as one quoted segment.
Used by answers.py to answer and by server.py to find faults that match.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote, unquote

from manta.testing.hub.repository import RepoType

Kind = Literal[
    "whoami",
    "list",
    "info",
    "tree",
    "refs",
    "commits",
    "paths-info",
    "resolve",
    "resolve-cache",
    "blob",
    "admin",
    "unknown",
]
Origin = Literal["hub", "cdn", "other"]
ORIGINS: tuple[Origin, ...] = ("hub", "cdn", "other")

# What one repo type is called in URLs of the API.
PLURALS: dict[RepoType, str] = {"model": "models", "dataset": "datasets", "space": "spaces"}
_SINGULARS: dict[str, RepoType] = {plural: type_ for type_, plural in PLURALS.items()}

_VERBS = ("revision", "tree", "refs", "commits", "paths-info")
_HEX40 = re.compile(r"[0-9a-f]{40}")
_HEX64 = re.compile(r"[0-9a-f]{64}")
_REF_KINDS = ("pr", "convert", "heads", "tags")


@dataclass(frozen=True, slots=True)
class Route:
    """What a URL names; fields that its kind has no use for are empty."""

    kind: Kind
    repo_type: RepoType = "model"
    repo_id: str = ""
    revision: str = "main"
    path: str = ""
    repo_key: str = ""
    sha256: str = ""


UNKNOWN = Route("unknown")


def parse_route(origin: Origin, raw_path: str) -> Route:
    """The route of a raw path (without its query) at an origin."""
    parts = [unquote(part) for part in raw_path.split("/")[1:]]
    if origin != "hub":
        return _parse_blob(parts)
    if parts[0] == "_hub":
        return Route("admin", path="/".join(parts[1:]))
    if parts[0] != "api":
        return _parse_resolve(parts)
    if parts[1:] == ["whoami-v2"]:
        return Route("whoami")
    if parts[1:2] == ["resolve-cache"]:
        return _parse_resolve_cache(parts[2:])
    if len(parts) >= 2 and parts[1] in _SINGULARS:
        return _parse_api(_SINGULARS[parts[1]], [part for part in parts[2:] if part])
    return UNKNOWN


def _parse_blob(parts: list[str]) -> Route:
    if len(parts) == 5 and parts[0] == "repos" and _HEX64.fullmatch(parts[3]) and _HEX64.fullmatch(parts[4]):
        return Route("blob", repo_key=parts[3], sha256=parts[4])
    return UNKNOWN


def _parse_resolve(parts: list[str]) -> Route:
    type_: RepoType = "model"
    if parts[0] in ("datasets", "spaces"):
        type_, parts = _SINGULARS[parts[0]], parts[1:]
    for verb in (2, 1):
        if parts[verb : verb + 1] == ["resolve"] and len(parts) >= verb + 3:
            revision, path = _split_revision(parts[verb + 1 :])
            if not path:
                break
            return Route("resolve", type_, "/".join(parts[:verb]), revision, path)
    return UNKNOWN


def _parse_resolve_cache(parts: list[str]) -> Route:
    if not parts or parts[0] not in _SINGULARS:
        return UNKNOWN
    for sha in (3, 2):
        if len(parts) > sha + 1 and _HEX40.fullmatch(parts[sha]):
            id_ = "/".join(parts[1:sha])
            return Route("resolve-cache", _SINGULARS[parts[0]], id_, parts[sha], "/".join(parts[sha + 1 :]))
    return UNKNOWN


def _parse_api(type_: RepoType, parts: list[str]) -> Route:
    if not parts:
        return Route("list", type_)
    # A repo without an owner (gpt2) has its verb in second place, unless that is the repo's own name.
    single = "/" in parts[0] or len(parts) == 1 or (parts[1] in _VERBS and parts[2:3] != ["tree"])
    id_, rest = (parts[0], parts[1:]) if single else ("/".join(parts[:2]), parts[2:])
    if not rest:
        return Route("info", type_, id_)
    verb, rest = rest[0], rest[1:]
    if verb == "refs" and not rest:
        return Route("refs", type_, id_)
    if verb not in _VERBS or verb == "refs" or not rest:
        return UNKNOWN
    revision, path = _split_revision(rest)
    if verb == "tree":
        return Route("tree", type_, id_, revision, path.rstrip("/"))
    if path:  # the other endpoints take no path: what follows belongs to an unquoted branch name
        revision = f"{revision}/{path}"
    if verb == "revision":
        return Route("info", type_, id_, revision)
    return Route("commits" if verb == "commits" else "paths-info", type_, id_, revision)


def _split_revision(parts: list[str]) -> tuple[str, str]:
    """Revision and path; tolerates refs/pr/1 sent unquoted, as people do by hand."""
    length = 3 if parts[0] == "refs" and len(parts) > 2 and parts[1] in _REF_KINDS else 1
    return "/".join(parts[:length]), "/".join(parts[length:])


def api_path(type_: RepoType, id_: str) -> str:
    """Path of a repo in the API."""
    return f"/api/{PLURALS[type_]}/{quote(id_)}"


def resolve_path(type_: RepoType, id_: str, revision: str, path: str) -> str:
    """Path under which a file of a repo is downloaded."""
    prefix = "" if type_ == "model" else f"/{PLURALS[type_]}"
    return f"{prefix}/{quote(id_)}/resolve/{quote(revision, safe='')}/{quote(path)}"


def resolve_cache_path(type_: RepoType, id_: str, sha: str, path: str) -> str:
    """Path to which the download of a small file is redirected."""
    return f"/api/resolve-cache/{PLURALS[type_]}/{quote(id_)}/{sha}/{quote(path)}"


def blob_path(repo_key: str, sha256: str) -> str:
    """Path of an LFS object on the CDN, as the real one lays it out."""
    return f"/repos/{repo_key[:2]}/{repo_key[2:4]}/{repo_key}/{sha256}"
