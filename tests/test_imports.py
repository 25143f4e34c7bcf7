"""Imports point one way, heavy libraries stay where they belong, and modules are named for what they define: read from the source, by AST.

The rules are docs/architecture.md's, here as one table. A new edge between two parts is a decision, which belongs into the table.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ALLOWED: dict[str, set[str]] = {
    # Pure values, known to everybody.
    "errors": set(),
    "model": {"errors"},
    "config": {"errors"},
    # Run by path, with nothing but the standard library. Who starts it takes its command line from it.
    "keeper": set(),
    "keepstore": set(),
    # The parts that know one thing each: the disk, the messages, the hub.
    "cache": {"errors", "model"},
    "wire": {"errors", "model"},
    "hub": {"errors", "model", "config", "swarm.protocol"},
    # What nodes say to each other and by which rules; and the process that says it, which reads the cache's files and never writes them.
    "swarm": {"errors", "model", "wire", "cache.chunkmap", "cache.incarnation", "cache.layout", "config"},
    # What the daemon tells about itself: called by the data path, knows nothing of it.
    "telemetry": {"errors", "model", "wire"},
    # The data path, each on the one before. Of the hub it knows the values; who asks the hub is the daemon.
    "fetch": {
        "errors", "model", "config", "cache", "wire", "hub.circuit", "hub.origin", "hub.quota", "telemetry", "swarm.choice",
        "swarm.ownership", "swarm.protocol",
    },
    "fs": {"errors", "model", "fetch", "hub.origin", "telemetry"},
    "fuse": {"errors", "config", "fs", "control.binding"},
    # The worker process: the wire, the digests that it computes where it writes, and how to read a hub's request to wait.
    "worker": {"errors", "model", "wire", "cache.digests", "hub.quota", "swarm.auth", "swarm.compression", "swarm.protocol"},
    # Who is asked over the control API, and who asks. `wire.messages` for what a worker answers to a verification.
    "operations": {
        "errors", "model", "config", "cache", "fetch", "fs", "hub.catalog", "hub.identity", "hub.origin", "control.protocol", "keeper",
        "keepstore", "telemetry", "wire.messages", "wire.peering", "swarm.protocol",
    },
    "control": {"errors", "model", "config", "keeper"},
    "cli": {"errors", "model", "config", "control", "keeper", "keepstore"},
    # The composition root, the fakes, and `python -m manta`.
    "daemon": {
        "errors", "model", "config", "cache", "hub", "fetch", "fs", "fuse", "operations", "control", "keeper", "telemetry", "swarm.auth",
        "swarm.keys",
    },
    "testing": {"errors", "model", "config", "cache", "wire", "fetch", "worker", "control.client"},
    "__main__": {"cli"},
}  # fmt: skip
"""What each part of manta may import, besides itself and the version in `manta` itself."""

LAZY: dict[str, set[str]] = {
    # `manta daemon` and `manta hub serve` become those, `manta doctor` tries what the kernel takes; every other command is rid of what they
    # load.
    "cli": {"daemon", "testing", "fuse.device"},
}
"""What may be imported besides, inside functions only."""

LIBRARIES: dict[str, set[str]] = {
    "aiohttp": {"swarm", "testing"},
    "asyncio": {"swarm", "wire.link", "worker", "testing"},
    "trio": {
        "hub", "fetch", "fs", "fuse", "operations", "control.http", "control.metrics", "control.server", "daemon", "testing.workers",
    },
    "pyfuse3": {"fuse", "cli.doctor"},  # the doctor looks whether it is there
    "h11": {"control.http", "worker"},
    "prometheus_client": {"telemetry.metrics"},
    "huggingface_hub": {"hub", "testing"},
    "lz4": {"cache", "swarm", "worker"},
    "xxhash": {"cache", "swarm.ownership"},
    "kubernetes_asyncio": {"swarm.kubernetes"},
    "grpc": {"testing.kubelet"},
    "google": {"testing.csi"},
    "requests": set(),
}  # fmt: skip
"""Where each library may be known. A part that is not named must run, and be tested, without it."""

DRIVER = ROOT / "csi-driver"
DRIVER_ALLOWED = {"config", "control", "errors", "model.ids"}
"""What the CSI driver (manta_csi) may import of Manta: what a client of the daemon needs."""
DRIVER_LIBRARIES = {"google", "grpc", "kubernetes_asyncio", "msgspec"}

FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "managers", "misc"}


@dataclass(frozen=True)
class Import:
    """One import statement: `importer` and `imported` are dotted names."""

    importer: str
    imported: str
    lazy: bool
    where: str


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imports_of(path: Path) -> Iterator[Import]:
    """Every import in a file. One below `if TYPE_CHECKING` counts as any other: it is a dependency of whoever reads the code."""
    importer = dotted(path)
    package = importer if path.name == "__init__.py" else importer.rpartition(".")[0]

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, *([base] if base else [])])
            submodules = [f"{base}.{alias.name}" for alias in node.names if is_module(f"{base}.{alias.name}")]
            names = submodules or [base]
        for name in names:
            yield Import(importer, name, lazy, f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}")
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    return visit(parsed(path), False)


def all_imports(*folders: str) -> list[Import]:
    return [found for path in sources(*folders) for found in imports_of(path)]


def within(name: str, parts: set[str]) -> bool:
    """Whether `name` (below manta) is one of `parts` or lies in one."""
    return any(name == part or name.startswith(part + ".") for part in parts)


def part_of(module: str) -> str:
    """The part of manta that a module belongs to: ``manta.cache.store`` is ``cache``, ``manta`` itself is empty."""
    return [*module.split("."), ""][1]


def faults(found: Import) -> bool:
    importer, imported = part_of(found.importer), part_of(found.imported)
    if not found.imported.startswith("manta.") or importer == imported:
        return False
    allowed = ALLOWED.get(importer, set()) | (LAZY.get(importer, set()) if found.lazy else set())
    return not within(found.imported.removeprefix("manta."), allowed)


def test_every_part_of_manta_has_its_rule() -> None:
    parts = {part_of(dotted(path)) for path in sources("manta")} - {""}
    assert parts - set(ALLOWED) == set(), "a new part: say in ALLOWED what it may import"


def test_imports_point_one_way() -> None:
    wrong = [f"{i.where}: {i.importer} imports {i.imported}" for i in all_imports("manta") if faults(i)]
    assert wrong == []


def test_no_rule_allows_what_nobody_does() -> None:
    """A table that allows too much says nothing. (`model` is for everybody.)"""
    used = {(part_of(i.importer), i.imported.removeprefix("manta.")) for i in all_imports("manta")}
    idle = [
        f"{part} -> {target}"
        for part, targets in ALLOWED.items()
        for target in targets - {"model", "errors", "config"}
        if not any(importer == part and within(imported, {target}) for importer, imported in used)
    ]
    assert sorted(idle) == []


def test_the_table_has_no_circle() -> None:
    done: list[str] = []
    left = {part: {target.split(".")[0] for target in targets} for part, targets in ALLOWED.items()}
    while left:
        free = sorted(part for part, targets in left.items() if targets <= set(done))
        assert free, f"a circle among {sorted(left)}"
        done += free
        for part in free:
            del left[part]


def test_nobody_imports_the_daemon_but_the_command_line() -> None:
    importers = {i.importer for i in all_imports("manta") if i.imported == "manta.daemon"}
    assert {part_of(importer) for importer in importers} <= {"cli"}


def test_nobody_imports_the_fakes_but_the_command_line() -> None:
    importers = {part_of(i.importer) for i in all_imports("manta") if within(i.imported, {"manta.testing"})}
    assert importers <= {"cli", "testing"}


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_known_only_where_it_belongs(library: str) -> None:
    wrong = [
        f"{i.where}: {i.importer} imports {i.imported}"
        for i in all_imports("manta")
        if i.imported.split(".")[0] == library and not within(i.importer.removeprefix("manta."), LIBRARIES[library])
    ]
    assert wrong == []


def test_what_is_shipped_imports_no_tests_and_no_benchmarks() -> None:
    assert [i.where for i in all_imports("manta") if i.imported.split(".")[0] in {"tests", "benchmarks"}] == []


def driver_sources() -> list[Path]:
    return [path for path in sources("csi-driver") if "_pb2" not in path.name]


def test_the_csi_driver_is_a_client_of_the_daemon_and_nothing_more() -> None:
    imports = [found for path in driver_sources() for found in imports_of(path)]
    wrong = [
        f"{i.where}: imports {i.imported}"
        for i in imports
        if i.imported.startswith("manta.") and not within(i.imported.removeprefix("manta."), DRIVER_ALLOWED)
    ]
    libraries = {i.imported.split(".")[0] for i in imports} - sys.stdlib_module_names - {"manta", "manta_csi"}
    assert wrong == []
    assert libraries - DRIVER_LIBRARIES - {"grpc_tools"} == set()
    assert [i.where for i in imports if i.imported.startswith("kubernetes_asyncio") and not i.lazy] == []
    assert [i.where for i in all_imports("manta") if i.imported.split(".")[0] == "manta_csi"] == []


def test_every_module_says_what_it_is() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in [*sources("manta", "benchmarks"), *driver_sources()]
        if not ast.get_docstring(parsed(path))
    ]
    assert silent == []


def test_modules_are_named_for_what_they_define() -> None:
    named = {
        path: set(path.relative_to(ROOT).with_suffix("").parts)
        for path in sources("manta", "tests", "benchmarks", "csi-driver")
    }
    assert [str(path) for path, parts in named.items() if parts & FORBIDDEN_NAMES] == []


def test_tests_mirror_what_they_test() -> None:
    """tests/PART/test_NAME.py tests manta/PART/NAME.py, and tests/csi/test_NAME.py the driver's module."""
    strays = [
        str(path.relative_to(ROOT))
        for part in (
            "model",
            "cache",
            "wire",
            "hub",
            "fetch",
            "fs",
            "fuse",
            "worker",
            "operations",
            "control",
            "cli",
            "telemetry",
            "swarm",
        )
        for path in sources(f"tests/{part}")
        if path.name.startswith("test_")
        and not is_module(f"manta.{'.'.join(path.relative_to(ROOT / 'tests').parent.parts)}.{path.stem[5:]}")
    ]
    strays += [
        str(path.relative_to(ROOT))
        for path in sources("tests/csi")
        if path.parent.name == "csi"
        and path.name.startswith("test_")
        and not (DRIVER / "manta_csi" / f"{path.stem[5:]}.py").exists()
        and not (DRIVER / "manta_csi" / path.stem[5:] / "__init__.py").exists()
    ]
    assert strays == []


