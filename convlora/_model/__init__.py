"""A whole model: which layers, the injection, several adapters, merging, and the way back."""
