"""Samples through the rounds: drawn from what is published, beside the rounds, and never at their cost."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from maskdm.errors import FederationError
from maskdm.metadata import CheckpointMetadata
from maskdm.training.checkpoint import load_checkpoint, save_checkpoint
from maskdm.training.grids import Abandoned, draw_samples, save_samples
from maskdm_server.federation import round_pictures as pictures
from maskdm_server.federation.events import RoundDone, SiteAtWork
from maskdm_server.federation.round_pictures import RoundPictures

from ..conftest import config

Publish = Callable[[int], None]


@pytest.fixture
def publish(folder: Path, prior: dict[str, Tensor], small: CheckpointMetadata) -> Publish:
    """Writes model.safetensors as after a round."""

    def write(rounds: int) -> None:
        moved = {name: tensor + 0.01 * rounds for name, tensor in prior.items()}
        save_checkpoint(folder / "model.safetensors", moved, small.model_copy(update={"rounds": rounds}))

    return write


def drawn(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "samples").glob("*"))


def done(number: int) -> RoundDone:
    numbers = dict.fromkeys(("clients", "examples", "images_seen", "bytes_down", "bytes_up", "rejected"), 1)
    losses = {"loss_before": None, "loss_after": None, "seconds": 1.0}
    return RoundDone.model_validate({"round": number, "rounds": 9, **numbers, **losses})


@pytest.mark.parametrize(
    ("rounds", "every", "between"), [(1, None, 1), (8, None, 1), (10, None, 2), (100, None, 13), (10, 4, 4), (10, 0, 0)]
)
def test_about_eight_grids_unless_told_otherwise(folder: Path, rounds: int, every: int | None, between: int) -> None:
    assert config(folder, rounds=rounds, sample_every=every).rounds_between_grids() == between


def test_a_grid_is_drawn_after_every_so_many_rounds_with_the_noise_of_the_first(folder: Path, publish: Publish) -> None:
    every_second = config(folder, rounds=5, sample_every=2, seed=3)
    with RoundPictures(folder, every_second, 4) as samples:
        publish(2)
        for event in (SiteAtWork(round=2, site="1", images=1, all=1), done(1), done(2), done(2)):
            samples.hear(event)
    assert drawn(folder) == ["round-000002.png"]
    draw_samples(lambda: load_checkpoint(folder / "model.safetensors"), folder / "samples" / "same.png", 3, 4)
    with (
        Image.open(folder / "samples" / "same.png") as same,
        Image.open(folder / "samples" / "round-000002.png") as grid,
    ):
        assert np.array_equal(np.asarray(same), np.asarray(grid))


def test_a_grid_bears_the_number_of_the_round_whose_model_it_shows(folder: Path, publish: Publish) -> None:
    with RoundPictures(folder, config(folder, rounds=9, sample_every=1), 1) as samples:
        publish(4)  # rounds were faster than pictures
        samples.hear(done(3))
    assert drawn(folder) == ["round-000004.png"]


@pytest.mark.parametrize(("every", "count"), [(0, 4), (1, 0)])
def test_without_a_wish_nothing_is_drawn(folder: Path, publish: Publish, every: int, count: int) -> None:
    publish(1)
    with RoundPictures(folder, config(folder, sample_every=every), count) as samples:
        samples.hear(done(1))
    assert drawn(folder) == []


def test_the_last_round_is_left_to_the_final_model(folder: Path, publish: Publish) -> None:
    publish(3)
    with RoundPictures(folder, config(folder, rounds=3, sample_every=1), 1) as samples:
        samples.hear(done(3))
    assert drawn(folder) == []


def test_what_goes_wrong_is_said_and_the_federation_goes_on(
    folder: Path, publish: Publish, capsys: pytest.CaptureFixture[str]
) -> None:
    with RoundPictures(folder, config(folder, sample_every=1), 1) as samples:
        samples.hear(done(1))  # no model is there
    assert "WARNING: no samples of this round: --out" in capsys.readouterr().err
    publish(1)
    with RoundPictures(folder, config(folder, sample_every=1), 1) as samples:
        samples.hear(done(1))
    assert drawn(folder) == ["round-000001.png"]


def test_a_federation_that_is_stopped_does_not_wait_for_a_picture(
    folder: Path, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(1)
    asked: list[bool] = []
    original = save_samples

    def endless(*arguments: object, wanted: Callable[[], bool], **options: object) -> None:
        while wanted():
            asked.append(True)
        original(*arguments, wanted=wanted, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(pictures, "save_samples", endless)

    def federate() -> None:
        with RoundPictures(folder, config(folder, sample_every=1), 1) as samples:
            samples.hear(done(1))
            while not asked:
                pass
            raise FederationError("the server is gone")

    with pytest.raises(FederationError):
        federate()
    assert drawn(folder) == []


def test_a_picture_that_is_not_wanted_any_more_is_not_written(
    tmp_path: Path, prior: dict[str, Tensor], small: CheckpointMetadata
) -> None:
    answers = iter([True, True, False])
    with pytest.raises(Abandoned):
        save_samples(
            tmp_path / "grid.png", prior, small.model, small.diffusion, seed=0, count=1, wanted=lambda: next(answers)
        )
    assert not (tmp_path / "grid.png").exists()
