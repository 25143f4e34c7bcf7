from __future__ import annotations

from email.utils import formatdate

import pytest

from manta.hub.quota import WAIT_S_DEFAULT, WAIT_S_MAX, Quota, parse_quota, retry_after_s, wait_s

NOW = 1_700_000_000.0


def test_a_quota_is_read_from_both_headers() -> None:
    headers = {"ratelimit": '"resolvers";r=2999;t=271', "ratelimit-policy": '"fixed window";"resolvers";q=3000;w=300'}
    assert parse_quota(headers) == Quota("resolvers", 2999, 271, 3000, 300)
    assert parse_quota({"ratelimit": '"api"; t = 5 ; r = 0'}) == Quota("api", 0, 5)


@pytest.mark.parametrize("text", ["", "api", '"api"', '"api";r=5', '"api";r=x;t=y', "r=1;t=2", '"api";rr=1;tt=2'])
def test_what_is_no_quota_is_none(text: str) -> None:
    assert parse_quota({"ratelimit": text}) is None


def test_a_used_up_quota_is_waited_out_and_a_second_more() -> None:
    assert wait_s({"ratelimit": '"api";r=0;t=55', "retry-after": "3"}, NOW) == 56.0


def test_a_quota_that_is_not_used_up_leaves_it_to_retry_after() -> None:
    assert wait_s({"ratelimit": '"api";r=7;t=55', "retry-after": "3"}, NOW) == 3.0


def test_retry_after_is_seconds_or_a_date() -> None:
    assert retry_after_s({"retry-after": " 120 "}, NOW) == 120.0
    assert retry_after_s({"retry-after": formatdate(NOW + 90, usegmt=True)}, NOW) == 90.0
    assert (
        retry_after_s({"retry-after": formatdate(NOW + 90, usegmt=True).removesuffix(" GMT") + " -0000"}, NOW) == 90.0
    )
    assert retry_after_s({"retry-after": formatdate(NOW - 90, usegmt=True)}, NOW) == 0.0


@pytest.mark.parametrize("text", ["", "soon", "-5", "1.5", "²"])
def test_a_malformed_retry_after_is_none(text: str) -> None:
    assert retry_after_s({"retry-after": text}, NOW) is None


def test_a_wait_is_bounded_and_never_missing() -> None:
    assert wait_s({}, NOW) == WAIT_S_DEFAULT
    assert wait_s({"retry-after": "999999999"}, NOW) == WAIT_S_MAX
    assert wait_s({"ratelimit": '"api";r=0;t=999999999'}, NOW) == WAIT_S_MAX
