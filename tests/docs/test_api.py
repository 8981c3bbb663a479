"""docs/api.md is what the packages export now, and says something of each."""

import runpy
from pathlib import Path

import pytest

import maskdm
import maskdm_server

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_what_the_code_says_now() -> None:
    made = runpy.run_path(str(DOCS / "make_api.py"))["page"]()
    if (DOCS / "api.md").read_text() != made:
        pytest.fail("docs/api.md is not what the code says any more: run `make docs` and commit it")


@pytest.mark.parametrize("package", [maskdm, maskdm_server], ids=lambda package: package.__name__)
def test_all_that_is_exported_is_described(package: object) -> None:
    for name in package.__all__:  # type: ignore[attr-defined]
        assert getattr(package, name).__doc__
        if name != "__version__":
            assert f"### {package.__name__}.{name}\n" in (DOCS / "api.md").read_text()  # type: ignore[attr-defined]
