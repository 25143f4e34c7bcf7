"""Makes the stubs beside csi-driver/manta_csi/proto/*.proto: `make proto`. The dev extra pins the versions of what it needs.

python csi-driver/stubs.py [DIRECTORY]     into another directory, to compare
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def generate(directory: Path) -> None:
    """Writes manta_csi/proto/*_pb2*.py and .pyi below `directory`, which exists."""
    import grpc_tools

    protos = sorted(str(path.relative_to(HERE)) for path in (HERE / "manta_csi/proto").glob("*.proto"))
    kinds = ("python", "grpc_python", "mypy", "mypy_grpc")
    plugins = [
        f"--plugin=protoc-gen-{kind}={Path(sys.executable).with_name(f'protoc-gen-{kind}')}" for kind in kinds[2:]
    ]
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc"),
            *(f"--proto_path={HERE}", f"--proto_path={Path(grpc_tools.__file__).parent / '_proto'}"),
            *plugins,
            *(f"--{kind}_out={directory}" for kind in kinds),
            *protos,
        ],
        check=True,
        timeout=120,
        cwd=HERE,
    )


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
