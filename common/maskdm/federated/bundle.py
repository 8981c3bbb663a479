"""The Flower app bundle: what a coordinator submits to Flower, and the only one that a site lets run.

It holds one file, which names installed code. Written without compression, so that its bytes, and their sha256, are the
same everywhere.
"""

import hashlib
import zipfile
from functools import cache
from io import BytesIO
from pathlib import Path

PROJECT = "pyproject.toml"
WRITTEN = (1980, 1, 1, 0, 0, 0)


def source(name: str = "flower-app") -> Path:
    """The folder that a bundle is made of: inside an installed wheel, or in a checkout's deploy/."""
    installed = Path(__file__).parents[1] / name
    return installed if installed.exists() else Path(__file__).parents[3] / "deploy" / name


@cache
def bundle(name: str = "flower-app") -> bytes:
    """A bundle as Flower wants it: a zip with a list of its content."""
    project, packed = (source(name) / PROJECT).read_bytes(), BytesIO()
    content = f"{PROJECT},{hashlib.sha256(project).hexdigest()},{8 * len(project)}"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as file:
        for path, written in ((PROJECT, project), (".info/CONTENT", content.encode())):
            file.writestr(zipfile.ZipInfo(path, WRITTEN), written)
    return packed.getvalue()


def bundle_sha256(name: str = "flower-app") -> str:
    """What a bundle is known by."""
    return hashlib.sha256(bundle(name)).hexdigest()
