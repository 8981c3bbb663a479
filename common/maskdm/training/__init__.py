"""The training loop, its checkpoints, several processes at it; a prior's whole training."""
