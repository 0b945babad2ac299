"""One training: backbone, batches, the recipe, checkpoints, logs, and predictions of the model in memory."""
