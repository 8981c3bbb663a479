"""Randomness from explicit keys, so that a resumed run draws what an uninterrupted one would have drawn."""

import hashlib

import torch

Key = int | str | bytes


def derive_seed(*keys: Key) -> int:
    """A 63-bit seed from any keys: independent streams for (seed, purpose, images seen, ...)."""
    parts = (key if isinstance(key, bytes) else str(key).encode() for key in keys)
    digest = hashlib.blake2b(b"\x1f".join(parts), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*keys: Key, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device`, seeded from `keys`."""
    return torch.Generator(device).manual_seed(derive_seed(*keys))
