"""What befalls a mount in `test_faults`: each fault of the test hub at each place where it makes sense, and what must come of it.

A case strikes one file (or, at metadata, one repo) that nobody else reads, so that many run side by side on one mount. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from manta.testing.hub import changes, faults
from manta.testing.hub.changes import Change
from manta.testing.hub.faults import Action

Where = Literal["location", "body", "metadata"]
Mode = Literal["once", "always"]

SIZE = 300_000
"""Of a case's file, where it needs no more than one request."""

TWO_CHUNKS = (8 << 20) + SIZE
"""Of a file that takes a request that does not begin at byte 0."""

PATIENCE_S = 4.0
"""fetch.read_timeout_s of the node under test."""
STALL_S = 1.0
"""fetch.stall_s."""
HUB_TIMEOUT_S = 3.0
"""hub.timeout_s."""

PER_MOUNT = 4
"""Cases in one repo, once and always: `manta status` shows the latest 8 sentences of a mount."""


@dataclass(frozen=True)
class Outcome:
    """What a reader may see: `errno` ("" for the right bytes) and words of the sentence that goes with it."""

    errno: str = ""
    words: str = ""


FINE = Outcome()


@dataclass(frozen=True, eq=False)
class Case:
    """`action` strikes requests at `where`; `times` of them in mode "once", then the hub is well; all of them in mode "always".

    `once` and `always` say what the first read sees; after an error in mode "once" a later read is fine. `strict` False: what is streamed
    before the digest can be known may be wrong.
    """

    name: str
    where: Where
    action: Action
    always: Outcome
    once: Outcome = FINE
    times: int = 2
    size: int = SIZE
    strict: bool = True
    modes: tuple[Mode, ...] = ("once", "always")
    conditions: Mapping[str, Any] = field(default_factory=dict)

    def rule(self, mode: Mode) -> dict[str, Any]:
        """The conditions of faults.Rule that have it strike this case's requests and no others."""
        times = {"times": self.times} if mode == "once" else {}
        match self.where:
            case "location":
                place = {"origin": "hub", "kind": "resolve", "repo": self.repo(mode), "file": self.path(mode)}
            case "body":
                place = {"origin": "cdn", "repo": self.repo(mode), "file": self.path(mode)}
            case "metadata":
                place = {"origin": "hub", "repo": self.repo(mode)}
        return {**place, **self.conditions, **times}

    def path(self, mode: Mode) -> str:
        return "config.json" if self.where == "metadata" else f"{slug(self.name)}-{mode}.bin"

    def repo(self, mode: Mode) -> str:
        if self.where == "metadata":
            # Not in one namespace: the kernel looks up one name of a directory at a time, so a silent hub would hold up the other cases.
            return f"{slug(self.name)}-{mode}/model"
        return f"faults/{self.where}-{(_BODY if self.where == 'body' else _LOCATION).index(self) // PER_MOUNT}"


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def _eio(words: str) -> Outcome:
    return Outcome("EIO", words)


LATE = rf"did not come within {PATIENCE_S:g} s"

# At the CDN --------------------------------------------------------------------------------------------------------------

_LAST_BYTE = {"range": (TWO_CHUNKS - 1, TWO_CHUNKS)}

_BODY = [
    Case("stall in the body", "body", faults.Stall(after_bytes=100_000, seconds=60), FINE),
    Case("no answer", "body", faults.Delay(seconds=60), _eio("sent nothing for 1 s")),
    Case("reset in the body", "body", faults.Reset(after_bytes=100_000), FINE),
    Case("reset without a byte", "body", faults.Reset(after_bytes=0), _eio("closed the connection|broke the connection")),
    Case("reset before the headers", "body", faults.Reset(before_headers=True), _eio("closed the connection|broke the connection")),
    Case("truncated body", "body", faults.Truncate(after_bytes=100_000), FINE),
    Case("empty body", "body", faults.Truncate(after_bytes=0), _eio("closed the connection")),
    Case("slow body", "body", faults.Drip(bytes_per_second=150_000), FINE),
    *(Case(f"HTTP {status}", "body", faults.Fail(status=status), _eio(f"answered {status}")) for status in (408, 500, 502, 503, 504)),
    Case("HTTP 401", "body", faults.Fail(status=401), Outcome("EACCES", "answered 401")),
    Case("HTTP 403 on a fresh URL", "body", faults.Fail(status=403, body="xml"), Outcome("EACCES", "answered 403")),
    Case("HTTP 404", "body", faults.Fail(status=404, body="xml"), Outcome("ENOENT", "answered 404")),
    Case("HTTP 416", "body", faults.Fail(status=416, body="empty"), _eio("answered 416")),
    Case("a web page with HTTP 200", "body", faults.Fail(status=200, body="html"), _eio("bytes for a file of")),
    Case("fewer bytes than asked for", "body", faults.ShortRange(missing=100_000), FINE, modes=("once",)),
    Case("more bytes than asked for", "body", faults.TooLong(extra=1000), _eio("sent 301000 bytes")),
    Case("Range ignored", "body", faults.IgnoreRange(), _eio("ignores Range"), size=TWO_CHUNKS, conditions=_LAST_BYTE),
    Case("another range, and says so", "body", faults.WrongRange(shift=1), _eio("answered bytes")),
    Case(
        "another range, and does not say so", "body", faults.WrongRange(shift=-1000, body=True), _eio("digest"),
        times=1, size=TWO_CHUNKS, strict=False, conditions=_LAST_BYTE,
    ),
    Case("a flipped byte", "body", faults.Flip(offset=150_000), _eio("digest"), times=1, strict=False),
    Case("no Content-Range", "body", faults.Headers(remove=["Content-Range"]), _eio("without a Content-Range")),
    Case("another size", "body", faults.Headers(put={"Content-Range": f"bytes 0-{SIZE - 1}/999"}), _eio("has 999 bytes")),
    Case("a compressed body", "body", faults.Headers(put={"Content-Encoding": "gzip"}), _eio("compressed")),
    Case("another ETag", "body", faults.Headers(put={"ETag": '"0"'}), FINE),
    Case("a redirect to another host", "body", faults.Redirect(to="other"), FINE),
    Case("a redirect loop", "body", faults.RedirectLoop(), _eio("in a loop")),
]  # fmt: skip

