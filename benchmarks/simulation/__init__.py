"""The swarm in discrete time: the daemon's policy on networks that this machine does not have. See `python -m benchmarks simulate`.

    clock     what happens when: a queue of events
    links     bytes on their way: flows that share links as TCP does, roughly
    roster    the policy's table of members and rankings, kept once for all nodes instead of once for each
    weather   what a network and its trouble are like: links, latencies, crashes, partitions, refusals
    origin    the hub: one link, requests, 429
    holdings  what a node has in its cache
    order     an order on its way, what a node sees of everything else, what is counted
    members   what a node knows of the others
    node      one node: reader, scheduler, gate, choice, put together as the daemon does
    uploads   what it gives to others: slots and recipients, as its peer process has them
    cluster   many of them, from the start to the last one's end; what is counted
    study     what the benchmark runs, and its tables

Nothing here waits, listens or touches a disk. All that is random comes from the seed. docs/swarm-simulation.md says what is modelled.
"""
