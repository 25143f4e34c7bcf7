#!/usr/bin/env bash
# Records docs/survival.md's transcript: a load during which Manta is killed. Needs root, a checkout with its .venv, safetensors and numpy; and
# takes away after itself what it has mounted and written.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" PYTHONPATH="$PWD" MANTA_CONFIG=/dev/null
scratch=$(mktemp -d /var/tmp/manta-survival-XXXXXX)
export MANTA_CACHE_DIR="$scratch/cache" MANTA_DAEMON_RUNTIME_DIR="$scratch/run" HF_ENDPOINT=http://127.0.0.1:8917
hub=
finish() {
    umount --lazy "$scratch/models" 2>/dev/null || true
    [ -z "$hub" ] || kill "$hub"
    sleep 2 # the daemon leaves with its last mount
    rm -rf "$scratch"
}
trap finish EXIT
cd "$scratch"
cat >load.py <<'PY'
import hashlib, sys, time
from safetensors import safe_open

began, digest, slowest, count = time.monotonic(), hashlib.sha256(), 0.0, 0
with safe_open(sys.argv[1], framework="np") as file:
    for name in file.keys():
        before = time.monotonic()
        digest.update(file.get_tensor(name).tobytes())
        slowest, count = max(slowest, time.monotonic() - before), count + 1
print(f"{count} tensors in {time.monotonic() - began:.1f} s, the slowest took {slowest:.1f} s: {digest.hexdigest()[:16]}")
PY
mkdir -p hub/acme/llm
python - <<'PY'
import numpy
from safetensors.numpy import save_file

random = numpy.random.default_rng(1)
tensors = {f"layers.{i}.weight": random.integers(0, 2**16, (4096, 4096), numpy.uint16).view(numpy.float16) for i in range(48)}
save_file(tensors, "hub/acme/llm/model.safetensors")
PY
manta hub serve --port 8917 hub >hub.log 2>&1 &
hub=$!
until curl --silent --output /dev/null http://127.0.0.1:8917; do sleep 0.1; done

daemon() { manta status --json | python -c 'import json, sys; print(json.load(sys.stdin)["pid"])'; }
run() {
    echo "\$ $*"
    eval "$@"
}
run "python load.py hub/acme/llm/model.safetensors      # the original"
run "manta mount acme/llm models"
run "python load.py models/model.safetensors &"
load=$!
run 'sleep 0.5; kill -9 $(daemon)'
run 'sleep 1.5; kill -9 $(pgrep -P $(daemon)) $(daemon)     # its workers too'
run "wait $load"
run "manta status | sed -n 1,4p"
run "manta restart"
run 'kill -9 $(ps -o ppid= $(daemon)); sleep 1; manta status | grep outlive     # the keeper'
run "python load.py models/model.safetensors &"
load=$!
run 'sleep 1; kill -9 $(daemon)     # complete files are read by the kernel: nobody notices'
run "wait $load"
run "manta umount models"
