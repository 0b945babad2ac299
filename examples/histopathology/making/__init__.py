"""Making data sets: the synthetic one, and one that is cut from tissue pictures."""
