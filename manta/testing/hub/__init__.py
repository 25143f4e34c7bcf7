"""A faithful local Hugging Face Hub, with fault injection: what Manta's tests and benchmarks run against.

    from manta.testing.hub import Generated, HubProcess, HubSpec, RepoSpec, Text, faults

    spec = HubSpec(repos=[RepoSpec(id="org/name", files={
        "config.json": Text("{}"),
        "model.safetensors": Generated(seed="a", size=2 << 30),   # any size, any range, no memory
    })])
    with HubProcess(spec) as hub:               # or HubProcess(standard_spec())
        hub.endpoint                            # HF_ENDPOINT; hub.environment(tmp_path) for a subprocess
        hub.add_fault(faults.Stall(after_bytes=1000, seconds=5), origin="cdn", file="model*", times=1)
        hub.set_latency(0.05); hub.set_bandwidth(125e6)
        hub.wait_for(1, origin="cdn")           # no sleeping: waits until the request is there
        hub.files("org/name").files["model.safetensors"].sha256
        hub.blob_traffic("org/name", "model.safetensors").repeated   # bytes sent more than once
        hub.stats().violations                  # Authorization seen at the CDN ...
        hub.move_branch("org/name", "second"); hub.apply(changes.SetGated(repo="org/name"))
        hub.reset()                             # between tests that share one hub
    GeneratedContent("a", 2 << 30).read(start, stop)   # the true bytes of any range

In a network namespace: HubProcess(spec, prefix=["ip", "netns", "exec", "NS"], host="10.0.0.1", port=8000).
By hand: python -m manta.testing.hub --help.
"""

from manta.testing.hub import changes, faults
from manta.testing.hub.content import GeneratedContent
from manta.testing.hub.files import Bytes, Disk, FileSpec, Generated, Safetensors, Tensor, Text
from manta.testing.hub.limits import HUB_QUOTAS, QuotaLimits, Quotas
from manta.testing.hub.process import HubError, HubProcess
from manta.testing.hub.spec import CommitSpec, HubSpec, RepoSpec, Settings, UserSpec

__all__ = [
    "HUB_QUOTAS",
    "Bytes",
    "CommitSpec",
    "Disk",
    "FileSpec",
    "Generated",
    "GeneratedContent",
    "HubError",
    "HubProcess",
    "HubSpec",
    "QuotaLimits",
    "Quotas",
    "RepoSpec",
    "Safetensors",
    "Settings",
    "Tensor",
    "Text",
    "UserSpec",
    "changes",
    "faults",
]
