"""Predictions by a saved adapter beyond patches: whole slides, and ONNX."""
