"""The journal on disk: whole after a crash at any moment, small, and enough to go on from."""

import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from maskdm.errors import CheckpointError
from maskdm.metadata import CheckpointMetadata
from maskdm.run import runfolder
from maskdm.run.runfolder import append_line, read_lines, sha256_of
from maskdm.training.checkpoint import load_checkpoint
from maskdm_server.federation import journal as under_test
from maskdm_server.federation.closing import finetuned
from maskdm_server.federation.intake import UpdateNorm
from maskdm_server.federation.journal import KEPT, Journal, Known, published_after
from maskdm_server.federation.selection import Standing

EMA = 0.9
NAME = "a" * 64  # of the prior
ROUNDS = 3

NewFolder = Callable[[str], Path]


def changed_in(number: int, prior: dict[str, Tensor]) -> dict[str, Tensor]:
    """New values of all weights but one."""
    randomness = torch.Generator().manual_seed(number)
    names = sorted(prior)[1:]
    return {name: torch.randn(prior[name].shape, generator=randomness) for name in names}


def moments_in(number: int) -> dict[str, Tensor]:
    return {"first.a.b": torch.full((2, 3), number / 3), "second.a": torch.full((4,), number * 1e-20)}


def known_in(number: int, best_round: int = 0) -> Known:
    return Known(
        line={"round": number, "clients": 2, "loss_before": 0.1 * number},
        standings={2**62 + 3: Standing(replies=number, failures=1, rests_until=9, declared=7), 5: Standing()},
        measured=[UpdateNorm(norm=0.1 * i, images=i) for i in range(number)],
        best_round=best_round,
        best_loss=0.1 * number,
    )


def do_round(journal: Journal, prior: dict[str, Tensor], ema: float = EMA, best_round: int = 0) -> None:
    """The next round, which follows from its number alone."""
    number = journal.number + 1
    changed, moments = changed_in(number, prior), moments_in(number)
    journal.commit(finetuned(journal.metadata, number, 10), changed, moments, known_in(number, best_round), ema)
    journal.settle()


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("ema", [0.0, EMA])
def test_all_that_a_round_left_is_there_when_the_journal_is_opened_again(
    folder: Path, prior: dict[str, Tensor], ema: float
) -> None:
    first = Journal(folder, NAME)
    assert (first.number, first.known, first.moments()) == (0, Known(), {})
    for number in (1, 2, 3):
        do_round(first, prior, ema)
        again = Journal(folder, NAME)
        assert again.number == first.number == number
        assert again.known == known_in(number)
        found, expected = again.moments(), moments_in(number)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        weights, kept = again.weights(), sorted(prior)[0]
        assert torch.equal(weights(kept), prior[kept])
        assert all(torch.equal(weights(name), value) for name, value in changed_in(number, prior).items())
        assert again.metadata.rounds == number


def test_weights_and_moments_may_be_changed_without_changing_the_journal(
    folder: Path, prior: dict[str, Tensor]
) -> None:
    journal = Journal(folder, NAME)
    do_round(journal, prior)
    digests = {name: sha256_of(folder / name) for name in files_of(folder)}
    for name in prior:
        journal.weights()(name).fill_(7)
    for moment in journal.moments().values():
        moment.fill_(7)
    assert {name: sha256_of(folder / name) for name in files_of(folder)} == digests
    assert not (journal.weights()("head.weight") == 7).any()


def test_a_new_federation_names_its_prior_and_counts_its_rounds_from_nothing(folder: Path) -> None:
    journal = Journal(folder, NAME)
    assert journal.model_path() == folder / "prior.safetensors"
    assert journal.metadata.prior_sha256 == NAME
    assert journal.metadata.rounds == 0
    assert not (folder / "model.safetensors").exists()


def test_what_goes_down_next_is_the_newest_model_and_what_is_published_is_the_same_file_without_an_average(
    folder: Path, prior: dict[str, Tensor]
) -> None:
    journal = Journal(folder, NAME)
    for _ in range(2):
        do_round(journal, prior, ema=0)
        assert sha256_of(folder / "model.safetensors") == sha256_of(journal.model_path())
    assert journal.model_path() == folder / "rounds" / "000002.safetensors"
    assert load_checkpoint(folder / "model.safetensors")[1].weights == "ema", "the kind of the prior"


