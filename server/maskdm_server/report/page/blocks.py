"""What pages are made of: sections, facts, tables, figures, pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

from maskdm import __version__

from .markup import Markup, document, tag, together
from .pictures import Picture
from .units import moment

MOST_SETTINGS = 300

Rows = Sequence[Sequence[str]]


def page(kind: str, name: str, lead: Sequence[str], sections: Sequence[str], footer: str) -> str:
    """A document: what it is about, what a person wants to know first, the sections, and where it came from."""
    head = tag("header", tag("p", kind, class_="kind"), tag("h1", name), *lead)
    return document(f"{name} · {kind}", head, tag("main", *sections), tag("footer", tag("p", footer)))


def section(title: str, *content: str) -> Markup:
    """A part of the page under a heading; nothing where it holds nothing."""
    place = "".join(letter if letter.isalnum() else "-" for letter in title.lower())
    inside = together(*content)
    return tag("section", tag("h2", title, id=place), inside, aria_labelledby=place) if inside else inside


def tiles(figures: Sequence[tuple[str, str, str]]) -> Markup:
    """The few numbers that matter most: (what, number, what it says)."""
    cells = [tag("div", tag("dt", what), tag("dd", number, tag("small", note))) for what, number, note in figures]
    return tag("dl", *cells, class_="tiles")


def facts(about: Mapping[str, str]) -> Markup:
    """Names with their values."""
    return tag("dl", *(tag("div", tag("dt", n), tag("dd", value)) for n, value in about.items()), class_="facts")


def note(*content: str) -> Markup:
    """A paragraph below or beside something."""
    return tag("p", *content, class_="note")


def table(caption: str, header: Sequence[str], rows: Rows, *, text: Sequence[int] = (), class_: str = "") -> Markup:
    """A table in a box of its own that scrolls; its first column heads its rows.

    Args:
        text: columns that are no numbers, besides the first.
    """
    words = {0, *text}
    heads = [tag("th", name, scope="col", class_=None if i in words else "n") for i, name in enumerate(header)]
    lines = []
    for first, *cells in rows:
        inside = [c if c.startswith("<td") else tag("td", c, class_=None if i in words else "n")
                  for i, c in enumerate(cells, start=1)]  # fmt: skip
        lines.append(tag("tr", tag("th", first, scope="row"), *inside))
    whole = tag("table", tag("caption", caption), tag("thead", tag("tr", *heads)), tag("tbody", *lines))
    return tag("div", whole, class_=f"scroll {class_}".strip(), tabindex=0, role="region", aria_label=caption)


def chart(caption: str, drawn: Markup, remark: str = "") -> Markup:
    """A chart under its caption; nothing where nothing is drawn."""
    if not drawn:
        return drawn
    return tag("figure", tag("figcaption", tag("b", caption), " ", remark), drawn, class_="chart")


def picture(caption: str, shown: Picture | None, alt: str, class_: str = "") -> Markup:
    """A picture under its caption, or a word where it cannot be read."""
    if shown is None:
        return tag("figure", tag("figcaption", caption), note("This picture cannot be read."), class_=class_ or None)
    image = tag("img", src=Markup(shown.source), alt=alt, width=shown.width, height=shown.height)
    return tag("figure", tag("figcaption", caption), image, class_=class_ or None)


def row_of(*figures: str, class_: str = "row") -> Markup:
    """Figures side by side where there is room."""
    inside = together(*figures)
    return tag("div", inside, class_=class_) if inside else inside


def code(text: str) -> Markup:
    """A hash, a name of a file, a command."""
    return tag("code", text)


def configuration(settings: Mapping[str, Any]) -> Markup:
    """Everything that config.json holds, grouped as it is there."""
    groups: dict[str, dict[str, str]] = {}
    for name, value in list(settings.items())[:MOST_SETTINGS]:
        group, _, last = name.rpartition(".")
        groups.setdefault(group.replace("stages.", "stage ").replace(".", ", "), {})[last.replace("_", "-")] = _setting(
            value
        )
    return together(
        *(part for name, about in groups.items() for part in (tag("h3", name) if name else "", facts(about)))
    )


def _setting(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(_setting(part) for part in value[:50]) or "none"
    if value is None:
        return "–"
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)


def colophon(written: float, note: str = "") -> Markup:
    """Who wrote the page, and when, and what else is to be said of it."""
    return together(f"Written by MaskDM {__version__} on {moment(written)} UTC. ", note)
