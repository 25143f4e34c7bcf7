"""From the hub's answer about a file to the place of its bytes, here and only here: checks, and when a signed URL expires. Pure.

Used by `manta.hub.huggingface`, whose `location_request` and `parse_location` are these functions with the endpoint filled in.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import parse_qsl, quote, urljoin, urlsplit

from manta import __version__
from manta.errors import Corrupt, Invalid, Unavailable
from manta.hub.origin import REFRESH_MARGIN_S, REFRESH_MARGIN_SHARE, Access, Location, OriginRequest, origin_of
from manta.hub.refusal import Question, refusal, unusable
from manta.model.ids import BlobAlgorithm, Commit, RepoId, RepoKind
from manta.model.snapshot import FileEntry

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_CONTENT_RANGE = re.compile(r"bytes\s+(?:\d+-\d+|\*)/(\d+)")
_GIT_OID = re.compile(r"[0-9a-f]{40}")
# CloudFront's base64 uses characters that may stand in a URL unquoted.
_POLICY_ALPHABET = bytes.maketrans(b"-_~", b"+=/")

USER_AGENT = f"manta/{__version__}"


def location_request(endpoint: str, repo: RepoId, commit: Commit, path: str, access: Access) -> OriginRequest:
    """The request for one file of one commit."""
    prefix = "" if repo.kind is RepoKind.MODEL else f"{repo.kind.value}/"
    return OriginRequest(
        f"{endpoint}/{prefix}{repo.name}/resolve/{commit}/{quote(path)}",
        # Without identity a proxy may compress a small file, and then no length in the answer is the file's.
        {"user-agent": USER_AGENT, "accept-encoding": "identity", **access.headers},
    )


def parse_location(
    endpoint: str,
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
    """The location that an answer tells. Contract: `manta.hub.origin.Origin.parse_location`."""
    question = Question(endpoint, repo, commit, access, entry.path)
    if origin_of(url) != origin_of(endpoint):
        raise Unavailable(
            f"{endpoint} sent the question for {question.subject} on to {origin_of(url)}, which is another host:"
            " set HF_ENDPOINT to the hub itself."
        )
    redirect = status in _REDIRECTS
    # 416 to a range of one byte is how a server says that a file is empty.
    if not redirect and status not in {200, 206} and not (status == 416 and entry.size == 0):
        raise refusal(question, status, headers, now)
    if not redirect and "text/html" in headers.get("content-type", "") and "x-repo-commit" not in headers:
        raise unusable(question, "a web page")
    _check_commit(question, commit, headers)
    _check_size(question, entry, status, headers)
    _check_digest(question, entry, headers)
    common = {"user-agent": USER_AGENT, "accept-encoding": "identity"}
    if not redirect:
        return Location(url, {**common, **access.headers})
    target = urljoin(url, headers.get("location", ""))
    try:
        elsewhere = origin_of(target)
    except Invalid:
        raise unusable(question, "a redirect to no http address") from None
    if elsewhere == origin_of(endpoint):
        # The worker follows these, so one that is left over means that it met its bound.
        raise Unavailable(
            f"{endpoint} redirects the question for {question.subject} in circles: try again, or ask who runs it."
        )
    if endpoint.startswith("https:") and not elsewhere.startswith("https:"):
        # Readers get bytes as they arrive, long before the blob's digest can be checked.
        raise Unavailable(
            f"{endpoint} points to {elsewhere} for the bytes of {question.subject}, which is not encrypted"
            " while the hub is: ask who runs it."
        )
    expires_at = _expiry(target, headers, now)
    if expires_at is None:
        return Location(target, common)
    margin = min(REFRESH_MARGIN_S, (expires_at - now) * REFRESH_MARGIN_SHARE)
    return Location(target, common, expires_at, expires_at - margin)


def _check_commit(question: Question, commit: Commit, headers: Mapping[str, str]) -> None:
    answered = headers.get("x-repo-commit", "")
    if answered and answered != commit:
        raise Corrupt(
            f"{question.endpoint} was asked for {question.subject} and answered for commit {answered[:12]!r}: try again later."
        )


def _check_size(question: Question, entry: FileEntry, status: int, headers: Mapping[str, str]) -> None:
    """Whatever the answer says about the file's size must be what the tree says."""
    told = _told_size(status, headers)
    if told and told != str(entry.size):
        raise Corrupt(
            f"{question.endpoint} says that {question.subject} has {told[:20]!r} bytes, and its tree says {entry.size}:"
            " try again later."
        )


