"""The worker: a separate process that moves bytes, so that the daemon's GIL never does. See `manta.worker.service`."""