@pytest.mark.parametrize("last", [9, 99_999, 999_999])  # the last has another number of digits than the file names
def test_the_newest_round_is_that_of_the_largest_number(folder: Path, prior: dict[str, Tensor], last: int) -> None:
    do_round(Journal(folder, NAME), prior)
    for path in (folder / "rounds").iterdir():
        path.rename(path.with_name(path.name.replace("000001", f"{last:06}")))
    journal = Journal(folder, NAME)
    assert journal.number == last
    journal.commit(journal.metadata, changed_in(2, prior), moments_in(2), known_in(2), EMA)
    journal.settle()
    assert Journal(folder, NAME).number == last + 1
    assert {path.name.partition(".")[0] for path in (folder / "rounds").iterdir()} == {f"{last:06}", f"{last + 1:06}"}


@pytest.mark.parametrize("ema", [0.5, 0.999])
def test_the_published_average_is_its_closed_form(folder: Path, prior: dict[str, Tensor], ema: float) -> None:
    """avg(N) = Π dₖ · prior + Σ (1 − dₖ) Π_{j>k} dⱼ · w(k), with dₖ = min(ema, 1 − (1 + k)^(−2/3))."""
    journal = Journal(folder, NAME)
    models: list[dict[str, Tensor]] = []
    for number in range(1, 6):
        do_round(journal, prior, ema)
        models.append({**prior, **changed_in(number, prior)})
        decays = [min(ema, 1 - (1 + k) ** (-2 / 3)) for k in range(1, number + 1)]
        published, metadata = load_checkpoint(folder / "model.safetensors")
        assert (metadata.weights, metadata.rounds) == ("ema", number)
        for name in prior:
            expected = np.prod(decays) * prior[name].double()
            for k, model in enumerate(models):
                expected += (1 - decays[k]) * np.prod(decays[k + 1 :]) * model[name].double()
            assert published[name].double().numpy() == pytest.approx(expected.numpy(), rel=1e-5, abs=1e-6)
        raw, metadata = load_checkpoint(journal.model_path())
        assert metadata.weights == "raw"
        assert all(torch.equal(raw[name], models[-1][name]) for name in prior)


def test_old_rounds_are_removed_but_the_last_two_every_nth_and_the_best(folder: Path, prior: dict[str, Tensor]) -> None:
    journal = Journal(folder, NAME, keep_every=4)
    best = {1: 0, 2: 1, 3: 1, 4: 1, 5: 1, 6: 5, 7: 5, 8: 5, 9: 5, 10: 5, 11: 10}
    kept = {
        5: {1, 4, 5},
        6: {4, 5, 6},
        7: {4, 5, 6, 7},
        9: {4, 5, 8, 9},
        10: {4, 5, 8, 9, 10},
        11: {4, 8, 10, 11},
    }
    for number in range(1, 12):
        do_round(journal, prior, best_round=best[number])
        if number in kept:
            names = {name for n in kept[number] for name in (f"{n:06d}.safetensors", f"{n:06d}.state.safetensors")}
            assert {path.name for path in (folder / "rounds").iterdir()} == names
    assert KEPT == 2
    journal.adopt(10)
    assert load_checkpoint(folder / "model.safetensors")[1].rounds == 10
    assert Journal(folder, NAME).number == 11


def test_the_prior_can_be_adopted_and_stays_where_it_is(folder: Path, prior: dict[str, Tensor]) -> None:
    journal = Journal(folder, NAME)
    do_round(journal, prior)
    journal.adopt(0)
    assert sha256_of(folder / "model.safetensors") == sha256_of(folder / "prior.safetensors")
    do_round(journal, prior)
    assert load_checkpoint(folder / "prior.safetensors")[1].rounds == 0


