"""Reading patches: each layout on disk, whole slides, and the one dataset class over all of them."""
