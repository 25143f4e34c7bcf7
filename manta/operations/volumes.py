"""What the metrics say of pods' volumes, here and only here. In the trio thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from manta.cache.store import Store
from manta.model.ids import BlobId
from manta.model.snapshot import Contents
from manta.operations.mounts import Mounts
from manta.telemetry.metrics import VOLUMES_MAX, Volume


def volumes(
    mounts: Mounts,
    store: Store,
    fetched: Iterable[BlobId],
    rate: Callable[[BlobId], float],
    waiting: Mapping[BlobId, int],
) -> list[Volume]:
    """One for each pod and repo, those mounted first, at most VOLUMES_MAX. `fetched` are the blobs that are being fetched, `rate` says how
    fast one comes, `waiting` how many reads wait for one."""
    coming = {blob: rate(blob) for blob in fetched}
    cached: dict[int, int] = {}  # by the contents' identity: pods that show the same have them in common
    found: dict[tuple[str, str, str], Volume] = {}

    def cached_of(contents: Contents) -> int:
        if id(contents) not in cached:
            cached[id(contents)] = store.cached_of(contents.blobs)
        return cached[id(contents)]

    for mounted in mounts:
        pod = mounted.request.pod
        if pod is None:
            continue
        key = pod.namespace, pod.name, str(mounted.target.repo) if mounted.target is not None else ""
        if key not in found and len(found) >= VOLUMES_MAX:
            continue
        shown = mounts.shown(mounted)
        before = found.get(key, Volume(*key))
        found[key] = Volume(
            *key,
            size=before.size + sum(contents.size for contents in shown),
            cached=before.cached + sum(map(cached_of, shown)),
            rate=before.rate + sum(coming[blob] for blob in coming if any(blob in each.blobs for each in shown)),
            waiting=before.waiting
            + sum(count for blob, count in waiting.items() if any(blob in each.blobs for each in shown)),
        )
    return list(found.values())
