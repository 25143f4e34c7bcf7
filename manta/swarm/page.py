"""The status page for people, on the peer server's port, here and only here. Used by `manta.swarm.server`.

From this machine itself everybody may see it who can open a connection; elsewhere who has a link that `manta.swarm.auth` signed.
What it shows the daemon says (page.json); the page itself is `manta.swarm.document`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from urllib.parse import parse_qsl, urlencode, urlsplit

from aiohttp import web

from manta.errors import Unavailable
from manta.swarm.auth import page_is_signed
from manta.swarm.document import DOCUMENT, HEADERS, JSON_HEADERS
from manta.swarm.door import is_loopback
from manta.swarm.questions import Questions

PAGE = "/"
DATA = "/page.json"

DATA_SECONDS_MAX = 5.0
TARGET_BYTES_MAX = 2048

SERVER = {"Server": "manta"}

_REFUSAL = (
    "This page is for the machine itself: open it there at the address that the node listens at, or anywhere with the link that"
    " `manta peers --page` prints.\n"
)


class Page:
    def __init__(self, questions: Questions) -> None:
        self._questions = questions

    async def answer(self, request: web.BaseRequest, keys: Sequence[bytes]) -> web.Response:
        """Never raises for what a request says."""
        path, _, query = request.raw_path.partition("?")
        if path not in {PAGE, DATA} or len(request.raw_path) > TARGET_BYTES_MAX:
            return _text(404, "There is nothing here.\n")
        if request.method != "GET":
            return _text(405, "Only GET is answered.\n")
        fields = parse_qsl(query, keep_blank_values=True)
        given = dict(fields)
        signed = page_is_signed(given.get("until", ""), given.get("mac", ""), keys, time.time())
        if not signed and not _from_here(request):
            return _text(403, _REFUSAL)
        if path == PAGE:
            return web.Response(body=DOCUMENT, headers={**SERVER, **HEADERS})
        rest = urlencode([(name, value) for name, value in fields if name not in {"until", "mac"}])
        return await self._data(f"{path}?{rest}" if rest else path)

    async def _data(self, target: str) -> web.Response:
        try:
            answered = await self._questions.ask("", "page", target.encode(), DATA_SECONDS_MAX)
        except Unavailable as error:
            return _text(503, f"{error.message}\n")
        try:
            body = answered.body if answered.file is None else os.pread(answered.file, answered.file_bytes, 0)
        except (OSError, Unavailable):
            return _text(503, "The daemon's answer could not be read.\n")
        finally:
            answered.close()
        return web.Response(status=answered.status, body=body, headers={**SERVER, **JSON_HEADERS})


def _text(status: int, text: str) -> web.Response:
    headers = {name: value for name, value in JSON_HEADERS.items() if name != "Content-Type"}
    return web.Response(status=status, text=text, headers={**SERVER, **headers})


def _from_here(request: web.BaseRequest) -> bool:
    """Whether a program of this machine asks for itself: no proxy that passes on others, and no page of another site whose name was made
    to lead here."""
    try:
        name = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
        named_here = name == "localhost" or is_loopback(name)
        from_here = is_loopback(request.remote or "")
    except ValueError:
        return False
    return from_here and named_here and not request.headers.keys() & {"Forwarded", "X-Forwarded-For"}
