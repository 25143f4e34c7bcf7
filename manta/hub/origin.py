"""What an origin adapter offers and the values it trades in, here and only here.

An origin says which commit a revision names, what a commit's tree holds and where a file's bytes are. It moves no file bytes: a worker
process does that with the `Location` an adapter gives. `Access` is who asks.
Used by `manta.hub.catalog` (trees), `manta.fetch` (locations) and the daemon, in its trio thread. Values may go to any thread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import urlsplit

from manta.errors import Denied, Invalid
from manta.model.ids import Commit, RepoId
from manta.model.snapshot import FileEntry, Snapshot

REFRESH_MARGIN_S = 120.0
"""How long before its expiry a signed URL is not used for new requests.

The CDN checks the signature when a request begins, so the margin covers an order that waits in a worker's queue, a retry or two of it, and
what is left of a clock's error after the correction by the hub's own Date. Out of the usual 3600 s it costs one resolve in thirty.
"""

REFRESH_MARGIN_SHARE = 0.25
"""The margin is at most this share of the URL's life: a store that signs for 60 s must not be asked anew for every request."""


POD = "pod"
"""The holder of what a pod came with: equal tokens of pods are one access, which is never the daemon's own, whatever its token is."""


@dataclass(frozen=True, slots=True, repr=False)
class Access:
    """Who asks the origin: the bearer of `token`, or nobody in particular (""). Its text never shows the token.

    Raises Invalid for a token that no HTTP header can carry.
    """

    token: str = ""
    holder: str = ""
    """Who came with it: "" is the daemon's user, POD a pod. Otherwise a mount, whose token of the moment `manta.hub.identity` knows."""

    def __post_init__(self) -> None:
        if not all("!" <= character <= "~" for character in self.token):
            raise Invalid(
                "The token for the hub holds spaces, line breaks or characters beyond ASCII: copy it again from"
                " the hub's settings page, then run `hf auth login` or set HF_TOKEN."
            )

    @classmethod
    def anonymous(cls) -> Access:
        return cls("")

    @property
    def is_anonymous(self) -> bool:
        return not self.token

    @property
    def of_pod(self) -> bool:
        return self.holder == POD

    @property
    def digest(self) -> str:
        """What an answer about it is remembered under: the token's sha256; "" for nobody in particular."""
        return hashlib.sha256(self.token.encode()).hexdigest() if self.token else ""

    @property
    def fingerprint(self) -> str:
        """Tells accesses apart in logs and status: 12 hex digits of the token's sha256, or "anonymous"."""
        return hashlib.sha256(self.token.encode()).hexdigest()[:12] if self.token else "anonymous"

    @property
    def headers(self) -> dict[str, str]:
        """The Authorization header, for requests to the hub's own origin only; empty for anonymous access."""
        return {"authorization": f"Bearer {self.token}"} if self.token else {}

    def __repr__(self) -> str:
        return f"Access({self.fingerprint}{f' of {self.holder}' if self.holder else ''})"


def default_access() -> Access:
    """The token a user of the Hub's own tools has: HF_TOKEN, else what `hf auth login` saved; anonymous where there is none.

    Reads files, and may ask the hub to renew a saved OAuth token: call it in a thread or before the loop starts.
    Raises Invalid for a malformed token and Denied where a token is configured and cannot be had.
    """
    # 19 MB and 0.1 s on first use, HTTP library included: nobody who never asks a hub pays for it.
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return Access.anonymous()
    try:
        token = get_token()
    except (
        Exception
    ) as error:  # an unreadable file, a failed OAuth renewal, a failed OIDC exchange: the library names no base
        raise Denied(
            f"The saved token for the hub could not be had ({type(error).__name__}): run `hf auth login` again, or set HF_TOKEN."
        ) from error
    return Access(token or "")


