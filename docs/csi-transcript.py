#!/usr/bin/env python
"""Records the transcript of docs/csi-transcript.md: `.venv/bin/python docs/csi-transcript.py`, as root. It takes away what it makes.

A pod of a kubelet that is played (manta.testing.kubelet) reads a model through the real driver and the real daemon, each in its own
container, while they and the keeper are killed under it.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from manta.testing.csinode import CsiNode
from manta.testing.hub import Generated, HubProcess, HubSpec, RepoSpec, Text
from manta.testing.kubelet import Pod, Refused, inline

SIZE = 192 * 1024 * 1024
RATE = 32 * 1024 * 1024
READER = r"""
import hashlib, os, sys, time
digest, slowest, began, at = hashlib.sha256(), 0.0, time.monotonic(), 0
fd = os.open(sys.argv[1], os.O_RDONLY)
while True:
    before = time.monotonic()
    data = os.pread(fd, 1 << 20, at)
    slowest = max(slowest, time.monotonic() - before)
    if not data:
        break
    digest.update(data)
    at += len(data)
print(f"{at} bytes in {time.monotonic() - began:.1f} s, the slowest read took {slowest:.1f} s: {digest.hexdigest()[:16]}")
"""


def main() -> None:
    model = RepoSpec(id="acme/llm", files={"config.json": Text("{}"), "model.bin": Generated("transcript", SIZE)})
    private = RepoSpec(id="acme/secret", files={"config.json": Text("{}")}, private=True)
    with HubProcess(HubSpec(repos=[model, private])) as hub:
        hub.set_bandwidth(RATE)
        with CsiNode(hub.endpoint, keeper=True) as node:
            _record(hub, node)


def _record(hub: HubProcess, node: CsiNode) -> None:
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.2f} s  {text.replace(str(node.folder), '/node')}", flush=True)

    node.wait_for_keeping()
    found = node.kubelet.registration
    say(f"kubelet   registered {found.name} at {found.endpoint}, node {found.node_id}")
    volume = inline(Pod("serve-0", "team", uid="7d0c6bb0-5d0e-4f0e-9f6e-0a4c7b0d5b11"), "model", {"model": "acme/llm"})
    before = time.monotonic()
    target = node.kubelet.set_up(volume)
    say(f"kubelet   NodePublishVolume acme/llm for team/serve-0: OK in {1000 * (time.monotonic() - before):.0f} ms")
    pod = node.pod(volume)
    say(f"pod       ls {node.models}: {' '.join(pod.run('ls', str(node.models)).split())}")
    true = hub.files("acme/llm").files["model.bin"].sha256
    say(f"hub       model.bin has {SIZE} bytes, sha256 {true[:16]}")
    command = [sys.executable, "-S", "-E", "-c", READER, str(node.models / "model.bin")]
    reader = pod.popen(command, stdout=subprocess.PIPE)
    ended = threading.Event()

    def hear() -> None:
        assert reader.stdout is not None
        for line in reader.stdout:
            say(f"pod       {line.decode().strip()}")
        ended.set()

    listening = threading.Thread(target=hear)
    listening.start()
    say("pod       reads model.bin, of which nothing is cached")
    time.sleep(1.0)
    node.daemon.kill()
    say("node      daemon killed (SIGKILL, with its container); the pod waits")
    time.sleep(1.0)
    node.start_daemon()
    node.wait_for_keeping()
    say(f"node      another daemon serves: {node.client.status().keeper}")
    node.driver.kill()
    say("node      CSI driver killed")
    node.start_driver()
    node.kubelet.restart()
    node.kubelet.republish(volume)
    say("kubelet   registered the driver again; NodePublishVolume once more: OK")
    node.keeper.kill()
    node.start_keeper()
    node.wait_for_keeping()
    say("node      keeper killed and started: it holds the descriptors again")
    node.daemon.kill()
    node.driver.kill()
    say("node      daemon and CSI driver killed together, as their pod")
    node.start_driver()
    node.start_daemon()
    node.kubelet.restart()
    say("node      both are back")
    if not ended.wait(120):
        raise SystemExit("The reader has not ended.")
    listening.join()
    usage = node.kubelet.stats(volume)["BYTES"]
    say(f"kubelet   NodeGetVolumeStats: {usage.used} of {usage.total} bytes cached")
    other = inline(Pod("serve-1", "team"), "model", {"model": "acme/secret"})
    try:
        node.kubelet.set_up(other)
    except Refused as refused:
        say(f"kubelet   NodePublishVolume acme/secret for team/serve-1: {refused.code}: {refused.details}")
    node.daemon.kill()
    node.end_pods()
    before = time.monotonic()
    node.kubelet.tear_down(volume)
    say(f"kubelet   NodeUnpublishVolume with the daemon dead: OK in {1000 * (time.monotonic() - before):.0f} ms")
    say(f"node      mounted below the kubelet's pods: {node.kubelet.mounts()}; target there: {target.exists()}")
    node.start_daemon()
    node.wait_until(lambda: not node.client.publications(), "the daemon still has publications")
    say("node      the next daemon has no publication left")


if __name__ == "__main__":
    main()
