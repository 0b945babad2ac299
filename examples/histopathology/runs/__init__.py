"""Runs of one method and of many: configuration, proofs, scores, comparison."""
