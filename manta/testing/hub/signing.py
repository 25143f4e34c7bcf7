"""Signed CDN URLs: made when the hub redirects, checked when the CDN is asked. Pure; used by answers.py."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from typing import Literal
from urllib.parse import quote, urlencode

KEY_PAIR_ID = "MANTATESTHUB"

Verdict = Literal["valid", "expired", "forged"]


class Signer:
    """Signs with a key of its own, so a URL is good for one run of the hub only."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def query(self, path: str, expires: int, filename: str) -> str:
        """The query that makes `path` good until `expires` (Unix seconds)."""
        name = filename.rpartition("/")[2]
        disposition = f"inline; filename*=UTF-8''{quote(name)};"
        fields = {
            "response-content-disposition": disposition,
            "Expires": str(expires),
            "Signature": self._signature(path, str(expires), disposition),
            "Key-Pair-Id": KEY_PAIR_ID,
        }
        return urlencode(fields)

    def check(self, path: str, query: Mapping[str, list[str]], now: float) -> Verdict:
        """Whether a request for `path` may be served at `now` (Unix seconds)."""
        expires, disposition, signature = (
            query.get(name, [""])[0] for name in ("Expires", "response-content-disposition", "Signature")
        )
        if not hmac.compare_digest(signature.encode(), self._signature(path, expires, disposition).encode()):
            return "forged"
        return "valid" if now < int(expires) else "expired"

    def _signature(self, *fields: str) -> str:
        return hmac.new(self._key, "\n".join(fields).encode(), hashlib.sha256).hexdigest()
