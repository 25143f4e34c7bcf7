"""One frame of `manta top`: a daemon's status as lines for a screen of a given size, here and only here. Pure."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from manta.cli.render import duration, mounted_on, plural, rate, share, size, table
from manta.control.protocol import FileTransfer, Mount, Source, Status

Style = Literal["plain", "title", "warning", "error"]

BAR_COLUMNS = 12
NAME_COLUMNS_MIN = 24
"""A path is shortened down to this before columns of less use are left out."""

GAP_ROWS = 2
"""What a section takes beside its rows: an empty line and its title."""


class Line(NamedTuple):
    text: str
    style: Style = "plain"


_Row = tuple[Style, Sequence[str]]


@dataclass(frozen=True, slots=True)
class _Section:
    """A table. Its first column is shortened where there is no room, after those of `hides` were left out, the first first."""

    head: Sequence[str]
    rows: Sequence[_Row]
    hides: Sequence[int] = ()


def frame(
    seen: Status,
    *,
    now: float,
    width: int,
    height: int | None = None,
    read_rate: float | None = None,
    trouble: str = "",
) -> list[Line]:
    """At most `height` lines (None: as many as it takes) of at most `width` columns.

    `now` is in seconds since the epoch; `read_rate` is what readers get, in bytes per second, None where it is not known yet; `trouble` is
    why `seen` is not the latest.
    """
    lines = [*_head(seen, now, read_rate), *([Line(trouble, "error")] if trouble else [])]
    sections = [
        _Section(
            ("FILE IN FLIGHT", "", ">", ">RATE", ">LEFT", ">WAITING", "FROM"), _files(seen.transfers), hides=(6, 1, 5)
        ),
        _Section(("MOUNTED ON", "TARGET", "COMMIT", ">CACHED", ">", ">RATE"), _mounts(seen.mounts), hides=(2, 5)),
        _Section(
            ("SOURCE", ">RATE", ">IN ALL", ">CONNECTIONS", ">FAILURES", ""), _sources(seen.sources, now), hides=(2, 4)
        ),
        _Section(("WHAT IS WRONG NOW",), [("error", (sentence,)) for sentence in seen.problems]),
        _Section(("LATEST ERRORS",), [("error", (sentence,)) for sentence in reversed(seen.errors)]),
    ]
    room = None if height is None else height - len(lines)
    shown = _fair_shares([len(section.rows) for section in sections], room)
    for index in (1, 0, 2, 3, 4):  # mounts above files: what is there, then what goes on
        lines += _drawn(sections[index], shown[index], width)
    return [Line(cut(line.text, width), line.style) for line in lines[:height]]


def _head(seen: Status, now: float, read_rate: float | None) -> list[Line]:
    up, offline = duration(max(0.0, now - seen.started)), " (offline: only what is cached)" if seen.offline else ""
    cache = size(seen.cache_bytes)
    if seen.cache_limit:
        filled = min(1.0, seen.cache_bytes / seen.cache_limit)
        cache += f" of {size(seen.cache_limit)} {_bar(filled)} {share(seen.cache_bytes, seen.cache_limit)}"
    readers = "" if read_rate is None else f"{rate(read_rate)}, "
    quotas = [
        f"{quota.kind} {quota.remaining:,}{f' of {quota.limit:,}' if quota.limit else ''} (new in {duration(quota.reset_s)})"
        for quota in seen.quotas
    ]
    spent = any(quota.limit and quota.remaining * 10 < quota.limit for quota in seen.quotas)
    return [
        Line(f"manta {seen.version}, pid {seen.pid}, up {up}, {seen.endpoint}{offline}", "title"),
        Line(
            f"fetching  {rate(seen.origin_rate)} on {plural(seen.connections_in_use, 'connection')} of"
            f" {seen.connections_allowed}, {size(seen.origin_bytes)} in all"
        ),
        *_peers(seen),
        Line(
            f"reading   {readers}{plural(seen.open_files, 'open file')}, {plural(seen.reads_waiting, 'read')} waiting,"
            f" {size(seen.read_bytes)} in all"
        ),
        Line(f"cache     {cache}, {size(seen.disk_free)} free on its disk"),
        Line(f"quota     {'; '.join(quotas) or 'the hub has told of none'}", "warning" if spent else "plain"),
    ]


def _peers(seen: Status) -> list[Line]:
    swarm = seen.swarm
    if swarm is None:
        return []
    return [
        Line(
            f"peers     {swarm.up} of {swarm.members} up, {rate(swarm.rate_in)} from them, {rate(swarm.rate_out)} to them on"
            f" {swarm.busy} of {plural(swarm.slots, 'slot')}, {size(swarm.bytes_in)} and {size(swarm.bytes_out)} in all",
            "plain" if swarm.up == swarm.members else "warning",
        )
    ]


def _files(transfers: Sequence[FileTransfer]) -> list[_Row]:
    # Whom somebody waits for comes first, then what is fastest.
    ordered = sorted(transfers, key=lambda t: (-t.waiting, -t.rate, t.name))
    return [
        (
            "warning" if transfer.waiting and not transfer.rate else "plain",
            (
                transfer.name,
                _bar(transfer.cached / transfer.size if transfer.size else 1.0),
                share(transfer.cached, transfer.size),
                rate(transfer.rate),
                duration((transfer.size - transfer.cached) / transfer.rate) if transfer.rate else "-",
                plural(transfer.waiting, "read") if transfer.waiting else "",
                host(transfer.source),
            ),
        )
        for transfer in ordered
    ]


def _mounts(mounts: Sequence[Mount]) -> list[_Row]:
    return [
        (
            "warning" if mount.stale else "plain",
            (
                mounted_on(mount),
                mount.target or "(whole hub)",
                f"{mount.commit[:12] or '-'}{' (stale)' if mount.stale else ''}",
                f"{size(mount.cached)} of {size(mount.size)}",
                share(mount.cached, mount.size),
                rate(mount.rate),
            ),
        )
        for mount in mounts
    ]


def _sources(sources: Sequence[Source], now: float) -> list[_Row]:
    rows: list[_Row] = []
    for source in sources:
        paused = source.throttled_until - now
        rows.append(
            (
                "warning" if paused > 0 else "plain",
                (
                    f"peer {source.node[:8]} {host(source.origin)}" if source.node else host(source.origin),
                    rate(source.rate),
                    size(source.bytes),
                    str(source.connections),
                    str(source.failures),
                    f"asked for a pause of {duration(paused)} more" if paused > 0 else "",
                ),
            )
        )
    return rows


def _fair_shares(wanted: Sequence[int], room: int | None) -> list[int]:
    """How many rows each section shows: in turns, so that a long list leaves room for the others. Earlier ones go first."""
    if room is None:
        return list(wanted)
    shown = [0] * len(wanted)
    while True:
        before = room
        for index, count in enumerate(wanted):
            cost = 1 if shown[index] else 1 + GAP_ROWS
            if shown[index] < count and cost <= room:
                shown[index] += 1
                room -= cost
        if room == before:
            return shown


def _drawn(section: _Section, shown: int, width: int) -> list[Line]:
    if not shown:
        return []
    rows = [[clean(cell) for cell in cells] for _, cells in section.rows[:shown]]
    title, *texts = _fitted(section, rows, width)
    more = f" ({shown} of {len(section.rows)})" if shown < len(section.rows) else ""
    styles = [style for style, _ in section.rows[:shown]]
    return [Line(""), Line(title + more, "title"), *map(Line, texts, styles)]


def _fitted(section: _Section, rows: Sequence[Sequence[str]], width: int) -> list[str]:
    kept, hides = list(range(len(section.head))), list(section.hides)
    needed = min(NAME_COLUMNS_MIN, max(columns(row[0]) for row in rows))
    while True:
        others = sum(
            max(map(columns, (section.head[i].removeprefix(">"), *(row[i] for row in rows)))) + 2 for i in kept[1:]
        )
        if width - others >= needed or not hides:
            break
        kept.remove(hides.pop(0))
    room = max(width - others, 8)
    shown = [[shortened(row[0], room), *(row[i] for i in kept[1:])] for row in rows]
    return table([section.head[i] for i in kept], shown)


def _bar(done: float) -> str:
    filled = int(done * BAR_COLUMNS)
    return f"[{'#' * filled}{'.' * (BAR_COLUMNS - filled)}]"


def host(origin: str) -> str:
    """An origin without what goes without saying: https, and a scheme's own port."""
    scheme, _, rest = origin.rpartition("://")
    return rest.removesuffix(":443" if scheme == "https" else ":80")


def clean(text: str) -> str:
    """A name from a hub as a terminal may get it: nothing in it moves the cursor."""
    return "".join(c if c.isprintable() else "?" for c in text)


def columns(text: str) -> int:
    """How wide a terminal shows `text`."""
    return sum(_columns_of(c) for c in text)


def _columns_of(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in {"W", "F"} else 1


def cut(text: str, width: int) -> str:
    """As much of `text` as `width` columns hold."""
    if columns(text) <= width:
        return text
    taken, used = "", 0
    for character in text:
        used += _columns_of(character)
        if used > width:
            break
        taken += character
    return taken


def shortened(text: str, width: int) -> str:
    """`text` in at most `width` columns, its middle left out: a path's end says the most, its beginning the rest."""
    if columns(text) <= width:
        return text
    end = (width - 3) * 2 // 3
    tail = cut(text[::-1], end)[::-1]
    return f"{cut(text, width - 3 - end)}...{tail}"
