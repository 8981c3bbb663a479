"""The institution's node: fine-tunes on a local slice and lets out only what the gate allows."""
