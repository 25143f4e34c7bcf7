"""Messages between the processes of one node."""
