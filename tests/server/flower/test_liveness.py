"""The lock of the process that runs the rounds."""

import os
from pathlib import Path

import pytest

from maskdm_server.flower.liveness import alive, is_alive


def test_a_federation_is_alive_while_the_lock_is_held(tmp_path: Path) -> None:
    assert not is_alive(tmp_path), "it never was"
    with alive(tmp_path):
        assert is_alive(tmp_path)
    assert not is_alive(tmp_path)


@pytest.mark.parametrize("kind", ["link", "FIFO"])
def test_what_lies_in_its_place_is_not_followed(tmp_path: Path, kind: str) -> None:
    folder, victim = tmp_path / "fed", tmp_path / "victim"
    folder.mkdir()
    victim.write_text("precious")
    if kind == "link":
        (folder / ".rounds.lock").symlink_to(victim)
    else:
        os.mkfifo(folder / ".rounds.lock")
    with pytest.raises(OSError, match=r"symbolic links|no regular file"), alive(folder):
        pass
    with pytest.raises(OSError, match=r"symbolic links|no regular file"):
        is_alive(folder)
    assert victim.read_text() == "precious"