# At the hub, when it is asked where the bytes are -------------------------------------------------------------------------


def _at_once(outcome: Outcome) -> dict[str, Any]:
    """An answer that is believed: the first reader gets what it says, also where it is struck once; a later reader asks anew."""
    return {"always": outcome, "once": outcome, "times": 1}


_LOCATION = [
    Case("no answer", "location", faults.Delay(seconds=60), _eio("did not answer within 1 s")),
    Case("reset before the headers", "location", faults.Reset(before_headers=True), _eio("closed the connection|broke the connection")),
    *(Case(f"HTTP {status}", "location", faults.Fail(status=status), _eio(f"HTTP {status}")) for status in (408, 500, 503)),
    Case("HTTP 401", "location", faults.Fail(status=401), **_at_once(Outcome("ENOENT", "private"))),
    Case("HTTP 403", "location", faults.Fail(status=403), **_at_once(Outcome("EACCES", "refuses"))),
    Case("HTTP 404", "location", faults.Fail(status=404), **_at_once(Outcome("ENOENT", "does not exist"))),
    Case("a web page with HTTP 200", "location", faults.Fail(status=200, body="html"), _eio("web page")),
    Case("another X-Repo-Commit", "location", faults.Headers(put={"X-Repo-Commit": "0" * 40}), **_at_once(_eio("answered for commit"))),
    Case("no X-Repo-Commit", "location", faults.Headers(remove=["X-Repo-Commit"]), FINE),
    Case("another X-Linked-Size", "location", faults.Headers(put={"X-Linked-Size": "999"}), **_at_once(_eio("999"))),
    Case("no X-Linked-Size", "location", faults.Headers(remove=["X-Linked-Size"]), FINE),
    Case("another X-Linked-ETag", "location", faults.Headers(put={"X-Linked-ETag": "0" * 64}), **_at_once(_eio("another content"))),
    Case("no X-Linked-ETag", "location", faults.Headers(remove=["X-Linked-ETag", "ETag"]), FINE),
    Case("no Location", "location", faults.Headers(remove=["Location"]), _eio("redirect")),
    Case("a Location that is no URL", "location", faults.Headers(put={"Location": "ftp://x"}), _eio("no address of a web server")),
    Case("a redirect to another host", "location", faults.Redirect(to="other"), Outcome("EACCES", "answered 403")),
    Case("a redirect loop", "location", faults.RedirectLoop(), _eio("in a loop|in circles")),
    Case("an expired URL", "location", faults.ExpiredUrl(ago_s=60), Outcome("EACCES", "answered 403")),
]  # fmt: skip

# At the hub, when it is asked for a revision and its tree -----------------------------------------------------------------

_SILENCE = _eio(f"did not answer within {HUB_TIMEOUT_S:g} s")

# No sentence: a name that does not exist is what a lookup is for, and the hub shows what may not be seen as that. It is believed for
# 30 s (hub/catalog.py), too long to wait for here.
_NO_SUCH_REPO: dict[str, Any] = {"always": Outcome("ENOENT"), "modes": ("always",)}

