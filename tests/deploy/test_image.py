"""deploy/image/Dockerfile: what it promises, as far as that can be read from it. `python -m tests.deploy.image` makes it."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from manta import __version__
from tests.deploy.image import DOCKERFILE, ROOT, Stage, ignore_patterns, ignored, pairs, parse

ARGUMENTS, STAGES = parse(DOCKERFILE.read_text())
BUILD, FINAL = STAGES


def steps(stage: Stage, word: str) -> list[str]:
    return [rest for name, rest in stage.steps if name == word]


def installed(stage: Stage) -> set[str]:
    pattern = re.compile(r"apt-get install -y --no-install-recommends ([a-z0-9. +-]+?)(?: &&|$)")
    return {name for each in steps(stage, "RUN") for names in pattern.findall(each) for name in names.split()}


def test_both_stages_have_the_same_base_by_an_exact_tag() -> None:
    assert (BUILD.base, FINAL.base) == ("${BASE}", "${BASE}")
    assert re.fullmatch(r"debian:\d+\.\d+-slim", ARGUMENTS["BASE"])


def test_what_builds_stays_behind() -> None:
    assert {"gcc", "libfuse3-dev", "pkg-config"} <= installed(BUILD)
    assert installed(FINAL) == {"ca-certificates", "fuse3", "python3"}
    assert steps(FINAL, "COPY") == ["--from=build /opt/manta /opt/manta"]
    assert "rm -rf /var/lib/apt/lists" in steps(FINAL, "RUN")[0]


def test_nobody_is_root_who_does_not_ask_for_it() -> None:
    assert steps(FINAL, "USER") == ["65532:65532"]
    assert steps(FINAL, "ENTRYPOINT") == ['["manta"]']
    assert not any(re.search("TOKEN=|KEY=", each) for each in steps(FINAL, "ENV") + steps(BUILD, "ENV"))


def test_it_says_what_it_is() -> None:
    labels = pairs(steps(FINAL, "LABEL")[0])
    assert labels["org.opencontainers.image.title"] == "manta"
    assert labels["org.opencontainers.image.version"] == "${VERSION}"
    assert steps(FINAL, "ARG") == [f"VERSION={__version__}"]


def test_the_context_is_the_packages_and_nothing_else() -> None:
    patterns = ignore_patterns()
    for path in (
        "pyproject.toml",
        "README.md",
        "manta/daemon.py",
        "csi-driver/pyproject.toml",
        "deploy/image/constraints.txt",
    ):
        assert not ignored(path, patterns), path
    for path in (
        ".git/config",
        ".venv/bin/python",
        "tests/conftest.py",
        "manta/__pycache__/x.pyc",
        "deploy/charts/manta/Chart.yaml",
    ):
        assert ignored(path, patterns), path


@pytest.mark.parametrize("project", ["pyproject.toml", "csi-driver/pyproject.toml"])
def test_every_dependency_is_pinned_to_a_version_that_the_package_takes(project: str) -> None:
    if not (ROOT / project).exists():
        pytest.skip(f"{project} is not here")
    lines = (ROOT / "deploy/image/constraints.txt").read_text().splitlines()
    pinned = {
        canonicalize_name(name): version
        for name, _, version in (line.partition("==") for line in lines if not line.startswith("#"))
    }
    described: dict[str, Any] = tomllib.loads((ROOT / project).read_text())["project"]
    extras = described.get("optional-dependencies", {})
    wanted = [*described["dependencies"], *extras.get("kubernetes", []), *extras.get("events", [])]
    for requirement in map(Requirement, wanted):
        if requirement.name != "manta":
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


@pytest.mark.parametrize("text", ["FROM a\nONBUILD RUN x\n", "RUN x\n"])
def test_an_instruction_that_is_not_known_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse(text)