def test_where_files_cannot_have_two_names_the_model_is_copied(
    folder: Path, prior: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("no such thing here")

    monkeypatch.setattr(os, "link", refuse)
    journal = Journal(folder, NAME)
    for number in (1, 2):
        do_round(journal, prior, ema=0)
        assert load_checkpoint(folder / "model.safetensors")[1].rounds == number
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.parametrize(
    ("which", "damage"),
    [
        ("000002.safetensors", "cut"),
        ("000002.safetensors", "empty"),
        ("000002.state.safetensors", "cut"),
        ("000002.state.safetensors", "empty"),
        ("000002.state.safetensors", "gone"),
    ],
)
def test_a_damaged_round_is_named_and_the_one_before_is_gone_on_from_once_it_is_removed(
    folder: Path, prior: dict[str, Tensor], which: str, damage: str
) -> None:
    journal = Journal(folder, NAME)
    do_round(journal, prior)
    do_round(journal, prior)
    path = folder / "rounds" / which
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[: -10 if damage == "cut" else 0])
    with pytest.raises(CheckpointError, match=rf"--out.* .*{which}"):
        Journal(folder, NAME)
    for name in ("000002.safetensors", "000002.state.safetensors"):
        (folder / "rounds" / name).unlink(missing_ok=True)
    again = Journal(folder, NAME)
    assert (again.number, again.known) == (1, known_in(1))
    assert load_checkpoint(folder / "model.safetensors")[1].rounds == 1
    assert [line["round"] for line in read_lines(folder / "rounds.jsonl")] == [1]


def test_a_line_that_a_crash_left_out_is_added_and_one_of_a_round_that_was_taken_back_is_dropped(
    folder: Path, prior: dict[str, Tensor]
) -> None:
    journal = Journal(folder, NAME)
    for _ in range(3):
        do_round(journal, prior)
    path = folder / "rounds.jsonl"
    whole = path.read_text()
    assert [line["round"] for line in read_lines(path)] == [1, 2, 3]
    path.write_text("".join(whole.splitlines(keepends=True)[:2]))
    Journal(folder, NAME)
    assert path.read_text() == whole
    append_line(path, {"round": 4})
    Journal(folder, NAME)
    assert path.read_text() == whole


def test_a_line_that_a_crash_tore_is_replaced(folder: Path, prior: dict[str, Tensor]) -> None:
    journal = Journal(folder, NAME)
    for _ in range(2):
        do_round(journal, prior)
    path = folder / "rounds.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-20])
    Journal(folder, NAME)
    assert path.read_text() == whole


class Killed(BaseException):
    """What nothing catches."""


class Machine:
    """Loses power at its n-th write: that one is half done, and no later one happens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, dies_at: int) -> None:
        self._dies_at, self.writes = dies_at, 0
        for owner, name in ((Path, "replace"), (Path, "unlink"), (os, "link"), (os, "fsync")):
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any, **options: Any) -> Any:
            self.writes += 1
            if self.writes >= self._dies_at:
                if act is self_fsync and self.writes == self._dies_at:
                    os.ftruncate(given[0], os.fstat(given[0]).st_size // 2)
                raise Killed
            return act(*given, **options)

        return counted


self_fsync = os.fsync


def live(folder: Path, prior: dict[str, Tensor], ema: float) -> None:
    """What a coordinator does to the journal: it opens it and adds what is missing of the rounds."""
    journal = Journal(folder, NAME)
    while journal.number < ROUNDS:
        do_round(journal, prior, ema)


@pytest.mark.parametrize("ema", [0.0, EMA])
def test_a_crash_at_any_write_costs_at_most_the_round_in_progress(
    new_folder: NewFolder, prior: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, ema: float
) -> None:
    whole = new_folder("whole")
    live(whole, prior, ema)
    expected, _ = load_checkpoint(whole / "model.safetensors")
    seen: set[int] = set()
    for dies_at in range(1, 1000):
        folder = new_folder(f"crash-{dies_at}")
        with monkeypatch.context() as patch:
            machine = Machine(patch, dies_at)
            with suppress(Killed):
                live(folder, prior, ema)
        if machine.writes < dies_at:
            break
        done = max((int(p.stem) for p in (folder / "rounds").glob("*.safetensors") if p.stem.isdecimal()), default=0)
        seen.add(done)
        published = folder / "model.safetensors"
        if done > 1:
            assert load_checkpoint(published)[1].rounds in (done - 1, done)
        journal = Journal(folder, NAME)
        assert journal.number == done
        assert journal.known == (known_in(done) if done else Known())
        assert [line["round"] for line in read_lines(folder / "rounds.jsonl")] == list(range(1, done + 1))
        if done:
            assert load_checkpoint(published)[1].rounds == done
        live(folder, prior, ema)
        found, _ = load_checkpoint(published)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert (folder / "rounds.jsonl").read_text() == (whole / "rounds.jsonl").read_text()
    else:
        pytest.fail("it never lived to the end")
    assert dies_at > 20
    assert seen == set(range(ROUNDS + 1))


def test_a_crash_leaves_no_file_for_ever(
    new_folder: NewFolder, prior: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are as large as the model, or three times as large."""
    whole = new_folder("whole")
    live(whole, prior, EMA)
    left: dict[int, set[str]] = {}
    for dies_at in range(1, 1000):
        folder = new_folder(f"crash-{dies_at}")
        with monkeypatch.context() as patch:
            machine = Machine(patch, dies_at)
            with suppress(Killed):
                live(folder, prior, EMA)
        if machine.writes < dies_at:
            break
        live(folder, prior, EMA)
        do_round(Journal(folder, NAME), prior)  # one more, which may tidy up
        rounds = {f"rounds/{n:06d}{kind}.safetensors" for n in (3, 4) for kind in ("", ".state")}
        left[dies_at] = files_of(folder) - rounds - files_of(whole)
    assert {dies_at: names for dies_at, names in left.items() if names} == {}