_METADATA = [
    Case("no answer to the revision", "metadata", faults.Delay(seconds=60), **_at_once(_SILENCE), conditions={"kind": "info"}),
    Case("no answer to the tree", "metadata", faults.Delay(seconds=60), **_at_once(_SILENCE), conditions={"kind": "tree"}),
    Case("reset before the headers", "metadata", faults.Reset(before_headers=True), _eio("connection broke|HTTP")),
    Case("truncated tree", "metadata", faults.Truncate(after_bytes=40), _eio("HTTP|connection broke"), conditions={"kind": "tree"}),
    *(Case(f"HTTP {status}", "metadata", faults.Fail(status=status), _eio(f"HTTP {status}")) for status in (408, 500, 503)),
    Case("HTTP 401", "metadata", faults.Fail(status=401), **_NO_SUCH_REPO),
    Case("HTTP 403", "metadata", faults.Fail(status=403), **_at_once(Outcome("EACCES", "refuses"))),
    Case("HTTP 404", "metadata", faults.Fail(status=404), **_NO_SUCH_REPO),
    Case("a web page with HTTP 200", "metadata", faults.Fail(status=200, body="html"), **_at_once(_eio("answered with"))),
    Case("a redirect to another host", "metadata", faults.Redirect(to="other"), **_at_once(_eio("sends on to"))),
    Case("a redirect loop", "metadata", faults.RedirectLoop(), _eio("circles")),
]  # fmt: skip

CASES: list[Case] = [*_BODY, *_LOCATION, *_METADATA]
RUNS: list[tuple[Case, Mode]] = [(case, mode) for case in CASES for mode in case.modes]


# The whole node --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class NodeCase:
    """A fault that reaches every reader of the node: it has the node to itself. It strikes one request and lasts for its own time.

    `pause_s`: how long the node must leave the hub alone after it, whatever file is wanted; 0 where it may ask.
    """

    name: str
    where: Where
    action: Action
    pause_s: float = 0.0
    first: Outcome = FINE

    @property
    def path(self) -> str:
        return f"{slug(self.name)}-{self.where}.bin"


NODE_REPO = "faults/node"


def _throttled(where: Where) -> list[NodeCase]:
    # The window's end is told in whole seconds, rounded down, and so is a date: t=0 is 1 s, and 2 s from now are more than 1.
    return [
        NodeCase("HTTP 429, RateLimit", where, faults.TooMany(form="ratelimit", seconds=0), pause_s=1),
        NodeCase("HTTP 429, Retry-After in seconds", where, faults.TooMany(form="retry-after", seconds=1), pause_s=1),
        NodeCase("HTTP 429, Retry-After as a date", where, faults.TooMany(form="http-date", seconds=2), pause_s=1),
    ]


NODE_CASES = [
    *_throttled("location"),
    *_throttled("body"),
    NodeCase("a refused port", "location", faults.Refuse(seconds=1)),
    NodeCase("a refused port", "body", faults.Refuse(seconds=1)),
    NodeCase("a black hole", "location", faults.BlackHole(seconds=1)),
    NodeCase("a black hole", "body", faults.BlackHole(seconds=1)),
]

UNTIMED = NodeCase("HTTP 429, no header", "body", faults.TooMany(form="none"), pause_s=9, first=_eio("429"))
"""The pause is then Manta's own, 10 s: longer than a reader of the node under test waits."""


# The repo itself changes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ChangeCase:
    """`change` happens while a mount shows the repo and has one of its files in the cache; `undo` takes it back.

    `fetch` is what a reader of a file that is not cached sees meanwhile; what is cached stays readable.
    """

    name: str
    change: Change
    undo: Change
    fetch: Outcome = FINE

    @property
    def repo(self) -> str:
        change = self.change
        assert not isinstance(change, changes.RevokeToken)
        return change.repo


READER, READER_TOKEN = "faults-reader", "hf_faultsreader"
CACHED, COLD = "cached.bin", "cold.bin"
"""Files of a repo that changes."""


def _change_cases() -> list[ChangeCase]:
    gone = Outcome("ENOENT", "does not exist")
    names = ("moved", "deleted", "pushed", "gated", "private", "vanished", "renamed", "revoked")
    moved, deleted, pushed, gated, private, vanished, renamed, revoked = (f"faults/{name}" for name in names)
    new_name = f"{renamed}-since"
    return [
        ChangeCase("branch moved", changes.MoveBranch(repo=moved, to="second"), changes.MoveBranch(repo=moved, to="first")),
        ChangeCase("branch deleted", changes.DeleteBranch(repo=deleted), changes.MoveBranch(repo=deleted, to="first")),
        ChangeCase("commit pushed", changes.Push(repo=pushed, removed=[COLD]), changes.MoveBranch(repo=pushed, to="first")),
        ChangeCase("repo gated", changes.SetGated(repo=gated), changes.SetGated(repo=gated, gated=False), Outcome("EACCES", "gated")),
        ChangeCase("repo made private", changes.SetPrivate(repo=private), changes.SetPrivate(repo=private, private=False), gone),
        ChangeCase("repo deleted", changes.SetDeleted(repo=vanished), changes.SetDeleted(repo=vanished, deleted=False), gone),
        ChangeCase("repo renamed", changes.Rename(repo=renamed, to=new_name), changes.Rename(repo=new_name, to=renamed)),
        ChangeCase("access revoked", changes.RevokeAccess(user=READER, repo=revoked), changes.GrantAccess(user=READER, repo=revoked), gone),
    ]  # fmt: skip


CHANGE_CASES = _change_cases()
