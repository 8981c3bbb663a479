"""Which arithmetic a run gets when it asks for none."""

from collections.abc import Iterator

import pytest
import torch

from maskdm.errors import UsageError
from maskdm.networks import precision
from maskdm.networks.precision import pick_device, pick_precision

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def measured_anew() -> Iterator[None]:
    for measured in (precision._bf16_pays, precision.other_route_pays):
        measured.cache_clear()
    yield
    for measured in (precision._bf16_pays, precision.other_route_pays):
        measured.cache_clear()


@pytest.mark.parametrize(("ratio", "expected"), [(0.25, "bf16"), (0.9, "fp32"), (2.0, "fp32")])
def test_auto_takes_bf16_only_where_it_is_clearly_faster(
    ratio: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios = iter([ratio])
    monkeypatch.setattr(precision, "_ratio", lambda *_: next(ratios))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert pick_precision("auto", CPU) == expected
    assert pick_precision("auto", CPU) == expected, "measured twice: a run would change its arithmetic half way"


def test_auto_is_fp32_where_the_cpu_has_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert pick_precision("auto", CPU) == "fp32"


def test_what_was_asked_for_is_taken() -> None:
    assert pick_precision("bf16", CPU) == "bf16"
    assert pick_precision("fp32", CPU) == "fp32"


def test_a_device_that_is_not_there_is_an_error_with_a_remedy() -> None:
    with pytest.raises(UsageError, match=r"--device warp is not available here: use cpu, or auto"):
        pick_device("warp")


@pytest.mark.parametrize(("ratio", "expected"), [(0.5, True), (0.9, False), (3.0, False)])
def test_the_other_fp32_route_is_taken_only_where_it_is_clearly_faster(
    ratio: float, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_ratio", lambda *_: ratio)
    monkeypatch.setattr(precision, "LARGEST_ERROR", 1.0)  # whatever this machine's route is
    assert precision.other_route_pays() is expected


def test_a_route_that_rounds_is_refused_however_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_ratio", lambda *_: 0.1)
    monkeypatch.setattr(precision, "LARGEST_ERROR", 0.0)
    assert not precision.other_route_pays()


def test_the_global_setting_is_put_back_even_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "other_route_pays", lambda: True)
    before = torch.get_float32_matmul_precision()

    def fail() -> None:
        with precision.arithmetic(CPU, "fp32"):
            assert torch.get_float32_matmul_precision() == "medium"
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert torch.get_float32_matmul_precision() == before
    with precision.arithmetic(CPU, "bf16"):
        assert torch.get_float32_matmul_precision() == before


def test_importing_the_library_and_measuring_change_nothing_global() -> None:
    before = torch.get_float32_matmul_precision()
    precision.other_route_pays()
    pick_precision("auto", CPU)
    assert torch.get_float32_matmul_precision() == before
