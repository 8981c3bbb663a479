"""Rounds, exchanges with sites, the journal; knows no Flower."""
