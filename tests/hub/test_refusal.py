from __future__ import annotations

from typing import Any

import pytest

from manta.errors import Absent, Denied, Invalid, MantaError, Throttled, Unavailable
from manta.hub.origin import POD, Access
from manta.hub.refusal import Question, refusal, unusable
from manta.model.ids import RepoId, RepoKind

REPO = RepoId(RepoKind.MODEL, "org/name")
HUB = "https://hub.example"
ANONYMOUS = Access.anonymous()
USER = Access("hf_secret")
SHA = "a" * 40


def asked(access: Access = ANONYMOUS, revision: str | None = "main", path: str = "") -> Question:
    return Question(HUB, REPO, revision, access, path)


def said(question: Question, status: int, body: bytes | None = None, **headers: str) -> MantaError:
    return refusal(question, status, {name.replace("_", "-"): text for name, text in headers.items()}, 0.0, body)


@pytest.mark.parametrize(
    ("access", "status", "headers", "kind", "words"),
    [
        (ANONYMOUS, 401, {}, Absent, ["does not exist", "private", "hf auth login", "HF_TOKEN"]),
        (ANONYMOUS, 401, {"x_error_code": "RepoNotFound"}, Absent, ["does not exist", "private"]),
        (USER, 404, {"x_error_code": "RepoNotFound"}, Absent, ["does not exist", "token in use may not see it"]),
        (USER, 404, {}, Absent, ["does not exist"]),
        (ANONYMOUS, 404, {}, Absent, ["does not exist", "HF_TOKEN"]),
        (USER, 401, {}, Denied, ["does not accept the token", "expired", "hf auth login"]),
        (USER, 401, {"x_error_message": "Invalid credentials in Authorization header"}, Denied, ["does not accept the token"]),
        (ANONYMOUS, 401, {"x_error_code": "GatedRepo"}, Denied, ["org/name is gated", f"{HUB}/org/name", "hf auth login", "HF_TOKEN"]),
        (USER, 403, {"x_error_code": "GatedRepo"}, Denied, ["org/name is gated", "no access", f"{HUB}/org/name"]),
        (USER, 403, {"x_error_message": "Access is disabled."}, Denied, ["HTTP 403: Access is disabled."]),
        (ANONYMOUS, 404, {"x_error_code": "RevisionNotFound"}, Absent, ["no revision 'main'", f"{HUB}/org/name"]),
        (ANONYMOUS, 400, {}, Invalid, ["HTTP 400"]),
        (ANONYMOUS, 500, {}, Unavailable, ["HTTP 500", "Try again"]),
        (ANONYMOUS, 408, {}, Unavailable, ["HTTP 408"]),
        (ANONYMOUS, 418, {}, Unavailable, ["HTTP 418", "HF_ENDPOINT"]),
    ],
)  # fmt: skip
def test_a_refusal_says_what_was_asked_what_happened_and_what_to_do(
    access: Access, status: int, headers: dict[str, Any], kind: type[MantaError], words: list[str]
) -> None:
    error = said(asked(access), status, **headers)
    assert type(error) is kind
    for word in [*words, "org/name"]:
        assert word in error.message
    assert error.message.endswith(".")
    assert "hf_secret" not in error.message


@pytest.mark.parametrize(
    ("status", "headers"),
    [(401, {}), (404, {}), (403, {"x_error_code": "GatedRepo"}), (401, {"x_error_code": "RepoNotFound"}), (403, {})],
)
@pytest.mark.parametrize("token", ["", "hf_secret"])
def test_what_a_pod_is_told_is_for_who_writes_its_manifest(status: int, headers: dict[str, Any], token: str) -> None:
    message = said(asked(Access(token, POD)), status, **headers).message
    assert "hf auth login" not in message
    assert "HF_TOKEN" not in message
    assert "hf_secret" not in message
    assert "nodePublishSecretRef" in message or "volume's secret" in message or "The token may lack" in message


def test_a_missing_file_is_told_from_a_missing_repo() -> None:
    error = said(asked(path="a/b.txt", revision=SHA), 404, x_error_code="EntryNotFound")
    assert type(error) is Absent
    assert f"'a/b.txt' of org/name@{SHA[:12]} does not exist" in error.message


def test_too_many_requests_say_how_long_to_wait() -> None:
    error = said(asked(), 429, ratelimit='"api";r=0;t=41')
    assert isinstance(error, Throttled)
    assert error.retry_after_s == 42.0
    assert "pause of 42 s (its quota of api requests is used up)" in error.message
    assert "larger quota" in error.message
    assert "larger quota" not in said(asked(USER), 429).message


def test_the_hubs_own_words_are_taken_from_a_json_body_and_cut() -> None:
    error = said(asked(), 503, b'{"error": "down\\nfor  maintenance"}', content_type="application/json")
    assert "HTTP 503: down for maintenance." in error.message
    assert len(said(asked(), 503, x_error_message="x" * 10_000).message) < 500
    for body in (b"<html>down</html>", b"[1]", b'{"error": 5}', b"\xff"):
        assert "HTTP 503." in said(asked(), 503, body, content_type="application/json").message


def test_a_dataset_is_named_as_people_write_it() -> None:
    question = Question(HUB, RepoId(RepoKind.DATASET, "org/name"), None, ANONYMOUS)
    assert f"{HUB}/datasets/org/name" in said(question, 401, x_error_code="GatedRepo").message
    assert "when asked for datasets/org/name:" in unusable(question, "a web page").message
