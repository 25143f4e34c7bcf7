"""The filesystem, without FUSE: nodes, views, handles."""
