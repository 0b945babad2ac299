"""Reading patches: each layout on disk, whole slides, and the one dataset over all of them."""
