"""The swarm: nodes that give each other chunks, so that the origin is read once for all of them. docs/swarm.md says how.

Pure, used by daemon, workers and the peer process alike: `ownership` (who fetches what from the origin), `choice` (where a chunk comes
from), `slots` (whom to serve now), `protocol` (what is said between nodes), `auth` (who may say it), `compression`. The peer process
(asyncio): `service`, composed of `server` and `members`. The server's parts: `door` (connections), `chunks`, `shelf` (the cache's files),
`uploads`, `pulls`, `permits`, `questions` (to the daemon), `page`, `limits`. The members': `discovery`, `client`.
"""
