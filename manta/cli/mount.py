"""`manta mount` and `manta umount`: from what a person asks to a directory that answers, and back with nothing left behind."""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace

from manta.cli.invocation import Invocation
from manta.cli.render import plural, size
from manta.config import Config
from manta.control.binding import (
    MOUNTINFO,
    Answer,
    Holder,
    MountEntry,
    bind,
    holders,
    locate,
    mounted_at,
    mounts,
    probe,
    unbind,
)
from manta.control.client import Client, connect, with_daemon
from manta.control.protocol import Mount, MountRequest
from manta.errors import Absent, Denied, InUse, Invalid, MantaError, NotRunning, Unavailable
from manta.model.ids import parse_revision, parse_target

WATCH_S = 2.0
"""How often a foreground mount looks whether its daemon still lives; that it was unmounted, the kernel tells at once."""


def mount(invocation: Invocation) -> int:
    arguments = invocation.arguments
    target = target_text(arguments.target or "", arguments.revision)
    directory = locate(arguments.directory)
    request = MountRequest(target, directory, arguments.view, invocation.token())
    with ExitStack() as undo:
        client, mounted = establish(
            undo, invocation.config, request, check=invocation.check_daemon, nonempty=arguments.nonempty
        )
        _tell(invocation, mounted)
        if arguments.foreground:
            return _stay(invocation, client, mounted)  # leaving the block unmounts
        undo.pop_all()
    return 0


def establish(
    undo: ExitStack,
    config: Config,
    request: MountRequest,
    *,
    check: Callable[[Client], object] = Client.status,
    nonempty: bool = False,
) -> tuple[Client, Mount]:
    """A mount that answers, on `request.directory` (see `locate`). `undo` takes it away again, also when this fails halfway.

    `check` may refuse the daemon before it is asked for the mount.
    """
    directory = request.directory
    if prepare_directory(directory, config, nonempty=nonempty):
        undo.callback(_remove_directory, directory)

    def ask(client: Client) -> tuple[Client, Mount]:
        check(client)
        return client, client.mount(request)

    client, mounted = with_daemon(config, ask)
    undo.callback(_give_up, client, mounted)
    if mounted.source != directory:
        bind(mounted.source, directory)
        undo.callback(_unbind_quietly, mounted_at(directory))
        mounted = client.bound(mounted.id, directory)
    if probe(directory) is not Answer.ALIVE:
        raise Unavailable(
            f"{directory} was mounted and does not answer, so it was unmounted again; the daemon's log is {config.log_path}."
        )
    return client, mounted


def target_text(target: str, revision: str | None) -> str:
    """TARGET with --revision in it, checked before anything is started. Raises Invalid."""
    if not target:
        if revision is not None:
            raise Invalid("--revision needs a repo: expected `manta mount ORG/NAME DIR --revision REVISION`.")
        return ""
    parsed = parse_target(target)
    if revision is not None:
        if parsed.revision is not None and parsed.revision != parse_revision(revision):
            raise Invalid(f"{target} and --revision {revision} name two revisions; give one.")
        parsed = replace(parsed, revision=parse_revision(revision))
    return str(parsed)


def prepare_directory(directory: str, config: Config, *, nonempty: bool) -> bool:
    """Makes sure that `directory` can be mounted on; returns whether it was created for that.

    A missing directory is created where its parent exists. A mount whose daemon died is detached first.
    """
    for ours, what in ((config.cache.dir, "cache"), (config.instance_dir, "runtime")):
        own = os.path.realpath(ours)
        if os.path.commonpath((own, directory)) in {own, directory}:
            raise Invalid(f"{directory} cannot be mounted on: Manta's {what} directory is {own}.")
    while (entry := mounted_at(directory)) is not None:
        _detach_dead(entry, config)
    try:
        os.mkdir(directory, 0o755)
        return True
    except FileExistsError:
        pass
    except OSError as error:
        parent = os.path.dirname(directory)
        if not os.path.isdir(parent):
            raise Invalid(
                f"{directory} cannot be made, because {parent} is no directory. (To mount one repo, name the repo and a"
                " directory: manta mount ORG/NAME DIR.)"
            ) from None
        raise Denied(f"{directory} does not exist and cannot be made: {error.strerror}.") from error
    try:
        with os.scandir(directory) as entries:
            empty = next(entries, None) is None
    except NotADirectoryError:
        raise Invalid(f"{directory} is not a directory.") from None
    except OSError as error:
        raise Denied(f"{directory} cannot be read: {error.strerror}.") from error
    if not empty and not nonempty:
        raise Invalid(
            f"{directory} is not empty: choose an empty or a new directory, or hide its content with --nonempty."
        )
    return False


def _detach_dead(entry: MountEntry, config: Config) -> None:
    """Takes away a mount that a dead daemon left. Raises InUse when something alive is mounted there."""
    directory = entry.directory
    if not entry.is_manta:
        raise InUse(f"{directory} is already a mountpoint ({entry.source}, {entry.fstype}): choose another directory.")
    answer = probe(directory)
    if answer is Answer.SILENT:
        raise InUse(f"{directory} is already mounted and does not answer: `manta umount --lazy {directory}` frees it.")
    if answer is Answer.ALIVE:
        shown = _mount_on(directory, config)
        what = f"It shows {shown.target or 'the whole hub'}. " if shown else ""
        raise InUse(f"{directory} is already mounted. {what}`manta umount {directory}` unmounts it.")
    unbind(directory, lazy=True)