# The test itself -----------------------------------------------------------------------------------------------------


def imports_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, text: str) -> list[Import]:
    path = tmp_path / (module.replace(".", "/") + ".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    return list(imports_of(path))


@pytest.mark.parametrize(
    ("module", "text", "wrong"),
    [
        ("manta.fs.x", "import manta.daemon", True),
        ("manta.fs.x", "from manta.hub.catalog import Catalog", True),
        ("manta.fs.x", "from manta.hub.origin import Access", False),
        ("manta.fs.x", "from ..fuse import errno", True),
        ("manta.fs.x", "from . import y", False),
        ("manta.fs.x", "def f():\n    from manta.cache.store import Store", True),
        ("manta.fs.x", "if TYPE_CHECKING:\n    from manta.control.client import Client", True),
        ("manta.fs.x", "from manta import __version__", False),
        ("manta.cli.x", "from manta.daemon import run", True),
        ("manta.cli.x", "def f():\n    from manta.daemon import run", False),
        ("manta.cli.x", "class C:\n    async def f(self):\n        import manta.testing.hub", False),
        ("manta.new.x", "import manta.errors", True),
    ],
)
def test_a_wrong_import_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, text: str, wrong: bool
) -> None:
    assert [faults(found) for found in imports_in(tmp_path, monkeypatch, module, text)] == [wrong]
