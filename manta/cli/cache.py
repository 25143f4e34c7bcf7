"""`manta cache ls|verify|pin|unpin|rm|gc`: what is on the disk, whether it is whole, what stays and what goes."""

from __future__ import annotations

import time

from manta.cli.invocation import Invocation
from manta.cli.prefetch import INTERRUPTED, follow
from manta.cli.render import Console, duration, plural, rate, share, size, table
from manta.config import parse_size
from manta.control.client import Client, with_daemon
from manta.control.protocol import Blob, CacheListing, CacheSelection, GcRequest, Job, Removal, VerifyRequest


def ls(invocation: Invocation) -> int:
    console = invocation.console
    listing = with_daemon(invocation.config, Client.cache)
    console.document(listing)
    if not listing.blobs:
        console.say(f"The cache {invocation.config.cache.dir} is empty.")
        return 0
    console.say(*_blob_table(listing.blobs, whole_ids=console.verbosity >= 1))
    limit = f" of at most {size(listing.cache_limit)}" if listing.cache_limit else ""
    console.say(
        "", f"{plural(len(listing.blobs), 'blob')}, {size(listing.cache_bytes)}{limit} in {invocation.config.cache.dir}"
    )
    return 0


def _blob_table(blobs: list[Blob], *, whole_ids: bool = False) -> list[str]:
    now = time.time()
    rows = [
        (
            _title(blob),
            f"{size(blob.cached)} of {size(blob.size)}" if blob.cached < blob.size else size(blob.size),
            share(blob.cached, blob.size),
            _state(blob),
            f"{duration(max(0.0, now - blob.last_used))} ago" if blob.last_used else "-",
            blob.id if whole_ids else blob.id[:19],
        )
        for blob in sorted(blobs, key=lambda blob: (_title(blob), blob.id))
    ]
    return table(("FILE", ">CACHED", ">", "STATE", "USED", "BLOB"), rows)


def _title(blob: Blob) -> str:
    if not blob.names:
        return "(of no stored commit)"
    return blob.names[0] + (f" (+{len(blob.names) - 1})" if len(blob.names) > 1 else "")


def _state(blob: Blob) -> str:
    words = ["verified" if blob.sealed else "partial"]
    words += ["pinned"] if blob.pinned else []
    words += ["in use"] if blob.in_use else []
    return ", ".join(words)


def verify(invocation: Invocation) -> int:
    console, arguments = invocation.console, invocation.arguments
    request = VerifyRequest(arguments.names, full=arguments.full, repair=arguments.repair)

    def ask(client: Client) -> tuple[Client, Job]:
        return client, client.verify(request)

    client, job = with_daemon(invocation.config, ask)
    try:
        job = follow(invocation, client, job)
    except KeyboardInterrupt:
        job = client.cancel(job.id)
        console.document(job)
        console.warn("stopped; what was found damaged until then is not served any more")
        return INTERRUPTED
    console.document(job)
    for problem in job.problems:
        console.warn(problem)
    looked_at = f"{plural(job.files_total, 'blob')}, {size(job.bytes_done)}"
    if job.seconds:
        looked_at += f" in {job.seconds:.1f} s ({rate(job.bytes_done / job.seconds)})"
    if job.state == "done":
        matched = "the hub's digests and their own" if request.full else "their digests"
        console.tell(f"{looked_at}: all match {matched}.")
        return 0
    if job.state == "cancelled":
        console.warn(f"{looked_at}; somebody else cancelled it")
    elif job.damaged:
        mended = f", {job.repaired} of them fetched anew" if request.repair else ""
        console.warn(f"{looked_at}: {plural(job.damaged, 'damaged chunk')}{mended}")
    else:
        console.warn(f"{looked_at}: {plural(len(job.problems), 'blob')} could not be verified")
    return 1


def pin(invocation: Invocation) -> int:
    return _pins(invocation, with_daemon(invocation.config, lambda c: c.pin(_selection(invocation))), "pinned")


def unpin(invocation: Invocation) -> int:
    return _pins(
        invocation, with_daemon(invocation.config, lambda c: c.unpin(_selection(invocation))), "no longer pinned"
    )


def _selection(invocation: Invocation) -> CacheSelection:
    return CacheSelection(invocation.arguments.names)


def _pins(invocation: Invocation, listing: CacheListing, what: str) -> int:
    invocation.console.document(listing)
    total = sum(blob.size for blob in listing.blobs)
    invocation.console.tell(f"{plural(len(listing.blobs), 'blob')}, {size(total)}: {what}.")
    return 0


def rm(invocation: Invocation) -> int:
    removal = with_daemon(invocation.config, lambda c: c.remove(_selection(invocation)))
    _say_removal(invocation.console, removal, "removed")
    return 1 if removal.kept else 0


def gc(invocation: Invocation) -> int:
    arguments = invocation.arguments
    request = GcRequest(parse_size(arguments.size) if arguments.size is not None else -1, arguments.dry_run)
    removal = with_daemon(invocation.config, lambda c: c.collect(request))
    _say_removal(invocation.console, removal, "would be removed" if arguments.dry_run else "removed")
    return 0


def _say_removal(console: Console, removal: Removal, done: str) -> None:
    console.document(removal)
    if removal.removed and console.verbosity >= 0:
        console.say(*_blob_table(removal.removed), "")
    console.tell(f"{plural(len(removal.removed), 'blob')} {done}, {size(removal.freed)}.")
    for sentence in removal.kept:
        console.warn(sentence)
