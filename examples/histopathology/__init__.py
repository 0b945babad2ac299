"""Tumour or not, on 96×96 patches from hospitals never seen in training: ``python -m examples.histopathology``."""
