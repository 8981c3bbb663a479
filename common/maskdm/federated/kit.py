"""A startup kit: all that a site needs to join a federation, made by `maskdm-server provision` and signed.

A kit is a zip, or a folder of the same files. The signature covers every file but `policy.toml`, which is the site's
own to change. It shows that nothing was damaged or exchanged since the kit was made; that the authority is the right
one is for two people to compare by its fingerprint.
"""

import base64
import hashlib
import io
import lzma
import os
import stat
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal
from zipfile import BadZipFile, ZipFile

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import AwareDatetime, Field, ValidationError

from ..config import Frozen, ModelConfig
from ..errors import UsageError, plain
from ..run.runfolder import atomic_write

KIT, SIGNATURE, POLICY = "kit.json", "kit.sig", "policy.toml"
AUTHORITY, KEY, PUBLIC_KEY, README = "ca.crt", "client.key", "client.pub", "README.md"
SIGNED = (AUTHORITY, KEY, PUBLIC_KEY, README)
LARGEST_FILE, LARGEST_KIT = 1_000_000, 10_000_000  # bytes
# Whatever a file that is no zip, or a damaged one, makes of its reading; names that cannot be one are ValueErrors.
UNREADABLE = (
    *(OSError, EOFError, ValueError, RuntimeError, NotImplementedError),
    *(BadZipFile, zlib.error, lzma.LZMAError, struct.error),
)
# How far two clocks may lie apart before a kit counts as made in the future.
SKEW = timedelta(minutes=10)

SITE_NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
SiteName = Annotated[str, Field(pattern=f"^{SITE_NAME}$")]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Kit(Frozen):
    """`kit.json`."""

    format: Literal[1] = 1
    name: SiteName
    server: str  # HOST:PORT
    issued: AwareDatetime
    expires: AwareDatetime
    bundle: Digest  # of the only Flower app that may run at the site
    files: Mapping[str, Digest]  # what the signature covers
    policy: Digest  # as the coordinator proposed it
    model: ModelConfig | None = None  # what will be trained, if it was known

    def problem(self, now: datetime) -> str | None:
        """What keeps it from being used at a time."""
        if now > self.expires:
            return f"it expired on {self.expires:%Y-%m-%d}: ask the coordinator for a new one (provision renew)"
        if now < self.issued - SKEW:
            return f"it was made on {self.issued:%Y-%m-%d %H:%M} UTC, which is later than this machine's clock: set it"
        return None


@dataclass(frozen=True)
class OpenedKit:
    """A kit whose signature holds, and where its files lie now."""

    kit: Kit
    folder: Path
    policy_is_as_made: bool

    @property
    def authority(self) -> Path:
        """The certificate that the coordinator's must be signed by."""
        return self.folder / AUTHORITY

    @property
    def key(self) -> Path:
        """The private key that the site is known by."""
        return self.folder / KEY

    def fingerprint(self) -> str:
        """Of the authority: what two people compare."""
        return fingerprint(self.authority.read_bytes())


def fingerprint(certificate: bytes) -> str:
    """The sha256 of a certificate (PEM), as other programs print it."""
    digest = x509.load_pem_x509_certificate(certificate).fingerprint(hashes.SHA256()).hex().upper()
    return ":".join(digest[place : place + 2] for place in range(0, len(digest), 2))


def sign(document: bytes, key: ec.EllipticCurvePrivateKey) -> bytes:
    """The content of `kit.sig`."""
    return base64.b64encode(key.sign(document, ec.ECDSA(hashes.SHA384()))) + b"\n"


def open_kit(path: Path, folder: Path) -> OpenedKit:
    """Check a kit's signature and put its files where only this user can read them.

    Args:
        path: a zip or a folder.
        folder: for the files; made if needed.

    Raises:
        UsageError: no kit, or one that was damaged or exchanged.
    """
    files = _read(path)
    kit = _verified(path, files)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)
    for name, content in files.items():
        target = folder / name
        if not target.exists() or target.read_bytes() != content:
            atomic_write(target, content, private=True)
    return OpenedKit(kit, folder, hashlib.sha256(files[POLICY]).hexdigest() == kit.policy)


def valid_kit(path: Path, folder: Path) -> OpenedKit:
    """`open_kit`, and it can be used now.

    Raises:
        UsageError: it cannot.
    """
    opened = open_kit(path, folder)
    problem = opened.kit.problem(datetime.now(UTC))
    if problem:
        raise UsageError(f"--kit {plain(str(path))} cannot be used: {problem}")
    return opened


def _read(path: Path) -> dict[str, bytes]:
    """The files of a kit, and no others."""
    names, given = (KIT, SIGNATURE, POLICY, *SIGNED), plain(str(path))
    try:
        if path.is_dir():
            return {name: _file(given, path / name) for name in names}
        with ZipFile(io.BytesIO(_file(given, path, LARGEST_KIT))) as archive:
            return {name: _member(given, archive, name) for name in names}
    except FileNotFoundError as error:
        missing = Path(error.filename).name if path.is_dir() else "such file"
        raise UsageError(f"--kit {given} holds no {missing}: give the zip that the coordinator made for you") from error
    except KeyError as error:
        raise UsageError(f"--kit {given} is no kit: {error.args[0]}") from error
    except UNREADABLE as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"--kit {given} cannot be read ({why}): give the zip that the coordinator made") from error


def _file(kit: str, path: Path, largest: int = LARGEST_FILE) -> bytes:
    """A regular file, also through a link, as Kubernetes mounts them; a FIFO or a device could be read for ever."""
    # Without O_NONBLOCK the opening of a FIFO waits for somebody who writes.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UsageError(f"--kit {kit} is no kit: {path.name} is no regular file")
    with os.fdopen(descriptor, "rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise UsageError(f"--kit {kit} is no kit: {path.name} has more than {largest:,} bytes")
    return content


def _member(kit: str, archive: ZipFile, name: str) -> bytes:
    about = archive.getinfo(name)
    if stat.S_IFMT(about.external_attr >> 16) not in (0, stat.S_IFREG):  # 0: made where files have no such mode
        raise UsageError(f"--kit {kit} is no kit: {name} is no regular file")
    if about.file_size > LARGEST_FILE:
        raise UsageError(f"--kit {kit} is no kit: {name} has {about.file_size:,} bytes")
    return archive.read(about)


def _verified(path: Path, files: Mapping[str, bytes]) -> Kit:
    damaged = f"--kit {plain(str(path))} was damaged or changed"
    try:
        kit = Kit.model_validate_json(files[KIT])
        authority = x509.load_pem_x509_certificate(files[AUTHORITY]).public_key()
        assert isinstance(authority, ec.EllipticCurvePublicKey)
        authority.verify(base64.b64decode(files[SIGNATURE]), files[KIT], ec.ECDSA(hashes.SHA384()))
    except (ValidationError, ValueError, AssertionError, InvalidSignature, UnsupportedAlgorithm) as error:
        raise UsageError(f"{damaged} (its signature does not hold): ask the coordinator for a new one") from error
    if dict(kit.files) != {name: hashlib.sha256(files[name]).hexdigest() for name in SIGNED}:
        raise UsageError(f"{damaged} (a file is not the one that was signed): ask the coordinator for a new one")
    return kit
