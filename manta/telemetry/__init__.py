"""What the daemon tells about itself: log records, metrics and rates. The data path calls `events`; nothing here decides anything."""
