"""docs/reference.md is what the command lines say, and the site's policy is described key by key."""

import runpy
from pathlib import Path

import pytest

from maskdm.federated.parcel import REPORT_NAMES
from maskdm.federated.policy import SitePolicy

DOCS = Path(__file__).parents[2] / "docs"


def test_the_reference_is_what_the_command_lines_say_now() -> None:
    made = runpy.run_path(str(DOCS / "make_reference.py"))["reference"]()
    if (DOCS / "reference.md").read_text() != made:
        pytest.fail("docs/reference.md is not what the command lines say any more: run `make docs` and commit it")


def test_every_key_of_the_policy_is_explained() -> None:
    page = "how-to/join-as-a-site.md"
    text = (DOCS / page).read_text()
    missing = [key for key in (name.replace("_", "-") for name in SitePolicy.model_fields) if f"`{key}" not in text]
    assert not missing, f"docs/{page} says nothing of {', '.join(missing)}"


def test_the_numbers_that_leave_are_listed_where_a_site_reads_of_them() -> None:
    text = (DOCS / "how-to" / "join-as-a-site.md").read_text()
    assert [name for name in REPORT_NAMES if f"`{name}`" not in text] == []
