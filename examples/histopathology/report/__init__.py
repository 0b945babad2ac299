"""Reports on runs and data sets: pages, tables, charts."""
