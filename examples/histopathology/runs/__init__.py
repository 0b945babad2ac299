"""Runs of one or many methods: configuration, checks, scores, comparison."""