def failures_of(act: Callable[[], None]) -> int:
    """How often it failed before it did not."""
    for failures in range(10):
        try:
            act()
        except OSError:
            continue
        return failures
    pytest.fail("it never worked")


def test_a_write_that_failed_may_be_tried_again(
    new_folder: NewFolder, prior: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any number of times, at any of the writes."""
    whole, folder = new_folder("whole"), new_folder("fed")
    live(whole, prior, EMA)
    journal = Journal(folder, NAME)
    write, refused = runfolder.atomic_write, Counter[str]()

    def failing(path: Path, content: Any) -> None:
        refused[path.name] += 1
        if refused[path.name] % 3:
            raise OSError("no room")
        write(path, content)

    monkeypatch.setattr(under_test, "atomic_write", failing)
    while journal.number < ROUNDS:
        number = journal.number + 1
        metadata, changed = finetuned(journal.metadata, number, 10), changed_in(number, prior)
        for act in (
            lambda: journal.commit(metadata, changed, moments_in(number), known_in(number), EMA),  # noqa: B023
            journal.settle,
        ):
            assert failures_of(act) >= 2
    monkeypatch.undo()
    assert files_of(folder) == files_of(whole)
    assert (folder / "rounds.jsonl").read_text() == (whole / "rounds.jsonl").read_text()
    first, second = (load_checkpoint(path / "model.safetensors")[0] for path in (whole, folder))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_round_that_did_not_fit_leaves_the_journal_as_it_was(
    folder: Path, prior: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, small: CheckpointMetadata
) -> None:
    journal = Journal(folder, NAME)
    do_round(journal, prior)
    before = {name: sha256_of(folder / name) for name in files_of(folder)}
    write = runfolder.atomic_write

    def no_room(path: Path, content: Any) -> None:
        if path.name == "000002.safetensors":
            raise OSError("no room")
        write(path, content)

    monkeypatch.setattr(under_test, "atomic_write", no_room)
    with pytest.raises(OSError, match="no room"):
        do_round(journal, prior)
    assert (journal.number, journal.known, journal.metadata.rounds) == (1, known_in(1), 1)
    assert {name: sha256_of(folder / name) for name in before} == before
    assert Journal(folder, NAME).number == 1


@pytest.mark.parametrize("ema", [0.0, EMA])
def test_what_was_published_after_an_earlier_round_can_be_read_again(
    folder: Path, prior: dict[str, Tensor], ema: float
) -> None:
    journal, published = Journal(folder, NAME, keep_every=1), []
    for _ in range(4):
        do_round(journal, prior, ema)
        published.append(load_checkpoint(folder / "model.safetensors")[0])
    for number, expected in enumerate(published, start=1):
        found = published_after(folder, number)
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
