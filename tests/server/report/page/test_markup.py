"""HTML that text cannot break out of."""

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskdm_server.report.page.markup import LONGEST_TEXT, document, escaped, tag, together


class Read(HTMLParser):
    """What a browser makes of HTML: elements with their attributes, and all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


PIECES = ["<", ">", "&", '"', "'", "script", "</p>", "<!--", "&lt;", "x onerror="]
HOSTILE = st.one_of(st.text(max_size=200), st.lists(st.sampled_from(PIECES), max_size=20).map("".join))


@given(HOSTILE)
def test_text_stays_text_whatever_it_holds(text: str) -> None:
    read = Read(tag("p", text))
    assert read.elements == [("p", {})]
    assert read.text == "".join(c if c.isprintable() else "?" for c in text)


@given(HOSTILE)
def test_the_value_of_an_attribute_stays_one_value(text: str) -> None:
    read = Read(tag("p", "inside", title=text, lang="en"))
    assert read.elements == [("p", {"title": text, "lang": "en"})]
    assert read.text == "inside"


def test_markup_is_not_escaped_again() -> None:
    inner = tag("b", "1 < 2")
    assert tag("p", inner, " & more") == "<p><b>1 &lt; 2</b> &amp; more</p>"
    assert together(inner, inner) == inner + inner
    assert escaped(inner) == inner


def test_attributes_are_spelt_as_in_html() -> None:
    assert tag("td", "x", class_="n", aria_label="y", hidden=True, title=None, lang=False) == (
        '<td class="n" aria-label="y" hidden>x</td>'
    )


@pytest.mark.parametrize("character", ["\u202e", "\u2066", "\x00", "\x1b", "\n"])
def test_characters_that_mislead_are_shown_as_question_marks(character: str) -> None:
    assert escaped(f"a{character}b") == "a?b"


def test_endless_text_is_cut() -> None:
    assert len(escaped(1_000_000 * "x")) == LONGEST_TEXT


def test_a_document_names_its_language_and_may_load_and_run_nothing() -> None:
    page = document("A < B", tag("p", "x"))
    read = Read(page)
    assert page.startswith("<!doctype html>")
    assert read.elements[0] == ("html", {"lang": "en"})
    metas = [about for name, about in read.elements if name == "meta"]
    (policy,) = [about["content"] for about in metas if about.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "A &lt; B" in page
