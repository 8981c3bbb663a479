"""Checkpoints come back as they were written, and nothing else is taken for one."""

import json
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from maskdm.config import ModelConfig, TrainingConfig
from maskdm.errors import CheckpointError
from maskdm.metadata import METADATA_KEY, CheckpointMetadata
from maskdm.networks.model import build_model
from maskdm.networks.trainable import expected_shapes
from maskdm.run import tensorfile
from maskdm.run.runfolder import sha256_of
from maskdm.training.checkpoint import (
    describe_checkpoint,
    load_checkpoint,
    load_state,
    load_weights,
    model_from,
    save_checkpoint,
    save_state,
)
from maskdm.training.loop import TrainingState


@pytest.fixture
def weights(tiny: ModelConfig) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in build_model(tiny, seed=1).named_parameters()}


def write(path: Path, weights: dict[str, Tensor], metadata: CheckpointMetadata, **changes: Any) -> Path:
    """A file with the changes in its metadata that `save_checkpoint` would not make."""
    document = metadata.model_dump(mode="json") | changes
    save_file(weights, path, {"maskdm": json.dumps(document)})
    return path


def test_weights_and_metadata_survive_a_round_trip(
    tmp_path: Path, weights: dict[str, Tensor], metadata: CheckpointMetadata
) -> None:
    path = tmp_path / "new" / "folder" / "model.safetensors"
    save_checkpoint(path, weights, metadata)
    found, description = load_checkpoint(path)
    assert description == metadata
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_the_safetensors_package_reads_a_checkpoint(
    tmp_path: Path, weights: dict[str, Tensor], metadata: CheckpointMetadata
) -> None:
    save_checkpoint(tmp_path / "a.safetensors", weights, metadata)
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert CheckpointMetadata.model_validate_json(file.metadata()[METADATA_KEY]) == metadata


def test_views_and_weights_that_share_memory_are_saved_as_what_they_show(
    tmp_path: Path, weights: dict[str, Tensor], metadata: CheckpointMetadata
) -> None:
    shared = torch.randn(max(tensor.numel() for tensor in weights.values()))
    views = {
        name: shared[: t.numel()].view(t.shape[::-1]).permute(*range(t.dim())[::-1]) for name, t in weights.items()
    }
    assert not all(tensor.is_contiguous() for tensor in views.values())
    save_checkpoint(tmp_path / "a.safetensors", views, metadata)
    found, _ = load_checkpoint(tmp_path / "a.safetensors")
    assert all(torch.equal(found[name], views[name]) for name in weights)


def test_a_checkpoint_that_cannot_be_saved_leaves_the_old_one(
    tmp_path: Path, weights: dict[str, Tensor], metadata: CheckpointMetadata
) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, weights, metadata)
    before = path.read_bytes()
    broken = weights | {list(weights)[-1]: torch.zeros_like(list(weights.values())[-1], device="meta")}
    with pytest.raises(NotImplementedError, match="meta"):
        save_checkpoint(path, broken, metadata)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_checkpoint_describes_itself_before_its_weights_are_read(
    tmp_path: Path, weights: dict[str, Tensor], metadata: CheckpointMetadata
) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, weights, metadata)
    assert describe_checkpoint(path) == metadata
    weights["norm.bias"][0] = float("nan")
    save_checkpoint(path, weights, metadata)
    assert describe_checkpoint(path) == metadata, "values are not looked at"


