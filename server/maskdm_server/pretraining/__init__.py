"""A prior from a public corpus."""
