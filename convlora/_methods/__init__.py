"""How a weight may change: one method in each file."""
