"""The CSI driver of Manta: what the kubelet asks, put to the node's Manta daemon, and bind mounts of what it answers.

asyncio and grpc.aio; docs/csi.md says how it works. It knows of Manta its control API and configuration, and nothing behind them.
"""

__version__ = "0.1.0"
