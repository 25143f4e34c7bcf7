"""`python -m tests.deploy.image DIR`: deploy/image/Dockerfile where there is no container runtime, its steps done in chroots. Needs root.

DIR gets a folder per stage, and the last is the image: `chroot DIR/final manta --version`. The base is what debootstrap makes of the
Debian release that the Dockerfile names; --base takes a folder with one. What this shows: that each RUN succeeds on a bare Debian of that
release, and that what the image has works there. What it does not: layers, the base image's own content, the runtime's rules.

The parser knows the instructions that the Dockerfile uses and refuses others. `parse` is used by the tests, which build nothing.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy/image/Dockerfile"
RELEASES = {"13": "trixie", "12": "bookworm"}
STEP_TIMEOUT_S = 900.0


@dataclass(slots=True)
class Stage:
    """One FROM and what follows it: (instruction, its words as they are written)."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)


def parse(text: str) -> tuple[dict[str, str], list[Stage]]:
    """The arguments before the first FROM with their defaults, and the stages. Raises ValueError for what it does not know."""
    joined = re.sub(r"\\\n(?:\s*#.*\n)*", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE))
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for line in filter(None, map(str.strip, joined.splitlines())):
        word, _, rest = line.partition(" ")
        match word:
            case "FROM":
                base, _, name = rest.strip().partition(" AS ")
                stages.append(Stage(name.strip() or "final", base.strip()))
            case "ARG" if not stages:
                name, _, value = rest.partition("=")
                arguments[name.strip()] = value.strip()
            case "RUN" | "COPY" | "WORKDIR" | "ENV" | "ARG" | "LABEL" | "USER" | "ENTRYPOINT" | "CMD" if stages:
                stages[-1].steps.append((word, re.sub(r"\s+", " ", rest.strip())))
            case _:
                raise ValueError(f"the Dockerfile has an instruction that is not known here: {line[:80]}")
    return arguments, stages


def pairs(words: str) -> dict[str, str]:
    """NAME=VALUE ... of ENV, LABEL and ARG."""
    return {name: value for name, _, value in (word.partition("=") for word in shlex.split(words))}


def ignored(path: str, patterns: Iterable[str]) -> bool:
    """Whether .dockerignore leaves `path` out: the last pattern that fits it, or a folder above it, decides."""
    out = False
    above = [path, *(str(folder) for folder in Path(path).parents if str(folder) != ".")]
    for pattern in patterns:
        bare = pattern.removeprefix("!").removeprefix("**/")
        fits = any(
            fnmatch.fnmatch(each, bare) or (pattern.startswith("**/") and fnmatch.fnmatch(Path(each).name, bare))
            for each in above
        )
        if fits:
            out = not pattern.startswith("!")
    return out


def ignore_patterns() -> list[str]:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


class Build:
    """The stages below `directory`, each made of `base`."""

    def __init__(self, directory: Path, base: Path) -> None:
        self._directory, self._base = directory, base
        self._patterns = ignore_patterns()

    def run(self, stage: Stage) -> Path:
        root = self._directory / stage.name
        if root.exists():
            raise FileExistsError(f"{root} is there already: remove it, or choose another folder.")
        subprocess.run(["cp", "-a", "--reflink=auto", self._base, root], check=True, timeout=STEP_TIMEOUT_S)
        cwd, env = "/", {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
        for word, rest in stage.steps:
            print(f"{stage.name}: {word} {rest[:110]}", flush=True)
            match word:
                case "RUN":
                    self._in_chroot(root, cwd, env, rest)
                case "WORKDIR":
                    cwd = rest
                    (root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
                case "COPY":
                    self._copy(root, cwd, rest)
                case "ENV":
                    env |= pairs(rest)
                case _:
                    pass  # metadata of the image, of which a folder has none
        return root

    def _copy(self, root: Path, cwd: str, rest: str) -> None:
        words = shlex.split(rest)
        origin = ROOT
        if words[0].startswith("--from="):
            origin = self._directory / words.pop(0).removeprefix("--from=")
        *sources, target = words
        to = root / os.path.join(cwd, target).lstrip("/")
        for source in sources:
            found = origin / source.lstrip("/")
            if origin != ROOT:
                subprocess.run(["cp", "-a", found, to], check=True, timeout=STEP_TIMEOUT_S)
            elif found.is_dir():
                shutil.copytree(found, to, ignore=self._left_out, dirs_exist_ok=True)
            elif ignored(source, self._patterns):
                raise FileNotFoundError(f"{source} is left out by .dockerignore, and the Dockerfile copies it.")
            else:
                shutil.copy(found, to / found.name if target.endswith("/") else to)

    def _left_out(self, folder: str, names: list[str]) -> set[str]:
        inside = Path(folder).relative_to(ROOT)
        return {name for name in names if ignored(str(inside / name), self._patterns)}

    def _in_chroot(self, root: Path, cwd: str, env: dict[str, str], command: str) -> None:
        """In a mount namespace of its own, which has /proc, /dev and this machine's way to the network."""
        script = (
            'set -e; for at in proc dev; do mount --rbind /$at "$1/$at"; done; cp -L /etc/resolv.conf /etc/hosts "$1/etc/";'
            # What this machine's pip needs to reach an index, where it needs something: not part of the image's steps.
            'for at in /etc/pip.conf /opt/wheels /opt/pypi /opt/pypi-more; do if [ -e "$at" ]; then'
            ' if [ -d "$at" ]; then mkdir -p "$1$at"; else [ -e "$1$at" ] || : > "$1$at"; fi; mount --bind "$at" "$1$at"; fi; done;'
            'if [ -e "$PIP_CERT" ]; then : > "$1/mnt/pip.crt"; mount --bind "$PIP_CERT" "$1/mnt/pip.crt"; export PIP_CERT=/mnt/pip.crt; fi;'
            'exec chroot "$1" sh -c "cd $2 && $3"'
        )
        settings = [f"{name}={value}" for name, value in (env | _proxies()).items()]
        alone = ["unshare", "--mount", "--propagation", "private", "env", "-i", *settings]
        subprocess.run([*alone, "sh", "-c", script, "-", str(root), cwd, command], check=True, timeout=STEP_TIMEOUT_S)


def _proxies() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy") or name == "PIP_CERT"}


def debootstrap(base: str, to: Path) -> None:
    """What `base`, such as debian:13.1-slim, is made of. Raises KeyError for a release that is not in RELEASES."""
    release = RELEASES[base.partition(":")[2].partition(".")[0]]
    command = ["debootstrap", "--variant=minbase", release, str(to), "http://deb.debian.org/debian"]
    subprocess.run(command, check=True, timeout=STEP_TIMEOUT_S)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--base", type=Path, help="a folder with the base's files, instead of running debootstrap")
    given = parser.parse_args()
    if os.geteuid() != 0:
        print("chroot and mount need root.", file=sys.stderr)
        return 1
    arguments, stages = parse(DOCKERFILE.read_text())
    given.directory.mkdir(parents=True, exist_ok=True)
    base = given.base or given.directory / "base"
    if given.base is None and not base.exists():
        debootstrap(arguments["BASE"], base)
    for stage in stages:
        print(f"{stage.name}: {json.dumps(str(Build(given.directory, base).run(stage)))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
