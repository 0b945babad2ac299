"""Adapters out of adapters, and out of full fine-tunings."""
