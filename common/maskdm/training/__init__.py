"""The training loop, its checkpoints, several processes at it."""
