"""Manta's benchmarks: `python -m benchmarks NAME [options] --json FILE`, and `python -m benchmarks list`.

Every figure that a goal is about is a ratio to something measured in the same run, a count, or bytes: the machine may be any.

    __main__    the command: arguments, signals, exit codes, where results go
    cold, ttfb, parallel, load, faults, metadata, loopback, warm, survive   the benchmarks, one module each
    cluster, churn, peerpath    those of many nodes
    simulate    the swarm in discrete time, for as many nodes as there may be; simulation/ is what it runs on
    report      what a benchmark returns: runs, table, goals, chart; the JSON contract
    rig         what a benchmark runs on: the hub behind its link, mounts, curl, readers
    fleet       what the benchmarks of many nodes share: a model of a few shards, links, nodes that read at once
    sampler     CPU time and memory of groups of processes
    readers     the programs that read through the mount; run without site-packages
    loaders     the programs that load with safetensors and huggingface_hub
    witnesses   the programs that read while Manta is being killed, and compare every byte
    rclone      rclone mount of one file, for comparison
    origin      the hub asked by a plain HTTP client, for comparison
    machine     what this machine is, which commit this is, programs to install
    chart       plots, where matplotlib is installed
"""
