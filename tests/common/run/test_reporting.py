"""What a person sees while long work runs, where there is no terminal."""

import pytest

from maskdm.run.reporting import WorkBar


def test_lines_show_how_much_is_done_and_left(capsys: pytest.CaptureFixture[str]) -> None:
    with WorkBar("work", 2000) as bar:
        bar.update(1000)
        bar.update(2000, "loss 1")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1  # at most one every few seconds, and the last
    assert lines[0].startswith("work: 2,000/2,000 loss 1 (0 s left)")


def test_work_of_unknown_length_shows_what_is_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with WorkBar("work", None) as bar:
        bar.update(1000)
        assert capsys.readouterr().err == ""
        monkeypatch.setattr("maskdm.run.reporting.PLAIN_LINE_EVERY", 0.0)
        bar.update(3000)
    assert capsys.readouterr().err == "work: 3,000\n"
