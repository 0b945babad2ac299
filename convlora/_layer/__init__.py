"""One layer: its factors, what it computes with them, and how it comes to compute it."""
