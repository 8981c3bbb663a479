"""A site's answer to a plan: checks, fine-tuning, measurements."""