def _told_size(status: int, headers: Mapping[str, str]) -> str:
    """The size of the whole file in the answer's words; "" where it does not say."""
    if linked := headers.get("x-linked-size", "").strip():
        return linked
    if status in {206, 416}:
        match = _CONTENT_RANGE.fullmatch(headers.get("content-range", "").strip())
        return match[1] if match else ""
    if status == 200 and headers.get("content-encoding", "identity") == "identity":
        return headers.get("content-length", "")
    return ""


def _check_digest(question: Question, entry: FileEntry, headers: Mapping[str, str]) -> None:
    """The digest in the answer must be the tree's. The plain ETag counts only for git files: elsewhere it is whatever the store likes."""
    if entry.blob is None:
        return
    tag = _unquoted(headers.get("x-linked-etag", ""))
    if not tag and entry.blob.algorithm is BlobAlgorithm.GIT_SHA1:
        plain = _unquoted(headers.get("etag", ""))
        tag = plain if _GIT_OID.fullmatch(plain) else ""
    if tag and tag != entry.blob.hex:
        raise Corrupt(
            f"{question.endpoint} says that {question.subject} has another content than its tree says: try again later."
        )


def _unquoted(tag: str) -> str:
    return tag.strip().removeprefix("W/").strip('"')


def _expiry(url: str, headers: Mapping[str, str], now: float) -> float | None:
    """When a signed URL ends, by this machine's clock; None where it does not say or says what cannot be.

    The URL speaks in the hub's time. The answer's own Date tells how far this machine's clock is from it.
    """
    ends = _signed_until(url)
    if ends is None:
        return None
    hub_now = now
    try:
        date = parsedate_to_datetime(headers.get("date", ""))
        hub_now = (date if date.tzinfo is not None else date.replace(tzinfo=UTC)).timestamp()
    except ValueError:
        pass
    life = ends - hub_now
    # Expired on arrival is a clock that is wrong beyond repair, or a hub that is: the CDN's answer will tell.
    return now + life if life > 0 else None


def _signed_until(url: str) -> float | None:
    """The earliest end that the URL's signature parameters name, in seconds since the epoch."""
    query = {name.lower(): value for name, value in parse_qsl(urlsplit(url).query)}
    ends = [_epoch(query.get("expires", "")), _policy_end(query.get("policy", "")), _iso_time(query.get("se", ""))]
    for vendor in ("x-amz", "x-goog"):
        start, life = _iso_time(query.get(f"{vendor}-date", "")), _epoch(query.get(f"{vendor}-expires", ""))
        ends.append(start + life if start is not None and life is not None else None)
    known = [end for end in ends if end is not None]
    return min(known) if known else None


def _epoch(text: str) -> float | None:
    return float(text) if text.isascii() and text.isdigit() and len(text) <= 12 else None


def _iso_time(text: str) -> float | None:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()


def _policy_end(text: str) -> float | None:
    """The end in a CloudFront policy: base64 of JSON with one condition per statement."""
    try:
        policy = json.loads(base64.b64decode(text.encode().translate(_POLICY_ALPHABET)))
        ends = [float(s["Condition"]["DateLessThan"]["AWS:EpochTime"]) for s in policy["Statement"]]
    except (ValueError, KeyError, TypeError, binascii.Error, RecursionError):
        return None
    return min(ends) if ends else None
