"""Random streams: the same keys the same stream, and no stream that a search over 32 bits would find."""

import hashlib

import numpy as np
import torch

from maskdm.seeding import WORDS, derive_seed, generator


def test_the_same_keys_give_the_same_stream_and_other_keys_another() -> None:
    first, again, other = (torch.randn(100, generator=generator("a", key)) for key in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert derive_seed("a", 1) == derive_seed("a", 1) != derive_seed("a", 2)
    assert 0 <= derive_seed(b"\xff" * 32) < 2**63


def test_a_stream_on_the_cpu_is_the_mersenne_twister_whose_whole_state_the_keys_give() -> None:
    """Against NumPy's, so that no part of the state is forgotten."""
    words = np.frombuffer(hashlib.shake_256(b"noise\x1f7").digest(4 * WORDS), "<u4")
    oracle = np.random.MT19937()
    oracle.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": 624}}
    expected = (oracle.random_raw(2000) & np.uint64(2**24 - 1)) / 2**24
    drawn = torch.rand(2000, generator=generator("noise", 7))
    assert np.array_equal(drawn.numpy(), expected.astype(np.float32))


def test_keys_that_manual_seed_would_take_for_one_give_different_streams() -> None:
    """It looks at the lower 32 bits alone."""
    assert torch.equal(
        torch.rand(8, generator=torch.Generator().manual_seed(5)),
        torch.rand(8, generator=torch.Generator().manual_seed(5 + 2**32)),
    )
    assert not torch.equal(torch.rand(8, generator=generator(5)), torch.rand(8, generator=generator(5 + 2**32)))


def test_normal_numbers_are_standard() -> None:
    drawn = torch.randn(200_000, generator=generator("normal"), dtype=torch.float64)
    assert abs(float(drawn.mean())) < 0.01
    assert abs(float(drawn.std()) - 1) < 0.01
