"""Random checkpoints of known models: true sizes without the true weights."""
