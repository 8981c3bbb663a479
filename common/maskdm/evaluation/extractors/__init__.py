"""Feature networks, and where they come from."""
