"""Checks before a site joins."""