def test_a_description_is_refused_as_the_checkpoint_would_be(
    tmp_path: Path, weights: dict[str, Tensor], metadata: CheckpointMetadata
) -> None:
    (tmp_path / "folder").mkdir()
    whole = write(tmp_path / "whole", weights, metadata)
    (tmp_path / "torn").write_bytes(whole.read_bytes()[:-4])
    save_file(weights, tmp_path / "foreign", None)
    write(tmp_path / "newer", weights, metadata, schema_version=2)
    write(tmp_path / "damaged", weights, metadata, images_seen=-1)
    write(tmp_path / "missing", {n: t for n, t in weights.items() if n != "norm.weight"}, metadata)
    write(tmp_path / "additional", weights | {"a.buffer": torch.zeros(1)}, metadata)
    write(tmp_path / "bent", weights | {"head.bias": torch.zeros(5)}, metadata)
    for path in [*sorted(set(tmp_path.iterdir()) - {whole}), tmp_path / "nowhere"]:
        with pytest.raises(CheckpointError, match=f"^--prior {path}") as expected:
            load_checkpoint(path, "--prior")
        with pytest.raises(CheckpointError) as found:
            describe_checkpoint(path, "--prior")
        assert str(found.value) == str(expected.value)


def test_a_model_from_a_checkpoint_computes_what_the_saved_model_computed(
    tmp_path: Path, tiny: ModelConfig, metadata: CheckpointMetadata
) -> None:
    model = build_model(tiny, seed=1).eval()
    save_checkpoint(tmp_path / "a.safetensors", dict(model.named_parameters()), metadata)
    found, _ = load_checkpoint(tmp_path / "a.safetensors")
    again = model_from(found, tiny)
    patches, timesteps = torch.randn(2, 16, 4), torch.tensor([1, 40])
    with torch.no_grad():
        assert torch.equal(again(patches, None, timesteps), model(patches, None, timesteps))
    with torch.no_grad():
        next(again.parameters()).add_(1)
    assert all(
        torch.equal(found[name], tensor) for name, tensor in load_checkpoint(tmp_path / "a.safetensors")[0].items()
    )
    assert not again.training
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_a_prior_starts_a_network_of_another_resolution(
    tmp_path: Path, tiny: ModelConfig, weights: dict[str, Tensor], metadata: CheckpointMetadata
) -> None:
    save_checkpoint(tmp_path / "a.safetensors", weights, metadata)
    large = build_model(tiny.model_copy(update={"image_size": 16}), seed=9)
    load_weights(large, tmp_path / "a.safetensors", "--init")
    found = dict(large.named_parameters())
    assert all(torch.equal(found[name], weights[name]) for name in weights if name != "position.table")
    assert torch.equal(found["position.table"][0], weights["position.table"][0])
    assert float(found["position.table"][1:].detach().std()) > 0.005  # interpolated, not left as it was nor zero


@pytest.mark.parametrize("change", [{"dim": 32}, {"depth": 4}, {"channels": 3}, {"network": "dit"}, {"classes": 2}])
def test_a_prior_of_another_shape_starts_nothing(
    tmp_path: Path, tiny: ModelConfig, weights: dict[str, Tensor], metadata: CheckpointMetadata, change: dict[str, Any]
) -> None:
    save_checkpoint(tmp_path / "a.safetensors", weights, metadata)
    other = build_model(ModelConfig.model_validate(tiny.model_dump() | change))
    with pytest.raises(CheckpointError, match=r"--init .* is a uvit of dim 16, depth 2, .* which does not fit"):
        load_weights(other, tmp_path / "a.safetensors", "--init")


def test_half_precision_weights_are_saved_as_fp32(
    tmp_path: Path, weights: dict[str, Tensor], metadata: CheckpointMetadata
) -> None:
    save_checkpoint(tmp_path / "a.safetensors", {name: t.bfloat16() for name, t in weights.items()}, metadata)
    found, _ = load_checkpoint(tmp_path / "a.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(
    tmp_path: Path, weights: dict[str, Tensor], metadata: CheckpointMetadata, kept: float
) -> None:
    path = write(tmp_path / "a.safetensors", weights, metadata)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", ["missing.safetensors", "folder"])
def test_a_path_that_is_no_file_is_refused_under_the_name_of_its_option(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match=f"^--prior .*{name} does not exist or is no file"):
        load_checkpoint(tmp_path / name, "--prior")


