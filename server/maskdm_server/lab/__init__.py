"""Whole federations on one machine: simulations, the demo, experiments."""
