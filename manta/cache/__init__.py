"""The chunk cache on disk."""
