"""Pure values: identifiers, snapshots and extent arithmetic. No I/O, no clock."""
