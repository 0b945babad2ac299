"""One training: backbone, batches, recipe, checkpoints, logs, and predictions of the model in memory."""
