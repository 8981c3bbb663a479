"""Forward processes, targets and losses, samplers."""
