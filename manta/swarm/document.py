"""The status page, and what a browser may do with it, here and only here. Served at / by the peer server, with page.json beside it.

The page is one file that asks for nothing else but page.json (`manta.operations.peers` writes that), with the query it was itself opened
with.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

DOCUMENT = Path(__file__).with_name("page.html").read_bytes()
"""HTML in UTF-8."""


def _hash_of(tag: bytes) -> str:
    (content,) = re.findall(b"<%s>(.*?)</%s>" % (tag, tag), DOCUMENT, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"


CONTENT_SECURITY_POLICY = (
    f"default-src 'none'; script-src {_hash_of(b'script')}; style-src {_hash_of(b'style')}; connect-src 'self'; img-src data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""By their digests no script and no style but the page's own runs, whatever a name of a repo holds."""

HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Of the page. no-referrer: its address may hold the signature of a link."""

JSON_HEADERS = {
    "Content-Type": "application/json",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
}
"""Of page.json."""
