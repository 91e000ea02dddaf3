"""Files on disk, whole or not at all, and those that come from strangers."""
