"""Markup, tables, charts and pictures of pages."""
