"""The training loop, its checkpoints, several processes at it, and a prior from first step to last."""
