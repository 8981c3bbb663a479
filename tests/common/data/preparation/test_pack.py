"""Any source becomes the same packed corpus, however many processes worked on it and wherever it was interrupted."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from maskdm.data import writer
from maskdm.data.corpus import RECORD, SPLITS, Corpus, in_memory, verify
from maskdm.data.pixels import IsColour, PixelPolicy, Pixels
from maskdm.data.preparation import pack as packing
from maskdm.data.preparation.pack import guess_channels, pack
from maskdm.data.sources.source import Entry, open_source
from maskdm.errors import DataError, Interrupted
from maskdm.run.interruption import Interruption

POLICY = PixelPolicy(image_size=8, channels=1)


class Generated:
    """A source of images made as they are asked for."""

    path = Path("generated")

    def __init__(self, images: int, size: int = 8, key: bytes = b"", stop_after: int | None = None) -> None:
        self.images, self.size, self.key, self.stop_after = images, size, key, stop_after

    def image(self, number: int) -> Pixels:
        return np.random.default_rng(number).integers(0, 256, (self.size, self.size), dtype=np.uint8)

    def entries(self) -> Iterator[Entry]:
        for number in range(self.images):
            if number == self.stop_after:
                raise KeyboardInterrupt
            yield Entry(f"{number}.png", self.image(number), label=f"label {number % 3}", group=number // 2)

    def count(self) -> int:
        return self.images

    def fingerprint(self) -> bytes:
        return b"generated" + self.key + bytes([self.images % 251])


def put(path: Path, pixels: Pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def content(corpus: Corpus) -> tuple[bytes, bytes]:
    return np.array(corpus.pixels).tobytes(), np.array(corpus.index).tobytes()


def test_a_corpus_holds_pixels_hashes_labels_groups_and_sizes(tmp_path: Path) -> None:
    source = Generated(7, size=16)
    corpus = pack(source, tmp_path / "corpus", POLICY)
    assert corpus.pixels.shape == (7, 1, 8, 8)
    for row, entry in enumerate(source.entries()):
        assert corpus.index["sha256"][row].tobytes() == entry.read()[0]
        assert corpus.label(row) == entry.label
        assert corpus.index["group"][row] == entry.group
        assert (corpus.index["width"][row], corpus.index["height"][row]) == (16, 16)
    assert corpus.manifest.groups == 3
    assert corpus.manifest.splits == {"train": 7, "validation": 0, "test": 0}
    plain = np.load(tmp_path / "corpus" / "images.npy", allow_pickle=False)  # any NumPy opens it
    assert np.array_equal(plain, corpus.pixels)
    assert RECORD.itemsize <= 200


def test_the_statistics_are_those_of_the_pixels(tmp_path: Path) -> None:
    corpus = pack(Generated(20), tmp_path / "corpus", POLICY)
    statistics = corpus.manifest.statistics
    assert statistics.mean[0] == pytest.approx(float(corpus.pixels.mean()), abs=1e-3)
    assert statistics.std[0] == pytest.approx(float(corpus.pixels.std()), abs=1e-3)
    shares, _ = np.histogram(corpus.pixels, bins=32, range=(0, 256))
    assert statistics.histogram == pytest.approx(shares / shares.sum(), abs=1e-6)


def test_worker_processes_give_the_same_corpus_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = pack(open_source(faces(tmp_path)), tmp_path / "alone", POLICY, workers=1)
    monkeypatch.setattr(packing, "ALONE_SECONDS", 0.0)
    monkeypatch.setattr(packing, "CHUNK_BYTES", 64 * 8)
    together = pack(open_source(faces(tmp_path)), tmp_path / "together", POLICY, workers=2)
    assert content(alone) == content(together)
    assert alone.manifest.sha256 == together.manifest.sha256


def faces(folder: Path) -> Path:
    if not (folder / "images").exists():
        for number in range(40):
            put(folder / "images" / f"label{number % 2}" / f"{number:02}.png", Generated(1).image(number))
        (folder / "images" / "broken.png").write_bytes(b"no picture")
    return folder / "images"


def test_what_cannot_be_used_is_counted_and_listed(tmp_path: Path) -> None:
    put(tmp_path / "images" / "good.png", Generated(1).image(0))
    put(tmp_path / "images" / "small.png", np.zeros((5, 5), np.uint8))
    (tmp_path / "images" / "empty.png").write_bytes(b"")
    (tmp_path / "images" / "text.jpg").write_bytes(b"not a picture at all")
    corpus = pack(open_source(tmp_path / "images"), tmp_path / "corpus", POLICY)
    assert len(corpus) == 1
    assert corpus.manifest.skipped == {"an empty file": 1, "smaller than 8x8": 1, "not a readable picture": 1}
    listed = [json.loads(line) for line in (tmp_path / "corpus" / "skipped.jsonl").read_text().splitlines()]
    assert {line["name"]: line["reason"] for line in listed} == {
        "empty.png": "an empty file",
        "small.png": "smaller than 8x8",
        "text.jpg": "not a readable picture",
    }
    assert "1 skipped: smaller than 8x8" in corpus.summary()


def test_equal_files_are_counted(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        put(tmp_path / "images" / f"{name}.png", Generated(1).image(0))
    corpus = pack(open_source(tmp_path / "images"), tmp_path / "corpus", POLICY)
    assert (len(corpus), corpus.manifest.duplicates) == (3, 2)


def test_nothing_usable_says_why_and_what_to_do(tmp_path: Path) -> None:
    put(tmp_path / "images" / "a.png", np.zeros((5, 5), np.uint8))
    with pytest.raises(DataError, match=r"none of 1 images can be used \(1: smaller than 8x8\).*--upscale"):
        pack(open_source(tmp_path / "images"), tmp_path / "corpus", POLICY)


def test_a_mostly_colour_folder_is_refused_for_one_channel(tmp_path: Path) -> None:
    put(tmp_path / "images" / "grey.png", Generated(1).image(0))
    for i in range(3):
        colour = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        put(tmp_path / "images" / f"colour{i}.png", colour)
    source = open_source(tmp_path / "images")
    assert guess_channels(source) == 3
    with pytest.raises(IsColour, match="3 colour images, but the model has one channel"):
        pack(source, tmp_path / "corpus", POLICY)
    corpus = pack(source, tmp_path / "colour", PixelPolicy(image_size=8, channels=3))
    assert "1 grey ones repeated over 3 channels" in corpus.summary()


@pytest.mark.parametrize("after", [0, 1, 9, 17, 39])
def test_packing_that_was_interrupted_anywhere_goes_on_to_the_same_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    monkeypatch.setattr(packing, "CHUNK_BYTES", 64 * 8)  # eight images a part
    monkeypatch.setattr(writer, "COMMIT_SECONDS", 0.0)
    wanted = pack(Generated(40), tmp_path / "whole", POLICY)
    with pytest.raises(KeyboardInterrupt):
        pack(Generated(40, stop_after=after), tmp_path / "corpus", POLICY)
    assert not (tmp_path / "corpus" / "manifest.json").exists()
    seen: list[int] = []

    class Counting(Generated):
        def entries(self) -> Iterator[Entry]:
            for entry in super().entries():
                seen.append(1)
                yield entry

    found = pack(Counting(40), tmp_path / "corpus", POLICY)
    assert content(found) == content(wanted)
    assert found.manifest.sha256 == wanted.manifest.sha256
    assert found.manifest.statistics == wanted.manifest.statistics
    assert not (tmp_path / "corpus" / ".packing").exists()


def test_ctrl_c_saves_what_was_done_and_says_how_to_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "CHUNK_BYTES", 64 * 8)
    monkeypatch.setattr(Interruption, "requested", lambda self: True)
    monkeypatch.setattr(Interruption, "check", interrupted)
    with pytest.raises(Interrupted):
        pack(Generated(40), tmp_path / "corpus", POLICY)
    journal = json.loads((tmp_path / "corpus" / ".packing" / "journal.json").read_text())
    assert journal["entries"] == journal["rows"] == 8


def interrupted(_: Interruption) -> None:
    raise Interrupted("interrupted")


@pytest.mark.parametrize("damage", ["journal.json", "images.npy", "index.npy"])
def test_an_unfinished_corpus_that_was_damaged_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(packing, "CHUNK_BYTES", 64 * 8)
    monkeypatch.setattr(writer, "COMMIT_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        pack(Generated(40, stop_after=30), tmp_path / "corpus", POLICY)
    file = tmp_path / "corpus" / ".packing" / damage
    file.write_bytes(file.read_bytes()[:50])
    found = pack(Generated(40), tmp_path / "corpus", POLICY)
    assert content(found) == content(pack(Generated(40), tmp_path / "whole", POLICY))


def test_a_full_disk_is_one_line_and_nothing_half_written_is_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "CHUNK_BYTES", 64 * 8)
    monkeypatch.setattr(writer, "COMMIT_SECONDS", 0.0)
    kept: Callable[..., Any] = writer.CorpusWriter.add
    left = iter([None, None])

    def add(self: writer.CorpusWriter, part: writer.Packed) -> None:
        if next(left, 1):
            raise OSError(errno.ENOSPC, "No space left on device")
        kept(self, part)

    monkeypatch.setattr(writer.CorpusWriter, "add", add)
    with pytest.raises(DataError, match="the disk is full: free some space and run the same command again"):
        pack(Generated(40), tmp_path / "corpus", POLICY)
    with pytest.raises(DataError, match="holds no images"):
        open_source(tmp_path / "corpus")
    monkeypatch.setattr(writer.CorpusWriter, "add", kept)
    assert len(pack(Generated(40), tmp_path / "corpus", POLICY)) == 40


def test_a_corpus_inside_of_the_images_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "images" / "a.png", Generated(1).image(0))
    with pytest.raises(DataError, match="lies inside of --data"):
        pack(open_source(tmp_path / "images"), tmp_path / "images" / "deep" / "corpus", POLICY)
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["a.png"]


def test_a_source_that_lies_where_the_corpus_would_go_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    np.save(tmp_path / "work" / "images.npy", np.zeros((4, 8, 8), np.uint8))
    before = (tmp_path / "work" / "images.npy").read_bytes()
    with pytest.raises(DataError, match="lies inside of --out"):
        pack(open_source(tmp_path / "work" / "images.npy"), tmp_path / "work", POLICY)
    assert (tmp_path / "work" / "images.npy").read_bytes() == before


def test_parts_of_entries_that_carry_their_pixels_are_small_whatever_their_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packing, "CARRIED_BYTES", 3 * 256)
    entries = Generated(20, size=16).entries()
    assert [len(packing._chunk(entries, 100)) for _ in range(3)] == [4, 4, 4]


@pytest.mark.slow
def test_a_script_without_a_guard_runs_once(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "print('once', flush=True)\n"
        "from maskdm.data.preparation import pack as packing\n"
        "from maskdm.data.pixels import PixelPolicy\n"
        "from maskdm.data.sources.source import open_source\n"
        "packing.ALONE_SECONDS, packing.CHUNK_BYTES = 0.0, 64 * 8\n"
        "policy = PixelPolicy(image_size=8, channels=1)\n"
        "print(len(packing.pack(open_source(Path(sys.argv[1])), Path(sys.argv[2]), policy, workers=3)))\n"
    )
    np.save(tmp_path / "images.npy", np.stack([Generated(1).image(i) for i in range(200)]))
    command = [sys.executable, str(script), str(tmp_path / "images.npy"), str(tmp_path / "corpus")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["once", "200"]


def test_a_disk_that_is_too_small_is_noticed_before_the_work(tmp_path: Path) -> None:
    class Huge(Generated):
        def count(self) -> int:
            return 10**15

    with pytest.raises(DataError, match=r"1,000,000,000,000,000 images need .* GB and .* GB are free"):
        pack(Huge(4), tmp_path / "corpus", POLICY)


def test_the_same_call_again_opens_the_corpus_and_another_one_leaves_it_alone(tmp_path: Path) -> None:
    first = pack(Generated(6), tmp_path / "corpus", POLICY)
    assert pack(Generated(6), tmp_path / "corpus", POLICY).manifest == first.manifest
    for source, policy in (
        (Generated(6, key=b"changed"), POLICY),
        (Generated(6), PixelPolicy(image_size=4, channels=1)),
    ):
        with pytest.raises(DataError, match="packed from other data or in another way: choose another folder"):
            pack(source, tmp_path / "corpus", policy)
    assert content(Corpus.open(tmp_path / "corpus")) == content(first)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("images.npy", "images.npy changed after it was packed: pack the corpus again with prepare"),
        ("index.npy", "index.npy changed after it was packed"),
        ("manifest.json", "manifest.json"),
    ],
)
def test_a_corpus_that_changed_after_packing_is_refused_with_the_remedy(
    tmp_path: Path, name: str, message: str
) -> None:
    pack(Generated(6), tmp_path / "corpus", POLICY)
    file = tmp_path / "corpus" / name
    data = bytearray(file.read_bytes())
    place = data.index(b'"label 1"') + 7 if name == "manifest.json" else len(data) - 3
    data[place] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match=message):
        open_source(tmp_path / "corpus")


@pytest.mark.parametrize("name", ["images.npy", "index.npy", "manifest.json"])
@given(cut=st.floats(0, 0.99))
def test_a_corpus_cut_off_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, name: str, cut: float) -> None:
    folder = tmp_path_factory.mktemp("cut")
    pack(Generated(3), folder / "corpus", POLICY)
    file = folder / "corpus" / name
    file.write_bytes(file.read_bytes()[: int(cut * file.stat().st_size)])
    with pytest.raises(DataError):
        Corpus.open(folder / "corpus")


def test_a_corpus_that_was_copied_is_verified_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(Generated(6), tmp_path / "corpus", POLICY)
    for file in (tmp_path / "corpus").iterdir():
        os.utime(file)
    checked: list[Corpus] = []

    def counted(found: Corpus, option: str) -> None:
        checked.append(found)
        verify(found, option)

    monkeypatch.setattr("maskdm.data.corpus.verify", counted)
    for _ in range(3):
        Corpus.open(tmp_path / "corpus")
    assert len(checked) == 1


def test_nothing_writes_through_the_mapped_pixels(tmp_path: Path) -> None:
    corpus = pack(Generated(6), tmp_path / "corpus", POLICY)
    before = (tmp_path / "corpus" / "images.npy").read_bytes()
    corpus.pixels[:] = 0
    assert (tmp_path / "corpus" / "images.npy").read_bytes() == before


def test_a_packed_corpus_packs_again_under_the_hashes_of_the_original_files(tmp_path: Path) -> None:
    first = pack(open_source(faces(tmp_path)), tmp_path / "corpus", POLICY)
    second = pack(open_source(tmp_path / "corpus"), tmp_path / "small", PixelPolicy(image_size=4, channels=1))
    assert np.array_equal(first.index["sha256"], second.index["sha256"])
    assert [first.label(row) for row in range(len(first))] == [second.label(row) for row in range(len(second))]


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    def peak(images: int) -> int:
        tracemalloc.start()
        pack(Generated(images), tmp_path / str(images), POLICY, workers=1)
        _, found = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return found

    small, large = peak(2_000), peak(10_000)
    assert large - small < 8_000 * 200


def test_a_corpus_in_memory_is_like_a_packed_one(tmp_path: Path) -> None:
    source = Generated(5)
    packed = pack(source, tmp_path / "corpus", POLICY)
    pixels = np.stack([source.image(i) for i in range(5)])[:, None]
    corpus = in_memory(pixels, [entry.label for entry in source.entries()])
    assert np.array_equal(corpus.index["sha256"], packed.index["sha256"])
    assert corpus.manifest.statistics.mean == packed.manifest.statistics.mean
    assert [corpus.label(row) for row in range(5)] == [packed.label(row) for row in range(5)]
    assert corpus.split(0) == SPLITS[0]


@pytest.mark.slow
def test_workers_end_when_the_process_that_packs_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "from maskdm.data import writer\n"
        "from maskdm.data.preparation import pack as packing\n"
        "from maskdm.data.pixels import PixelPolicy\n"
        "from maskdm.data.sources.source import open_source\n"
        "if __name__ == '__main__':\n"
        "    packing.ALONE_SECONDS = 0.0\n"
        "    packing.CHUNK_BYTES = 64 * 8\n"
        "    kept = writer.CorpusWriter.add\n"
        "    def add(self, part):\n"
        "        kept(self, part)\n"
        "        print(self.entries, flush=True)\n"
        "        if self.entries > 100: sys.stdin.read()\n"
        "    writer.CorpusWriter.add = add\n"
        "    packing.pack(open_source(Path(sys.argv[1])), Path(sys.argv[2]), PixelPolicy(image_size=8, channels=1),"
        " workers=2)\n"
    )
    images = np.stack([Generated(1).image(i) for i in range(400)])
    np.save(tmp_path / "images.npy", images)
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "images.npy"), str(tmp_path / "corpus")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout
    assert any(int(line) > 100 for line in islice(process.stdout, 60))
    workers = children(process.pid)
    assert workers
    process.send_signal(signal.SIGKILL)
    process.communicate()
    for worker in workers:
        wait_until_gone(worker)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.02)
