"""The institution's command line."""
