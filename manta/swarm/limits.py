"""How much of this node others may take, in connections, bytes and seconds: here and only here. Used by the peer server's parts."""

from __future__ import annotations

from dataclasses import dataclass

from manta.swarm.protocol import HOLD_SECONDS


@dataclass(frozen=True, slots=True)
class Limits:
    """The defaults are what runs; tests take shorter ones."""

    connections: int = 256
    """At a time, those included that are still shaking hands."""
    idle_s: float = 30.0
    """A connection on which no complete head of a request came for so long is closed, however it drips."""
    handshake_s: float = 10.0
    body_s: float = 10.0
    """For all of a request's body, which is 64 KiB at most."""
    answer_s: float = 10.0
    """Until a short answer is taken."""
    slow_window_s: float = 5.0
    slow_bytes_per_s: int = 64 * 1024
    """Who takes an answer slower than this over a window is cut off: a reader that stalls must not keep a slot."""
    questions: int = 512
    """To the daemon, not answered yet."""
    question_s: float = 30.0
    """A little more than the hub's deadline."""
    permit_s: float = 5.0
    """For the daemon to say whether a blob is public, which it knows."""
    hold_s: float = HOLD_SECONDS
    pulls: int = 256
    """Chunks that are being fetched on behalf of others."""
    abandoned_s: float = 5.0
    """A pull for which nobody has come for so long is given up. Who was told that it is coming asks again at once."""
    failure_s: float = 2.0
    """How long who asks for a chunk that could not be had is told so without another try: they ask within moments of each other."""
    packed: int = 4
    """Compressed chunks in memory, 8 MiB each."""
