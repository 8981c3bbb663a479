"""A source that is not packed is packed once, into the user's cache."""

import fcntl
import hashlib
import os
from io import FileIO
from pathlib import Path

from ...errors import DataError
from ...run.reporting import say
from ...run.runfolder import open_lock
from ..corpus import Corpus, is_corpus
from ..pixels import PixelPolicy
from ..sources.source import PackedSource, Source
from .pack import pack


def cache_folder() -> Path:
    """Where unpacked sources are packed to: $MASKDM_CACHE, else the user's cache folder."""
    if given := os.environ.get("MASKDM_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maskdm"


def load_corpus(source: Source, policy: PixelPolicy, *, cache: Path | None = None, option: str = "--data") -> Corpus:
    """A packed corpus as it is; any other source packed into the cache, once, however many processes ask.

    A source that has changed since is packed again in the place of the old one.

    Args:
        option: what the user chose the source with.

    Raises:
        DataError: a packed corpus of another size or number of channels, or see `pack`.
    """
    try:
        return _loaded(source, policy, cache or cache_folder(), option)
    except DataError as error:
        raise DataError(str(error).replace("--data", option, 1)) from error


def _loaded(source: Source, policy: PixelPolicy, cache: Path, option: str) -> Corpus:
    if isinstance(source, PackedSource):
        packed = source.corpus.manifest.policy
        if (packed.image_size, packed.channels) != (policy.image_size, policy.channels):
            raise DataError(
                f"--data {source.path} was packed at {packed.image_size}x{packed.image_size} pixels with "
                f"{packed.channels} channels, but {policy.image_size}x{policy.image_size} with {policy.channels} are "
                f"wanted: pack the images again with prepare --image-size {policy.image_size} --channels "
                f"{policy.channels}"
            )
        return source.corpus
    key = hashlib.sha256(f"{source.path.resolve()}\0{policy.model_dump_json()}".encode()).hexdigest()[:16]
    folder = cache / f"{source.path.stem}-{policy.image_size}-{key}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = open_lock(folder / ".lock")
    except OSError as error:
        raise DataError(
            f"--data is packed into {folder.parent}, which cannot be written ({error.strerror}): set MASKDM_CACHE to "
            f"another folder"
        ) from error
    with lock:
        _wait_for(lock, folder)
        if not is_corpus(folder):
            say(f"packing {option} {source.path} once into {folder}")
        return pack(source, folder, policy, option="MASKDM_CACHE", replace=True)


def _wait_for(lock: FileIO, folder: Path) -> None:
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process packs into {folder}: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be locked ({error.strerror}): set MASKDM_CACHE to a folder on a local disk"
        ) from error