@dataclass(frozen=True, slots=True)
class Resolved:
    """What the origin says a revision is right now."""

    repo: RepoId
    """As asked."""
    revision: str | None
    """As asked; None is the default branch."""
    commit: Commit
    gated: bool
    private: bool
    canonical: RepoId
    """The repo's present name; differs from `repo` after a rename, and both keep working."""


@dataclass(frozen=True, slots=True)
class OriginRequest:
    """What a worker must ask the hub to learn where a file's bytes are.

    One request without a body: it follows redirects on the hub's own origin (at most a handful) and no other, and reports status, URL
    and headers (names in lower case) of the last answer from there. `method` is what the Hub's own clients use for this; a GET with
    ``Range: bytes=0-0`` is understood as well.
    """

    url: str
    headers: Mapping[str, str] = field(repr=False)
    method: str = "HEAD"


@dataclass(frozen=True, slots=True)
class Location:
    """Where a file's bytes can be had by ranged GETs, and until when. Its text shows no query: a signed URL is a secret."""

    url: str = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)
    """To send along as they are; they hold Authorization only where `url` is on the hub's own origin."""
    expires_at: float | None = None
    """Seconds since the epoch by this machine's clock; None where the URL does not say."""
    refresh_at: float | None = None
    """From then on ask again before a new request; None where the URL does not expire."""
    told: bool = False
    """Another node said so, not the hub."""

    def stale(self, now: float) -> bool:
        """Whether it should be asked for anew before a request that starts at `now` (seconds since the epoch)."""
        return self.refresh_at is not None and now >= self.refresh_at

    @property
    def origin(self) -> str:
        """Scheme, host and port: what may be logged."""
        return origin_of(self.url)

    def __str__(self) -> str:
        return f"a location on {self.origin}"


def origin_of(url: str) -> str:
    """``scheme://host:port`` of a URL, in lower case and with the port always given: equal texts are equal origins.

    Raises Invalid for what is no http(s) URL.
    """
    try:
        parts = urlsplit(url)
        scheme, host, port = parts.scheme.lower(), parts.hostname, parts.port
    except ValueError:
        scheme, host, port = "", None, None
    if scheme not in {"http", "https"} or not host:
        raise Invalid("A URL of the hub is not an http or https URL.")
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port or (443 if scheme == 'https' else 80)}"


class Origin(Protocol):
    """An adapter for one origin. The async methods end by their own deadlines and raise only errors of `manta.errors`.

    Absent: no such repo, revision or commit, or none that this access may see. Denied: gated, or a bad token. Throttled: asked to slow
    down. Unavailable: no usable answer in time. Corrupt: an answer that contradicts what was asked.
    """

    @property
    def endpoint(self) -> str:
        """The URL it asks, without a slash at the end."""
        ...

    async def resolve(self, repo: RepoId, revision: str | None, access: Access) -> Resolved:
        """The commit that `revision` (None: the default branch) names now."""
        ...

    async def snapshot(self, repo: RepoId, commit: Commit, access: Access) -> Snapshot:
        """The whole tree of a commit. Where the origin shows the names and not the content to this access, no entry has a blob."""
        ...

    async def may_read(self, repo: RepoId, commit: Commit, entry: FileEntry, access: Access) -> bool:
        """Whether the origin gives one file of a gated repo to this access. Raises Absent where the file is not there any more."""
        ...

    def location_request(self, repo: RepoId, commit: Commit, path: str, access: Access) -> OriginRequest:
        """What to ask for the bytes of one file. Pure."""
        ...

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
        """What the answer to `location_request` says. Pure; `now` is seconds since the epoch; `headers` have names in lower case.

        Raises the named errors: a refusal as in `resolve`, Corrupt where the answer is about another commit, size or content.
        """
        ...

    def note_headers(self, headers: Mapping[str, str]) -> None:
        """Takes what an answer to `location_request` says of the origin's quotas; headers have names in lower case."""
        ...

    def same_origin(self, url: str) -> bool:
        """Whether `url` (absolute) is on the origin's own scheme, host and port: only there may Authorization go."""
        ...
