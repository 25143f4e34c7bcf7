"""The admin API under /_hub/: how tests in other processes watch and steer a running hub. JSON both ways.

GET    stats                     counters (traffic.Stats)
GET    log                       newest requests (traffic.LogEntry), oldest first; ?after=NUMBER
GET    coverage?blob=ID          [[start, stop, times sent], ...]
GET    files?repo=ID             files of a revision: {commit, files: {path: {blob, oid, sha256, size}}};
                                 also &type=dataset &revision=REV
GET    faults                    rules in force
POST   faults                    add a faults.Rule; answers {"id": N}
DELETE faults, faults/N          lift all rules, or one
POST   changes                   apply a changes.Change
PUT    settings                  latency_s, bandwidth, quotas, signed_url_lifetime_s, ... (SettingsUpdate)
PUT    listening                 {"origin": "cdn", "open": false}
POST   reset                     {"content": true}: back to the start
POST   wait                      until the log holds so many matching requests (WaitFor)

Never open in `manta hub serve`. Used by server.py; spoken by process.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from manta.testing.hub.changes import Change, apply_change
from manta.testing.hub.faults import Rule
from manta.testing.hub.limits import Quotas
from manta.testing.hub.reply import Reply, text_reply
from manta.testing.hub.repository import RepoType
from manta.testing.hub.routes import ORIGINS, Kind, Origin
from manta.testing.hub.traffic import LogEntry

if TYPE_CHECKING:
    from manta.testing.hub.server import HubServer

_T = TypeVar("_T")

WAIT_S_MAX = 120


@dataclass(frozen=True, slots=True)
class AdminRequest:
    """A request to the admin API; `path` is what follows /_hub/."""

    method: str
    path: str
    query: Mapping[str, str]
    body: bytes


class SettingsUpdate(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Settings to change; those left out stay.

    latency_s: seconds before the first byte of every answer, for one origin or for all. bandwidth: bytes
    per second over all bodies, null for no cap. signed_url_lifetime_s, cdn_allows_head, redirect_blobs: see
    answers.Policy.
    """

    latency_s: Annotated[float, Meta(ge=0, le=60)] | dict[Origin, float] | UnsetType = UNSET
    bandwidth: Annotated[float, Meta(gt=0)] | UnsetType | None = UNSET
    quotas: Quotas | UnsetType = UNSET
    signed_url_lifetime_s: float | UnsetType = UNSET
    cdn_allows_head: bool | UnsetType = UNSET
    redirect_blobs: bool | UnsetType = UNSET


class Listening(msgspec.Struct, forbid_unknown_fields=True):
    """Whether an origin accepts connections."""

    origin: Origin
    open: bool


class Reset(msgspec.Struct, forbid_unknown_fields=True):
    """What to reset: always faults, traffic and settings; `content` too unless false."""

    content: bool = True