@pytest.mark.parametrize("metadata_of_file", [None, {"format": "pt"}])
def test_a_foreign_safetensors_file_is_refused(
    tmp_path: Path, weights: dict[str, Tensor], metadata_of_file: dict[str, str] | None
) -> None:
    save_file(weights, tmp_path / "a.safetensors", metadata_of_file)
    with pytest.raises(CheckpointError, match="not written by MaskDM"):
        load_checkpoint(tmp_path / "a.safetensors")


def test_weights_of_another_shape_are_refused_by_name(
    tmp_path: Path, weights: dict[str, Tensor], metadata: CheckpointMetadata
) -> None:
    weights["head.bias"] = torch.zeros(5)
    with pytest.raises(CheckpointError, match=r"head\.bias is \(5,\), expected \(4,\)"):
        load_checkpoint(write(tmp_path / "a.safetensors", weights, metadata))


def test_missing_and_additional_weights_are_refused_by_name(
    tmp_path: Path, weights: dict[str, Tensor], metadata: CheckpointMetadata
) -> None:
    without = {name: tensor for name, tensor in weights.items() if name != "norm.weight"}
    with pytest.raises(CheckpointError, match=r"norm\.weight is missing"):
        load_checkpoint(write(tmp_path / "a.safetensors", without, metadata))
    with pytest.raises(CheckpointError, match=r"a\.buffer is \(1,\), expected no such weight"):
        load_checkpoint(write(tmp_path / "b.safetensors", weights | {"a.buffer": torch.zeros(1)}, metadata))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(
    tmp_path: Path, weights: dict[str, Tensor], metadata: CheckpointMetadata, poison: float
) -> None:
    weights["norm.bias"][3] = poison
    with pytest.raises(CheckpointError, match=r"norm\.bias is not finite"):
        load_checkpoint(write(tmp_path / "a.safetensors", weights, metadata))


def test_weights_of_another_type_are_refused(
    tmp_path: Path, weights: dict[str, Tensor], metadata: CheckpointMetadata
) -> None:
    half = weights | {"norm.bias": weights["norm.bias"].half()}
    with pytest.raises(CheckpointError, match="an array of unknown type"):
        load_checkpoint(write(tmp_path / "half.safetensors", half, metadata))
    weights["norm.bias"] = weights["norm.bias"].double()
    with pytest.raises(CheckpointError, match=r"norm\.bias is not finite fp32"):
        load_checkpoint(write(tmp_path / "a.safetensors", weights, metadata))


def test_a_newer_schema_says_which_version_is_read(
    tmp_path: Path, weights: dict[str, Tensor], metadata: CheckpointMetadata
) -> None:
    with pytest.raises(CheckpointError, match="has schema version 2, this MaskDM reads 1"):
        load_checkpoint(write(tmp_path / "a.safetensors", weights, metadata, schema_version=2, novelty="yes"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "blue"}, "colour: Extra inputs"),
        ({"model": {"image_size": 8, "sides": 4}}, r"model\.sides: Extra inputs"),
        ({"images_seen": -1}, "images_seen"),
        ({"prior_sha256": "abc"}, "prior_sha256"),
    ],
)
def test_metadata_that_is_not_understood_is_refused_by_its_key(
    tmp_path: Path, weights: dict[str, Tensor], metadata: CheckpointMetadata, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=f"damaged metadata: {message}"):
        load_checkpoint(write(tmp_path / "a.safetensors", weights, metadata, **changes))


@pytest.mark.parametrize("document", ["", "{", "[]", "null", '"text"'])
def test_metadata_that_is_no_object_is_refused(tmp_path: Path, weights: dict[str, Tensor], document: str) -> None:
    save_file(weights, tmp_path / "a.safetensors", {"maskdm": document})
    with pytest.raises(CheckpointError, match="damaged metadata"):
        load_checkpoint(tmp_path / "a.safetensors")


