"""Fetching: what to fetch, when and from where; and the drivers that get it done."""
