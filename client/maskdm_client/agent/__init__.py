"""Keeps a site connected and at work."""
