"""The one way out: what may leave, how often, who agreed, what came and went."""
