"""Methods: one YAML file each, the keys of such a file, and finding methods by name."""
