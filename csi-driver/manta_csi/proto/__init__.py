"""The messages of CSI and of the kubelet's plugin registration: `*.proto`, and the stubs that `make proto` makes of them."""