def _mount_on(directory: str, config: Config) -> Mount | None:
    """What this cache directory's daemon, if it runs, knows about `directory`."""
    try:
        return next((m for m in connect(config).status().mounts if m.directory == directory), None)
    except MantaError:
        return None


def _tell(invocation: Invocation, mounted: Mount) -> None:
    console = invocation.console
    console.document(mounted)
    if mounted.commit:
        what = f"{mounted.target} at {mounted.commit[:12]}: {plural(mounted.files, 'file')}, {size(mounted.size)}"
    else:
        what = f"{invocation.config.hub.endpoint}: any repo, as ORG/NAME below it"
    console.tell(f"{mounted.directory} shows {what}. Unmount it with: manta umount {mounted.directory}")
    if mounted.stale:
        console.warn("the hub could not be asked: this is the commit that the cache remembers, not a newer one")


def _give_up(client: Client, mounted: Mount) -> None:
    with suppress(MantaError):  # it is gone already, or the daemon is
        client.unmount(mounted.id)


def _unbind_quietly(entry: MountEntry | None) -> None:
    """Ends this mount, unless somebody did so before and mounted something else there."""
    if entry is not None and _is_there(entry):
        with suppress(MantaError):
            unbind(entry.directory, lazy=True)


def _is_there(entry: MountEntry) -> bool:
    now = mounted_at(entry.directory)
    # The kernel gives the number of a mount that is gone to the next one.
    return now is not None and (now.id, now.device, now.root) == (entry.id, entry.device, entry.root)


def _remove_directory(directory: str) -> None:
    with suppress(OSError):
        os.rmdir(directory)


def _stay(invocation: Invocation, client: Client, mounted: Mount) -> int:
    """Returns when the mount is gone, or a signal asks for its end."""
    directory, console = mounted.directory, invocation.console
    try:
        ours = mounted_at(directory)
        console.tell("Ctrl-C unmounts it.")
        console.flush()
        with MOUNTINFO.open("rb") as mountinfo:
            # The kernel marks mountinfo when anything is mounted or unmounted.
            poll = select.poll()
            poll.register(mountinfo.fileno(), select.POLLPRI | select.POLLERR)
            while ours is not None and _is_there(ours):
                poll.poll(WATCH_S * 1000)
                with suppress(Unavailable):  # busy; what matters is whether it is there
                    client.status()
    except NotRunning as error:
        raise Unavailable(
            f"The daemon that served {directory} is gone, so it was unmounted; its log is {invocation.config.log_path}."
        ) from error
    except KeyboardInterrupt:
        if holding := holders(directory):
            console.warn(f"{directory} is still used by {_named(holding)}: what they have open stays readable to them")
        return 0
    console.tell(f"{directory} was unmounted.")
    return 0


# Unmounting ----------------------------------------------------------------------------------------------------------


def umount(invocation: Invocation) -> int:
    arguments, console = invocation.arguments, invocation.console
    directory = locate(arguments.directory)
    entry = mounted_at(directory)
    if entry is None:
        raise Absent(f"Nothing is mounted on {directory}; `manta status` lists Manta's mounts.")
    if not entry.is_manta:
        raise Invalid(
            f"{directory} is no mount of Manta's but of {entry.source} ({entry.fstype}): use umount {directory}."
        )
    client: Client | None = None
    known: Mount | None = None
    with suppress(MantaError):  # no daemon, or a stuck one: the mount can go without it
        client = connect(invocation.config)
        known = next((m for m in client.status().mounts if m.directory == directory), None)
    try:
        unbind(directory, lazy=arguments.lazy)
    except InUse as error:
        if probe(directory) is not Answer.DEAD:
            holding = holders(directory)
            by = f" by {_named(holding)}" if holding else ""
            raise InUse(
                f"{directory} is in use{by}. End that first, or let it disappear now and for them later with:"
                f" manta umount --lazy {directory}"
            ) from error
        unbind(directory, lazy=True)  # who holds a dead mount open gets errors from it anyway
    if client is not None and known is not None:
        _give_up(client, known)
    elif client is None:
        _detach_dead_root(invocation.config, entry)
    console.document({"directory": directory, "unmounted": True, "target": known.target if known else None})
    console.tell(f"{directory} is unmounted.")
    return 0


def _detach_dead_root(config: Config, gone: MountEntry) -> None:
    """Takes the dead daemon's own mount away with its last binding; the next daemon would do it too, and may never come."""
    root = mounted_at(str(config.mount_root))
    if root is None or root.device != gone.device:
        return
    bindings = [e for e in mounts() if e.device == root.device and e.directory != root.directory]
    if not bindings and probe(root.directory) is Answer.DEAD:
        _unbind_quietly(root)


def _named(holding: list[Holder]) -> str:
    return ", ".join(f"{holder.command} (pid {holder.pid}, {holder.how})" for holder in holding)
