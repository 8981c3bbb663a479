"""Randomness from explicit keys, so that a resumed run draws what an uninterrupted one would have drawn."""

import hashlib

import numpy as np
import torch

Key = int | str | bytes

# Of PyTorch's generator on the CPU: 624 words, each in eight bytes, after four fields of 24 bytes.
WORDS, WORDS_AT = 624, 24


def derive_seed(*keys: Key) -> int:
    """A 63-bit seed from any keys: independent streams for (seed, purpose, images seen, ...)."""
    return int.from_bytes(hashlib.blake2b(_joined(keys), digest_size=8).digest(), "big") >> 1


def generator(*keys: Key, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device`, seeded from `keys`.

    On the CPU its whole state comes from the keys: `manual_seed` keeps 32 bits of a seed there, which whoever is to
    learn nothing of a site's noise could try one after another.
    """
    found = torch.Generator(device)
    if found.device.type != "cpu":
        return found.manual_seed(derive_seed(*keys))
    state = found.manual_seed(0).get_state().numpy()
    words = np.frombuffer(hashlib.shake_256(_joined(keys)).digest(4 * WORDS), "<u4").astype(np.uint64)
    state[WORDS_AT : WORDS_AT + 8 * WORDS] = words.view(np.uint8)
    return found.set_state(torch.from_numpy(state))


def _joined(keys: tuple[Key, ...]) -> bytes:
    return b"\x1f".join(key if isinstance(key, bytes) else str(key).encode() for key in keys)
