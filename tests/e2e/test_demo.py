"""The demonstration, with a budget that a test can afford."""

from pathlib import Path

import pytest
from PIL import Image

from maskdm.training.checkpoint import load_checkpoint
from maskdm_server.lab.demo import Budget, demo

SMALL = Budget(public=80, private=400, pretrain_images=512, rounds=1, local_images=256, samples=4)


@pytest.mark.slow
def test_the_demonstration_leaves_a_page_with_pictures_and_a_federated_model(tmp_path: Path) -> None:
    page = demo(tmp_path, budget=SMALL)
    html = page.read_text()
    assert html.count("<img") == 6
    assert "three institutions" in html
    assert "http://" not in html
    assert "https://" not in html
    prior, _ = load_checkpoint(tmp_path / "run" / "prior.safetensors")
    model, metadata = load_checkpoint(tmp_path / "federation" / "model.safetensors")
    assert metadata.rounds == 1
    assert any(not prior[name].equal(model[name]) for name in prior)
    samples = tmp_path / "federation" / "samples"
    with Image.open(samples / "before.png") as before, Image.open(samples / "after.png") as after:
        assert before.size == after.size
    assert demo(tmp_path, budget=SMALL) == page  # finished steps are not done again
    assert load_checkpoint(tmp_path / "federation" / "model.safetensors")[1].rounds == 1