class WaitFor(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Wait until `count` requests match; `finished` only counts those that are over.

    Looks at the log from request `after` on (0: all of it); gives up after `timeout_s`.
    """

    count: int = 1
    origin: Origin | None = None
    kind: Kind | None = None
    repo: str | None = None
    file: str | None = None
    finished: bool = False
    after: int = 0
    timeout_s: Annotated[float, Meta(ge=0, le=WAIT_S_MAX)] = 30.0

    def matches(self, entry: LogEntry) -> bool:
        """Whether a log entry is one of those waited for."""
        return (
            entry.number > self.after
            and self.origin in (None, entry.origin)
            and self.kind in (None, entry.kind)
            and self.repo in (None, entry.repo)
            and self.file in (None, entry.file)
            and (not self.finished or entry.duration_s >= 0)
        )


def _json(value: object, status: int = 200) -> Reply:
    return text_reply(status, msgspec.json.encode(value).decode(), "application/json")


def _decode(body: bytes, type_: type[_T]) -> _T:
    return msgspec.json.decode(body or b"{}", type=type_)


async def answer_admin(hub: HubServer, request: AdminRequest) -> Reply:
    """Answer one admin request; mistakes are told in words with status 400, unknown names with 404."""
    try:
        return await _dispatch(hub, request)
    except (msgspec.DecodeError, msgspec.ValidationError, ValueError) as mistake:
        return _json({"error": str(mistake)}, 400)
    except LookupError as missing:
        return _json({"error": str(missing)}, 404)


async def _dispatch(hub: HubServer, request: AdminRequest) -> Reply:
    body = request.body
    match request.method, request.path.strip("/").split("/"):
        case "GET", ["stats"]:
            return _json(hub.stats())
        case "GET", ["log"]:
            after = int(request.query.get("after", "0"))
            return _json([entry for entry in hub.ledger.log if entry.number > after])
        case "GET", ["coverage"]:
            return _json(hub.ledger.coverage(request.query.get("blob", "")))
        case "GET", ["files"]:
            return _files(hub, request.query)
        case "GET", ["faults"]:
            return _json(hub.faults.states())
        case "POST", ["faults"]:
            return _json({"id": hub.faults.add(_decode(body, Rule))})
        case "DELETE", ["faults"]:
            hub.faults.clear()
        case "DELETE", ["faults", id_]:
            hub.faults.remove(int(id_))
        case "POST", ["changes"]:
            change: Change = msgspec.json.decode(body, type=Change)
            apply_change(hub.catalogue, change)
        case "PUT", ["settings"]:
            _update(hub, _decode(body, SettingsUpdate))
        case "PUT", ["listening"]:
            listening = _decode(body, Listening)
            await (hub.open if listening.open else hub.refuse)(listening.origin)
        case "POST", ["reset"]:
            hub.reset(content=_decode(body, Reset).content)
            for origin in hub.answers.ports:
                await hub.open(origin)
        case "POST", ["wait"]:
            return await _wait(hub, _decode(body, WaitFor))
        case _:
            return _json({"error": f"no such admin call: {request.method} {request.path}"}, 404)
    return _json({})


def _files(hub: HubServer, query: Mapping[str, str]) -> Reply:
    type_ = msgspec.convert(query.get("type", "model"), RepoType)
    id_, revision = query.get("repo", ""), query.get("revision", "main")
    repo = hub.catalogue.repos.get((type_, id_))
    commit = None if repo is None else repo.commit(repo.named.get(revision, revision))
    if commit is None:
        raise LookupError(f"no {type_} {id_!r} with a revision {revision!r} on this hub")
    files = {
        path: {"blob": blob.id, "oid": blob.oid, "sha256": blob.sha256, "size": blob.size}
        for path, blob in commit.tree.files.items()
    }
    return _json({"commit": commit.id, "files": files})


def _update(hub: HubServer, update: SettingsUpdate) -> None:
    if isinstance(update.latency_s, dict):
        hub.latency_s |= update.latency_s
    elif update.latency_s is not UNSET:
        hub.latency_s = dict.fromkeys(ORIGINS, update.latency_s)
    if update.bandwidth is not UNSET:
        hub.bandwidth.rate = update.bandwidth
    if update.quotas is not UNSET:
        hub.quotas.quotas = update.quotas
        hub.quotas.clear()
    policy = hub.answers.policy
    if update.signed_url_lifetime_s is not UNSET:
        policy = replace(policy, signed_url_lifetime_s=update.signed_url_lifetime_s)
    if update.cdn_allows_head is not UNSET:
        policy = replace(policy, cdn_allows_head=update.cdn_allows_head)
    if update.redirect_blobs is not UNSET:
        policy = replace(policy, redirect_blobs=update.redirect_blobs)
    hub.answers.policy = policy


async def _wait(hub: HubServer, wanted: WaitFor) -> Reply:
    found: list[LogEntry] = []
    try:
        async with asyncio.timeout(wanted.timeout_s):
            while len(found := [entry for entry in hub.ledger.log if wanted.matches(entry)]) < wanted.count:
                await hub.progress()
    except TimeoutError:
        message = f"{len(found)} of {wanted.count} requests after {wanted.timeout_s} s"
        return _json({"error": message}, 408)
    return _json(found)
