"""Adapters on disk: writing, reading, other libraries' files, the hub."""
