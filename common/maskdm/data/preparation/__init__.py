"""Sources into packed corpora, sites' slices, and what to know before."""
