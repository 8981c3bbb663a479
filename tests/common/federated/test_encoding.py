"""Updates on their way up: exact sizes, bounded errors, and nothing malformed gets through."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from numpy.typing import NDArray
from torch import Tensor

from maskdm.config import Encoding, ModelConfig
from maskdm.federated.encoding import BLOCK, check, decode, decode_bfloat16, encode, encode_bfloat16, layout, size
from maskdm.networks.model import network
from maskdm.run.tensorfile import Stored, pack

ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)
SHAPES: dict[str, tuple[int, ...]] = {"a": (3, 100), "b": (), "c": (0, 4), "d": (BLOCK,)}
SHARE = 0.1

each_encoding = pytest.mark.parametrize("encoding", ENCODINGS)
encodings = st.sampled_from(ENCODINGS)
shares = st.floats(0, 1, exclude_min=True)
any_shapes = st.dictionaries(
    st.sampled_from("abc"), st.lists(st.integers(0, 20), max_size=3).map(tuple), max_size=3
)  # up to 8000 values: 0-d, empty, less than a block and many
vectors = arrays_of.arrays(np.float32, st.integers(1, 3 * BLOCK), elements=st.floats(-(2.0**100), 2.0**100, width=32))
normal = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False).filter(lambda x: x == 0 or abs(x) > 1e-30)


def random_update(shapes: Mapping[str, tuple[int, ...]], magnitude: float = 1e-5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * magnitude for name, shape in shapes.items()}


def there_and_back(tensor: Tensor, encoding: Encoding, share: float = SHARE) -> Tensor:
    shape = tuple(tensor.shape)
    arrays = encode({"a": tensor}, encoding, share)
    check(arrays, {"a": shape}, encoding, share)
    return decode(arrays, "a", shape, encoding)


@given(any_shapes, encodings, shares)
@example(SHAPES, "int8", SHARE)  # a weight of whole blocks
def test_what_is_sent_is_what_the_layout_says(
    shapes: dict[str, tuple[int, ...]], encoding: Encoding, share: float
) -> None:
    update = random_update(shapes)
    before = {name: tensor.clone() for name, tensor in update.items()}
    arrays = encode(update, encoding, share)
    assert {name: (str(a.dtype), a.shape) for name, a in arrays.items()} == layout(shapes, encoding, share)
    assert sum(array.nbytes for array in arrays.values()) == size(shapes, encoding, share)
    check(arrays, shapes, encoding, share)
    for name, shape in shapes.items():
        found = decode(arrays, name, shape, encoding)
        assert (found.dtype, tuple(found.shape)) == (torch.float32, shape)
        assert torch.equal(update[name], before[name]), "encoding changed the update"


def test_the_layout_is_known_without_any_value() -> None:
    shapes = {"a": (3, 100), "b": (0,)}
    assert layout(shapes, "bf16", 1) == {"a": ("uint16", (3, 100)), "b": ("uint16", (0,))}
    assert layout(shapes, "fp32", 1) == {"a": ("float32", (3, 100)), "b": ("float32", (0,))}
    assert layout(shapes, "int8", 1) == {
        "a": ("int8", (300,)),
        "a.scale": ("uint16", (2,)),
        "b": ("int8", (0,)),
        "b.scale": ("uint16", (0,)),
    }
    assert layout(shapes, "topk", 0.011) == {
        "a": ("uint16", (4,)),
        "a.index": ("uint32", (4,)),
        "b": ("uint16", (0,)),
        "b.index": ("uint32", (0,)),
    }


def test_int8_takes_a_quarter_of_fp32_for_a_model_of_size_s() -> None:
    with torch.device("meta"):
        model = network(ModelConfig.preset("S", image_size=64, channels=3))
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    assert sum(map(math.prod, shapes.values())) > 44e6
    fp32 = size(shapes, "fp32", 1)
    assert size(shapes, "int8", 1) <= 0.26 * fp32
    assert size(shapes, "bf16", 1) == 0.5 * fp32
    assert size(shapes, "topk", 0.01) <= 0.0151 * fp32


@pytest.mark.parametrize("share", [0, -0.1, 1.1, math.nan])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share that topk keeps must be in"):
        layout(SHAPES, "topk", share)
    assert layout(SHAPES, "bf16", share), "others have no share"


@pytest.mark.parametrize(("encoding", "second"), [("int8", "a.scale"), ("topk", "a.index")])
def test_weights_whose_arrays_would_share_a_name_are_refused(encoding: Encoding, second: str) -> None:
    with pytest.raises(ValueError, match=f"two arrays of the update would be named '{second}'"):
        encode(random_update({"a": (2,), second: (2,)}), encoding, SHARE)


@given(arrays_of.arrays(np.float32, arrays_of.array_shapes(min_dims=0, max_dims=3, max_side=4), elements=normal))
def test_bf16_loses_at_most_one_part_in_256(values: NDArray[np.float32]) -> None:
    bits = encode_bfloat16(torch.from_numpy(values))
    assert (str(bits.dtype), bits.shape) == ("uint16", values.shape)
    found = decode_bfloat16(bits).numpy()
    assert found.dtype == np.float32
    assert (np.abs(found - values) <= np.abs(values) * 2.0**-8).all()


@given(arrays_of.arrays(np.uint16, 8))
def test_what_bfloat16_can_hold_survives_exactly(bits: NDArray[np.uint16]) -> None:
    values = decode_bfloat16(bits)
    again = decode_bfloat16(encode_bfloat16(values))
    assert torch.equal(again[~values.isnan()], values[~values.isnan()])
    assert torch.equal(again.isnan(), values.isnan())


@given(vectors)
def test_fp32_loses_nothing(values: NDArray[np.float32]) -> None:
    assert np.array_equal(there_and_back(torch.from_numpy(values), "fp32").numpy(), values)


@given(vectors)
@example(np.full(3, 1e-45, np.float32))  # the scale underflows
def test_int8_errs_by_at_most_half_a_step_and_never_clips(values: NDArray[np.float32]) -> None:
    arrays = encode({"a": torch.from_numpy(values)}, "int8", 1)
    scale = decode_bfloat16(arrays["a.scale"]).double().numpy()  # type: ignore[arg-type]
    steps = np.repeat(scale, BLOCK)[: len(values)]
    assert (127 * steps >= np.abs(values)).all()
    found = decode(arrays, "a", values.shape, "int8").double().numpy()
    assert (np.abs(found - values) <= steps * (0.5 + 1e-5)).all()


def test_the_scale_of_int8_is_not_larger_than_it_must_be() -> None:
    values = torch.tensor([127.0, 127.001]).repeat_interleave(BLOCK)
    scale = encode({"a": values}, "int8", 1)["a.scale"]
    assert decode_bfloat16(scale).tolist() == [1, 1 + 2**-7]  # type: ignore[arg-type]


@pytest.mark.parametrize("magnitude", [1e-9, 1e-6, 1.0])
def test_int8_loses_less_than_one_percent_of_a_normal_update(magnitude: float) -> None:
    update = random_update({"a": (300, 301)}, magnitude)["a"]
    found = there_and_back(update, "int8")
    assert (found - update).norm() < 0.01 * update.norm()


@each_encoding
def test_the_smallest_values_survive(encoding: Encoding) -> None:
    values = torch.tensor([1e-9, -1e-9, 0.0])
    assert torch.allclose(there_and_back(values, encoding, 1), values, rtol=0.01, atol=0)


def test_a_block_of_zeros_stays_zero_beside_large_values() -> None:
    values = torch.cat([torch.zeros(BLOCK), torch.full((BLOCK,), 1e9), torch.zeros(5)])
    arrays = encode({"a": values}, "int8", 1)
    assert [bool(bits) for bits in arrays["a.scale"]] == [False, True, False]
    found = decode(arrays, "a", (517,), "int8")
    assert torch.equal(found == 0, values == 0)


@given(vectors, shares)
def test_topk_keeps_exactly_the_largest(values: NDArray[np.float32], share: float) -> None:
    tensor = torch.from_numpy(values)
    arrays = encode({"a": tensor}, "topk", share)
    index = arrays["a.index"].astype(np.int64)
    assert len(index) == max(1, math.ceil(share * len(values)))
    magnitudes = np.abs(values)
    assert np.array_equal(np.sort(magnitudes[index]), np.sort(magnitudes)[-len(index) :])
    expected = torch.zeros(len(values))
    expected[index] = decode_bfloat16(encode_bfloat16(tensor[index]))
    check(arrays, {"a": values.shape}, "topk", share)
    assert torch.equal(decode(arrays, "a", values.shape, "topk"), expected)


@given(encodings, st.integers(0, 2 * BLOCK + 9), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_a_value_that_is_not_finite_stays_visible(encoding: Encoding, place: int, poison: float) -> None:
    values = random_update({"a": (2 * BLOCK + 10,)})["a"]
    values[place] = poison
    assert not there_and_back(values, encoding).isfinite().all()


def test_even_the_nan_with_the_most_bits_is_not_lost() -> None:
    nan = torch.from_numpy(np.array([0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32))
    for encoding in ENCODINGS:
        assert there_and_back(nan, encoding).isnan().any(), encoding


@each_encoding
def test_a_view_is_encoded_in_its_own_order(encoding: Encoding) -> None:
    view = random_update({"a": (20, 30)})["a"].T.requires_grad_()
    assert torch.equal(there_and_back(view, encoding), there_and_back(view.detach().contiguous(), encoding))
    assert torch.equal(there_and_back(view.double(), encoding), there_and_back(view, encoding))


@each_encoding
def test_what_is_decoded_can_be_written_to_though_the_buffer_cannot(encoding: Encoding) -> None:
    arrays = encode(random_update(SHAPES), encoding, SHARE)
    for array in arrays.values():
        array.flags.writeable = False
    before = {name: array.copy() for name, array in arrays.items()}
    for name, shape in SHAPES.items():
        decode(arrays, name, shape, encoding).add_(1)
    assert all(np.array_equal(arrays[name], before[name]) for name in arrays)


def positions(*values: int) -> NDArray[np.uint32]:
    """Those of `b`, one of them, and of `d`, 26, begin as they should."""
    return np.array(values, np.uint32)


@pytest.mark.parametrize(
    ("encoding", "changes", "message"),
    [
        ("bf16", {"a": None}, "'a' is missing"),
        ("int8", {"d.scale": None}, "'d.scale' is missing"),
        ("topk", {"c.index": None}, "'c.index' is missing"),
        ("bf16", {"x": np.zeros(1, np.uint16)}, "not asked for"),
        ("bf16", {"a.scale": np.zeros(2, np.uint16)}, "not asked for"),
        ("fp32", {"x\n" * 1000: np.zeros(1)}, "not asked for"),
        ("bf16", {"b": np.zeros((), ">u2")}, "'b' must be uint16, not >u2"),
        ("bf16", {"b": np.zeros((), np.int16)}, "'b' must be uint16, not int16"),
        ("bf16", {"b": np.zeros((), np.float32)}, "'b' must be uint16, not float32"),
        ("bf16", {"b": np.array(None)}, "'b' must be uint16, not object"),
        ("bf16", {"b": np.zeros((), "V2")}, r"'b' must be uint16, not \|V2"),
        ("fp32", {"b": np.zeros((), ">f4")}, "'b' must be float32, not >f4"),
        ("fp32", {"b": np.zeros((), np.float64)}, "'b' must be float32, not float64"),
        ("int8", {"b": np.zeros(1, np.uint8)}, "'b' must be int8, not uint8"),
        ("int8", {"b.scale": np.zeros(1, np.float16)}, "'b.scale' must be uint16, not float16"),
        ("topk", {"b.index": np.zeros(1, np.int64)}, "'b.index' must be uint32, not int64"),
        ("topk", {"b.index": np.zeros(1, ">u4")}, "'b.index' must be uint32, not >u4"),
        ("bf16", {"a": np.zeros((100, 3), np.uint16)}, r"'a' must have shape \(3, 100\), not \(100, 3\)"),
        ("bf16", {"b": np.zeros(1, np.uint16)}, r"'b' must have shape \(\), not \(1,\)"),
        ("bf16", {"c": np.zeros((0, 5), np.uint16)}, r"'c' must have shape \(0, 4\), not \(0, 5\)"),
        ("int8", {"a": np.zeros((3, 100), np.int8)}, r"'a' must have shape \(300,\), not \(3, 100\)"),
        ("int8", {"a.scale": np.zeros(1, np.uint16)}, r"'a.scale' must have shape \(2,\), not \(1,\)"),
        ("topk", {"d": np.zeros(27, np.uint16)}, r"'d' must have shape \(26,\), not \(27,\)"),
        ("topk", {"c.index": positions(0)}, r"'c.index' must have shape \(0,\), not \(1,\)"),
    ],
)
def test_what_is_malformed_is_refused_by_name(encoding: Encoding, changes: dict[str, object], message: str) -> None:
    good: dict[str, Any] = dict(encode(random_update(SHAPES), encoding, SHARE))
    check(good, SHAPES, encoding, SHARE)
    bad = {name: array for name, array in (good | changes).items() if array is not None}
    with pytest.raises(ValueError, match=message):
        check(bad, SHAPES, encoding, SHARE)


@pytest.mark.parametrize(
    ("name", "index", "message"),
    [
        ("d", positions(*range(24), 25, 24), "'d.index' must be strictly increasing"),
        ("d", positions(*range(25), 24), "'d.index' must be strictly increasing"),
        ("d", positions(2**32 - 1, *range(25)), "'d.index' must be strictly increasing"),
        ("d", positions(*range(25), 256), "'d.index' leads out of a weight of 256 values"),
        ("b", positions(1), "'b.index' leads out of a weight of 1 values"),
        ("b", positions(2**32 - 1), "'b.index' leads out of a weight of 1 values"),
    ],
)
def test_indices_that_lead_nowhere_are_refused_as_they_are_decoded(
    name: str, index: NDArray[np.uint32], message: str
) -> None:
    arrays = {**encode(random_update(SHAPES), "topk", SHARE), f"{name}.index": index}
    check(arrays, SHAPES, "topk", SHARE)
    with pytest.raises(ValueError, match=message):
        decode(arrays, name, SHAPES[name], "topk")


@each_encoding
def test_types_and_shapes_are_checked_without_reading_an_array(encoding: Encoding, tmp_path: Path) -> None:
    (tmp_path / "update").write_bytes(pack(encode(random_update(SHAPES), encoding, SHARE)))
    stored = Stored(tmp_path / "update")
    (tmp_path / "update").unlink()  # whoever reads it now fails
    check(stored, SHAPES, encoding, SHARE)


some_arrays = arrays_of.arrays(
    st.sampled_from(["uint16", "int8", "uint32", "float32", ">u2", "<u4", "bool", "object"]).map(np.dtype),
    st.sampled_from([(), (0,), (1,), (2,), (3, 2), (6,)]),
)


@each_encoding
@given(data=st.data())
def test_what_passes_the_check_can_be_decoded(encoding: Encoding, data: st.DataObject) -> None:
    shapes: dict[str, tuple[int, ...]] = {"a": (3, 2), "b": (), "c": (0,)}
    kinds = layout(shapes, encoding, 0.3)
    arrays: dict[str, NDArray[Any]] = {name: data.draw(arrays_of.arrays(*kind), name) for name, kind in kinds.items()}
    if encoding == "topk":  # or none would pass
        for name, shape in shapes.items():
            order = data.draw(st.permutations(range(math.prod(shape))))
            arrays[f"{name}.index"] = np.array(sorted(order[: len(arrays[name])]), np.uint32)
    if data.draw(st.booleans(), "one is something else"):
        name = data.draw(st.sampled_from([*kinds, "foreign"]))
        alike = [arrays_of.arrays(*kinds[name])] if name in kinds else []
        arrays[name] = data.draw(st.one_of(some_arrays, *alike))
    try:
        check(arrays, shapes, encoding, 0.3)
    except ValueError:
        return
    for name, shape in shapes.items():
        try:
            found = decode(arrays, name, shape, encoding)
        except ValueError:
            assert encoding == "topk", "only indices are still to be looked at"
            continue
        assert (found.dtype, tuple(found.shape)) == (torch.float32, shape)


@pytest.mark.parametrize("encoding", ["int8", "topk"])
def test_with_what_was_lost_added_to_the_next_update_the_mean_arrives(encoding: Encoding) -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(1000, generator=generator) * 1e-5
    residual, wanted, arrived = torch.zeros(1000), torch.zeros(1000), torch.zeros(1000)
    errors = {}
    for number in range(1, 401):
        update = mean + torch.randn(1000, generator=generator) * 1e-5
        found = there_and_back(update + residual, encoding)
        residual = update + residual - found
        wanted, arrived = wanted + update, arrived + found
        errors[number] = float((arrived - wanted).norm() / wanted.norm())
    assert errors[400] < 0.02
    assert errors[400] < errors[40] / 5
