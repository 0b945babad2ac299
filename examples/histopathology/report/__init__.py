"""What a run or a data set is shown by: pages, tables, charts."""
