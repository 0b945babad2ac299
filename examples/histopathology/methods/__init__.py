"""Methods: a YAML file each, what such a file may say, and finding them by name."""
