"""Measurements behind the figures in the docs; each is ``python -m benchmarks.NAME``."""
