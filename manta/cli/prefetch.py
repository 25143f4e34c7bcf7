"""`manta prefetch`, and how a command waits for a job of the daemon (`follow`, also used by `manta cache verify`)."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from manta.cli.invocation import Invocation
from manta.cli.mount import target_text
from manta.cli.render import plural, rate, size
from manta.control.client import Client, with_daemon
from manta.control.protocol import Job, PrefetchRequest
from manta.errors import MantaError

POLL_S = 0.2
"""Often enough for a progress line that moves, far too seldom for the daemon to notice."""

INTERRUPTED = 130


def prefetch(invocation: Invocation) -> int:
    arguments, console = invocation.arguments, invocation.console
    target, token = target_text(arguments.target, arguments.revision), invocation.token()

    def ask(client: Client) -> tuple[Client, Job]:
        invocation.check_daemon(client)
        return client, client.prefetch(PrefetchRequest(target, token))

    client, job = with_daemon(invocation.config, ask)
    if arguments.detach:
        console.document(job)
        console.tell(
            f"The daemon fetches {title(job)} ({size(job.bytes_total)}) in the background: `manta status` shows it."
        )
        return 0
    started, had = time.monotonic(), job.bytes_done
    try:
        job = follow(invocation, client, job)
    except KeyboardInterrupt:
        job = _cancel(client, job)
        console.document(job)
        console.warn(
            f"stopped; {size(job.bytes_done)} of {size(job.bytes_total)} of {title(job)} are in the cache and stay there."
            " The same command continues from there"
        )
        return INTERRUPTED
    console.document(job)
    if job.state == "done":
        took = time.monotonic() - started
        fetched = max(0, job.bytes_done - had)
        how = (
            f"{size(fetched)} fetched in {took:.1f} s, {rate(fetched / took if took else 0)}"
            if fetched
            else "all cached"
        )
        console.tell(f"{title(job)}: {plural(job.files_total, 'file')}, {size(job.bytes_total)} in the cache ({how}).")
        return 0
    for problem in job.problems:
        console.warn(problem)
    if job.state == "cancelled":
        console.warn(f"somebody else cancelled it; {size(job.bytes_done)} of {size(job.bytes_total)} are in the cache")
    else:
        console.warn(
            f"{title(job)} is not complete: {size(job.bytes_done)} of {size(job.bytes_total)} are in the cache."
            " The same command tries the rest again"
        )
    return 1


def follow(
    invocation: Invocation,
    client: Client,
    job: Job,
    *,
    wait: Callable[[float], None] = time.sleep,
) -> Job:
    """Shows the job's progress until it ends; returns how it ended."""
    if job.state != "running":
        return job
    progress = invocation.console.progress(title(job))
    try:
        while True:
            ended = job.state != "running"
            progress.show(job.bytes_done, job.bytes_total, detail=_files(job), last=ended)
            if ended:
                return job
            wait(POLL_S)
            job = client.job(job.id)
    finally:
        progress.end()


def title(job: Job) -> str:
    """Its name with a commit that a person can take in at a glance."""
    return re.sub(r"@([0-9a-f]{12})[0-9a-f]{28}\b", r"@\1", job.name)


def _files(job: Job) -> str:
    return f"{job.files_done}/{job.files_total} files"


def _cancel(client: Client, job: Job) -> Job:
    try:
        return client.cancel(job.id)
    except MantaError:
        return job  # the daemon is gone, and with it the job; what it had fetched stays all the same
