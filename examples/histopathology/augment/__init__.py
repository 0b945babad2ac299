"""Augmentation and evaluation transforms, by the batch."""
