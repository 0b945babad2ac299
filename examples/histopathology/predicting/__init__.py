"""Predicting whole slides, and exporting to ONNX and predicting from it."""
