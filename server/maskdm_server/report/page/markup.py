"""HTML that text cannot break out of: whatever is not markup already is escaped."""

from functools import cache
from importlib.resources import files

from markupsafe import Markup as Markup  # other modules have it from here
from markupsafe import escape

# Whatever a page holds, it loads nothing and runs nothing.
SECURITY_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
LONGEST_TEXT = 300  # characters of one piece of text: strangers choose some of them


def escaped(text: str) -> Markup:
    """Text as HTML; characters that show nothing, or turn the direction of what follows, become question marks."""
    if isinstance(text, Markup):
        return text
    if len(text) > LONGEST_TEXT:
        text = text[: LONGEST_TEXT - 1] + "…"
    return escape("".join(c if c.isprintable() else "?" for c in text))


def tag(name: str, /, *children: str, **attributes: str | float | bool | None) -> Markup:
    """An element. Children that are no markup are escaped, as are all values of attributes.

    Args:
        attributes: `class_` is class, `aria_label` is aria-label; None and False leave one out, True has no value.
    """
    opened = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        shown = key.removesuffix("_").replace("_", "-")
        opened.append(shown if value is True else f'{shown}="{escape(str(value))}"')
    head = f"<{' '.join(opened)}>"
    if name in ("img", "meta", "line", "polyline", "circle", "rect", "path"):
        return Markup(head if name in ("img", "meta") else f"{head}</{name}>")
    return Markup(f"{head}{together(*children)}</{name}>")


def together(*children: str) -> Markup:
    """One piece of HTML after another."""
    return Markup("".join(escaped(child) for child in children))


def document(title: str, *body: str) -> str:
    """A whole page."""
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=SECURITY_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", title),
        tag("style", stylesheet()),
    ]
    return f"<!doctype html>\n{tag('html', tag('head', *head), tag('body', *body), lang='en')}\n"


@cache
def stylesheet() -> Markup:
    """What all pages look like."""
    return Markup(files("maskdm_server.report.page").joinpath("report.css").read_text("utf-8"))