class Trap:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_is_ever_unpickled(tmp_path: Path, tiny: ModelConfig) -> None:
    sprung = tmp_path / "sprung"
    for name, zipped in (("new.safetensors", True), ("old.safetensors", False)):
        torch.save({"trap": Trap(sprung)}, tmp_path / name, _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError):
            load_checkpoint(tmp_path / name)
        with pytest.raises(CheckpointError):
            load_state(tmp_path / name, TrainingState.fresh(build_model(tiny), TrainingConfig()))
    assert not sprung.exists()


def test_a_state_holds_every_number_as_fp32_and_the_safetensors_package_reads_it(
    tmp_path: Path, tiny: ModelConfig
) -> None:
    config, model = TrainingConfig(seed=7), build_model(tiny, seed=1)
    state = TrainingState.fresh(model, config)
    model(torch.randn(2, 16, 4), None, torch.tensor([1.0, 40.0])).square().mean().backward()
    state.optimizer.step()
    state.images_seen, state.steps = 12, 3
    save_state(tmp_path / "state.safetensors", state, config)
    found = load_file(tmp_path / "state.safetensors")
    kinds = ("raw", "ema", "optimizer.step", "optimizer.exp_avg", "optimizer.exp_avg_sq")
    shapes = {f"{kind}.{name}": shape for kind in kinds for name, shape in expected_shapes(tiny).items()}
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        name: () if name.startswith("optimizer.step.") else shape for name, shape in shapes.items()
    }
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    for name, parameter in model.named_parameters():
        assert torch.equal(found[f"raw.{name}"], parameter)
        assert torch.equal(found[f"ema.{name}"], state.average[name])
        assert torch.equal(found[f"optimizer.exp_avg.{name}"], state.optimizer.state[parameter]["exp_avg"])
        assert float(found[f"optimizer.step.{name}"]) == 1
    with safe_open(tmp_path / "state.safetensors", framework="pt") as file:
        about = json.loads(file.metadata()[METADATA_KEY])
    assert about == {"schema_version": 1, "seed": 7, "images_seen": 12, "steps": 3, "skipped": 0}


def test_the_state_of_another_model_cannot_be_resumed(tmp_path: Path, tiny: ModelConfig) -> None:
    config = TrainingConfig()
    save_state(tmp_path / "state.safetensors", TrainingState.fresh(build_model(tiny), config), config)
    other = TrainingState.fresh(build_model(tiny.model_copy(update={"depth": 4})), config)
    with pytest.raises(CheckpointError, match="cannot be resumed"):
        load_state(tmp_path / "state.safetensors", other)


def test_a_torn_state_cannot_be_resumed(tmp_path: Path, tiny: ModelConfig) -> None:
    config, path = TrainingConfig(), tmp_path / "state.safetensors"
    state = TrainingState.fresh(build_model(tiny), config)
    save_state(path, state, config)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be resumed"):
        load_state(path, state)


def test_the_hash_of_a_file_is_its_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_one_that_is_replaced_while_it_is_read_is_read_as_it_was(
    tmp_path: Path, weights: dict[str, Tensor], metadata: CheckpointMetadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of a federation is after each round: never weights of two rounds."""
    path, newer = tmp_path / "model.safetensors", tmp_path / "newer.safetensors"
    save_checkpoint(path, weights, metadata)
    save_checkpoint(newer, {n: w + 1 for n, w in weights.items()}, metadata.model_copy(update={"rounds": 12345}))
    array = tensorfile._array

    def replaced_first(file: BinaryIO, place: Any) -> Any:
        if newer.exists():
            newer.replace(path)
        return array(file, place)

    monkeypatch.setattr(tensorfile, "_array", replaced_first)
    found, about = load_checkpoint(path)
    assert about == metadata
    assert all(torch.equal(found[name], weights[name]) for name in weights)
