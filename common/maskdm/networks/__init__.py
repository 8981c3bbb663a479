"""Masked networks: U-ViT, DiT, their layers, masks, adapters, precision and cost."""
