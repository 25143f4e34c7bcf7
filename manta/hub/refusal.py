"""What a hub's refusals mean, as sentences for a person, here and only here. Pure.

One table for both ways in which a hub is asked: metadata by `manta.hub.huggingface`, locations by `manta.hub.location` (whose request a
worker made). A status alone says little: a missing repo, a private one and a bad token are all 401.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from manta.errors import Absent, Denied, Invalid, MantaError, Throttled, Unavailable
from manta.hub import quota
from manta.hub.origin import Access
from manta.model.ids import RepoId, is_commit

HINT_CHARACTERS_MAX = 200
"""How much of a hub's own message goes into a sentence."""

TRANSIENT_STATUSES = frozenset({408, 500, 502, 503, 504})
"""Statuses after which the same request may well succeed soon."""


@dataclass(frozen=True, slots=True)
class Question:
    """What was asked of which hub, for the sentence that says it failed."""

    endpoint: str
    repo: RepoId
    revision: str | None
    """A branch, a tag or a commit; None is the default branch."""
    access: Access
    path: str = ""
    """The file that was asked for; "" where the question was about the repo."""

    @property
    def subject(self) -> str:
        revision = self.revision
        if revision is not None and is_commit(revision):
            revision = revision[:12]
        where = f"{self.repo}@{revision}" if revision is not None else str(self.repo)
        return f"{self.path!r} of {where}" if self.path else where

    @property
    def log_in(self) -> str:
        """What gives the asker another token: goes after "for a private repo", "then"."""
        if not self.access.of_pod:
            return "run `hf auth login` or set HF_TOKEN"
        if self.access.is_anonymous:
            return "name a secret of the pod's namespace in the volume's nodePublishSecretRef, with a token under the key `token`"
        return "put such a token into the secret that the volume's nodePublishSecretRef names (key `token`)"

    @property
    def token(self) -> str:
        """The token it was asked with, for a person."""
        return "the token in the volume's secret" if self.access.of_pod else "the token in use"

    @property
    def page(self) -> str:
        """Where a person looks at the repo."""
        return f"{self.endpoint}/{self.repo}"


def refusal(
    question: Question, status: int, headers: Mapping[str, str], now: float, body: bytes | None = None
) -> MantaError:
    """The error that an answer with an HTTP status of 400 or more (or an unexpected one) means.

    `headers` have names in lower case; `now` is seconds since the epoch and serves to read Retry-After dates.
    """
    code = headers.get("x-error-code", "")
    hint = _hint(headers, body)
    repo, hub, access = question.repo, question.endpoint, question.access
    if status == 429:
        seconds = quota.wait_s(headers, now)
        limits = quota.parse_quota(headers)
        which = f" (its quota of {limits.kind} requests is used up)" if limits and not limits.remaining else ""
        return Throttled(
            f"{hub} was asked for {question.subject} and wants a pause of {seconds:.0f} s{which}:"
            f" try again then{'' if access.token else '; requests with a token have a larger quota'}.",
            seconds,
        )
    if code == "GatedRepo":
        return gated(question)
    if code == "RevisionNotFound":
        revision = question.revision or "default branch"
        return Absent(
            f"{repo} has no revision {revision!r} on {hub}: {question.page} lists its branches, tags and commits."
        )
    if code == "EntryNotFound":
        return Absent(f"{question.subject} does not exist on {hub}: {question.page} shows the files of each revision.")
    if status == 401 and not access.is_anonymous and code != "RepoNotFound":
        return Denied(
            f"{hub} does not accept {question.token} (asked for {question.subject}): it is wrong, expired or revoked."
            + (
                " Put a valid one into the secret that the volume's nodePublishSecretRef names (key `token`)."
                if access.of_pod
                else " Run `hf auth login` or set HF_TOKEN; `hf auth whoami` tells whether a token works."
            )
        )
    if status == 401:
        return Absent(
            f"{repo} does not exist on {hub}, or it is private: check the name; for a private repo {question.log_in}."
        )
    if status in {404, 410} or code == "RepoNotFound":
        if question.path:
            return Absent(f"{question.subject} does not exist on {hub}, or {question.token} may not see it.")
        hidden = f"{question.token} may not see it" if access.token else f"it is private: then {question.log_in}"
        return Absent(
            f"{repo} does not exist on {hub}, or {hidden}. Check the name; datasets/ and spaces/ go before it."
        )
    if status in {403, 451}:
        advice = (
            "The token may lack a permission (fine-grained tokens name their repos), or the hub has disabled the repo"
            if access.token
            else f"It may need a token ({question.log_in}), or the hub has disabled the repo"
        )
        return Denied(f"{hub} refuses {question.subject} (HTTP {status}{hint}). {advice}: see {question.page}.")
    if status == 400:
        return Invalid(
            f"{hub} does not understand the question for {question.subject} (HTTP 400{hint}): check the name and the revision."
        )
    if status in TRANSIENT_STATUSES or status >= 500:
        return Unavailable(
            f"{hub} has trouble of its own: asked for {question.subject}, it answered HTTP {status}{hint}. Try again soon."
        )
    return Unavailable(
        f"{hub} answered HTTP {status}{hint} when asked for {question.subject}, which no hub does: check that HF_ENDPOINT is a hub."
    )


def gated(question: Question) -> Denied:
    """The error for a gated repo that the access in use may not read."""
    if question.access.is_anonymous:
        return Denied(f"{question.repo} is gated: ask for access at {question.page}, then {question.log_in}.")
    if question.access.of_pod:
        return Denied(
            f"{question.repo} is gated and the account of {question.token} has no access to it: accept its conditions or ask for access at"
            f" {question.page}; or, for an account that has it, {question.log_in}."
        )
    return Denied(
        f"{question.repo} is gated and the account of the token in use has no access to it: ask for it at"
        f" {question.page}, or use another token (`hf auth login` or HF_TOKEN)."
    )


def unusable(question: Question, what: str) -> Unavailable:
    """The error for an answer that came and is no answer of a hub; `what` completes "answered ... with"."""
    return Unavailable(
        f"{question.endpoint} answered with {what} when asked for {question.subject}: check that HF_ENDPOINT is a hub,"
        " and that no proxy or login page stands before it."
    )


def _hint(headers: Mapping[str, str], body: bytes | None) -> str:
    """The hub's own words, ready to stand after the status; "" where it said nothing that helps."""
    text = headers.get("x-error-message", "")
    if not text and body and "json" in headers.get("content-type", ""):
        try:
            answer = json.loads(body)
        except ValueError:
            answer = None
        error = answer.get("error") if isinstance(answer, dict) else None
        text = error if isinstance(error, str) else ""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return f": {text[:HINT_CHARACTERS_MAX]}" if text else ""
