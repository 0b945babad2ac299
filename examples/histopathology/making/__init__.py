"""Making data sets: synthetic patches, and patches cut from tissue pictures."""
