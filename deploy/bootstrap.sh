#!/usr/bin/env bash
# Installs what Manta needs on this machine: Debian packages (as root), then a virtual environment in .venv with
# the package and one group of extras. Called by the Makefile; safe to run again: what is there is left alone.
#   bash deploy/bootstrap.sh demo|dev|bench
set -euo pipefail
cd "$(dirname "$0")/.."
extra="${1:?which extras: demo, dev or bench}"

# fuse3: fusermount3. libfuse3-dev, pkg-config, gcc: pyfuse3 comes from PyPI as source. iproute2: tests and
# benchmarks put the hub in a network namespace.
packages=(fuse3 libfuse3-dev pkg-config gcc)
[ "$extra" = demo ] || packages+=(iproute2 curl)
missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if [ "${#missing[@]}" -gt 0 ]; then
  if ! command -v apt-get >/dev/null; then
    echo "Manta needs these packages, and this machine has no apt-get: ${missing[*]}. Install them with its own package manager, then run this again." >&2
    exit 1
  fi
  if [ "$(id -u)" -ne 0 ]; then
    echo "Manta needs these packages: run 'sudo apt-get install ${missing[*]}', then this again." >&2
    exit 1
  fi
  echo "installing ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

# The swarm's status page is tested in a real browser. A machine that has none in its packages goes without: those tests are skipped.
if [ "$extra" = dev ] && ! command -v chromium chromium-browser google-chrome >/dev/null; then
  if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    echo "installing chromium"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; } >/dev/null ||
      echo "chromium could not be installed: the tests of the status page will be skipped." >&2
  else
    echo "chromium is not installed (apt-get install chromium): the tests of the status page will be skipped." >&2
  fi
fi

if [ ! -x .venv/bin/python ]; then
  python="${PYTHON:-python3}"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Manta needs Python 3.11 or newer; $("$python" --version) is here. Set PYTHON=/path/to/python3.11." >&2
    exit 1
  }
  "$python" -m venv .venv || {
    echo "No virtual environment could be made: install python3-venv, then run this again." >&2
    exit 1
  }
fi
what=(--editable ".[$extra]")
[ "$extra" != dev ] || what+=(--editable csi-driver)
.venv/bin/python -m pip install --quiet --disable-pip-version-check "${what[@]}"

# The chart is rendered by a real helm in its tests; they are skipped without.
[ "$extra" != dev ] || .venv/bin/python deploy/helm.py
