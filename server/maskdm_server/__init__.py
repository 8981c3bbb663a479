"""The coordinator: pre-trains the prior, serves the federation, samples."""
