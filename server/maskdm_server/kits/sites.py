"""What `provision` tells `serve`: where the server is (`server.json`), and which sites it lets in (`sites.json`)."""

import json
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from pydantic import AwareDatetime, ValidationError, field_validator

from maskdm.config import Frozen, ModelConfig
from maskdm.errors import UsageError
from maskdm.federated.kit import SiteName
from maskdm.run.runfolder import write_json

SITES, SERVER = "sites.json", "server.json"


class Site(Frozen):
    """A key that a site was given; after a renewal a site has two until the older one expires."""

    name: SiteName
    public_key: str  # OpenSSH
    issued: AwareDatetime
    expires: AwareDatetime
    revoked: AwareDatetime | None = None

    @field_validator("public_key")
    @classmethod
    def _can_be_read(cls, value: str) -> str:
        try:
            serialization.load_ssh_public_key(value.encode())
        except UnsupportedAlgorithm as error:
            raise ValueError(f"no key that is known here: {error}") from error
        return value

    def pem(self) -> bytes:
        """The public key as Flower knows it."""
        key = serialization.load_ssh_public_key(self.public_key.encode())
        return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)

    def is_valid(self, now: datetime) -> bool:
        """Whether whoever has the key may join."""
        return self.revoked is None and now < self.expires


class Server(Frozen):
    """The server as sites reach it."""

    server: str  # HOST:PORT
    names: tuple[str, ...] = ()  # others, in its certificate
    model: ModelConfig | None = None  # what will be trained, if it was known


def check_folder(folder: Path) -> None:
    """Whether `serve --tls` can use a folder.

    Raises:
        UsageError: it lacks a file.
    """
    for name in ("ca.crt", "server.crt", "server.key", SERVER, SITES):
        if not (folder / name).is_file():
            raise UsageError(f"--tls {folder} holds no {name}: give KITS/server, made by maskdm-server provision")


def read_server(folder: Path) -> Server | None:
    """What is known of the server; None where nothing was made yet.

    Raises:
        UsageError: the file is not readable.
    """
    path = folder / SERVER
    try:
        return Server.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise UsageError(f"{path} is not readable (made by maskdm-server provision): {error}") from error


def write_server(folder: Path, server: Server) -> None:
    """Keep what is known of it."""
    write_json(folder / SERVER, server.model_dump(mode="json"))


def read_sites(path: Path) -> list[Site]:
    """All of them, in the order in which they were made.

    Raises:
        UsageError: not such a file.
    """
    try:
        return [Site.model_validate(entry) for entry in json.loads(path.read_text())["sites"]]
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise UsageError(f"{path} is no list of sites (made by maskdm-server provision): {error}") from error


def write_sites(path: Path, sites: Iterable[Site]) -> None:
    """Replace the list, whole."""
    write_json(path, {"sites": [site.model_dump(mode="json") for site in sites]})
