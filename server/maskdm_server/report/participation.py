"""Sites × rounds as a table that stays readable: many rounds go into one column, of many sites the conspicuous ones."""

from collections.abc import Sequence

from maskdm.run.reporting import readable_size

from .page.blocks import note, table
from .page.markup import Markup, tag, together
from .page.units import count, figure
from .sites import Participation, SiteHistory, Sites

MOST_COLUMNS, MOST_ROWS = 40, 40

# What a cell shows, and what it says to those who hear the page.
SIGNS = {
    Participation.NONE: ("·", "not asked: away, resting or not drawn"),
    Participation.ASKED: ("…", "asked, no answer (yet)"),
    Participation.ACCEPTED: ("✓", "update accepted"),
    Participation.REJECTED: ("✕", "update rejected"),
    Participation.SILENT: ("○", "silent: not waited for any more"),
}


def participation(sites: Sites, rounds: int) -> Markup:
    """Who took part in which round, and what each site did in all.

    Args:
        rounds: the last one to show.
    """
    asked = {name: site for name, site in sites.by_name.items() if site.asked()}
    rounds = max([rounds, *(len(site.parts) - 1 for site in asked.values())])
    if not asked or not rounds:
        return Markup("")
    shown = chosen(asked)
    spans = columns(rounds)
    header = ["Site", *(str(first) if first == last else f"{first}–{last}" for first, last in spans)]
    rows = [[name, *(_cell(site, span) for span in spans)] for name, site in shown]
    left = len(asked) - len(shown)
    if left:
        rows.append([f"all {len(asked):,} sites", *(_sum(list(asked.values()), span) for span in spans)])
    more = f" Shown are the {len(shown)} that failed most often; {left:,} more are in the last line." if left else ""
    wide = (
        " A number is how often an update was accepted, of how often it was asked for."
        if spans[0][0] != spans[0][1] or left
        else ""
    )
    return together(
        tag("ul", *(tag("li", sign, " ", meaning) for sign, meaning in SIGNS.values()), class_="symbols"),
        table("Sites by round", header, rows, class_="parts"),
        note((more + wide).strip()) if more or wide else "",
        _sums(shown),
    )


def chosen(sites: dict[str, SiteHistory]) -> list[tuple[str, SiteHistory]]:
    """All sites in the order in which they came, or those that failed most often."""
    if len(sites) <= MOST_ROWS:
        return list(sites.items())

    def trouble(entry: tuple[str, SiteHistory]) -> int:
        return entry[1].times(Participation.ACCEPTED) - entry[1].asked()

    return sorted(sites.items(), key=trouble)[:MOST_ROWS]


def columns(rounds: int) -> list[tuple[int, int]]:
    """First and last round of each column; all but the last are equally many."""
    each = -(-rounds // MOST_COLUMNS)
    return [(first, min(first + each - 1, rounds)) for first in range(1, rounds + 1, each)]


def _cell(site: SiteHistory, span: tuple[int, int]) -> Markup:
    if span[0] == span[1]:
        part = site.part(span[0])
        sign, meaning = SIGNS[part]
        spoken = tag("span", meaning, class_="hidden")
        return tag("td", tag("span", sign, aria_hidden="true"), spoken, class_=part.name.lower())
    return _sum([site], span)


def _sum(sites: Sequence[SiteHistory], span: tuple[int, int]) -> Markup:
    parts = [site.part(number) for site in sites for number in range(span[0], span[1] + 1)]
    asked, accepted = sum(part != Participation.NONE for part in parts), parts.count(Participation.ACCEPTED)
    kind = "none" if not asked else "accepted" if asked == accepted else "rejected" if not accepted else "some"
    return tag("td", f"{accepted}/{asked}" if asked else SIGNS[Participation.NONE][0], class_=kind)


def _sums(shown: list[tuple[str, SiteHistory]]) -> Markup:
    header = ["Site", "asked", "accepted", "rejected", "silent", "images", "received from it", "loss before", "after"]
    rows = []
    for name, site in shown:
        times = [
            count(site.times(part)) for part in (Participation.ACCEPTED, Participation.REJECTED, Participation.SILENT)
        ]
        numbers = [count(site.images), readable_size(site.bytes_up), figure(site.loss_before), figure(site.loss_after)]
        rows.append([name, count(site.asked()), *times, *numbers])
    return table("What each site did; the losses are those of its newest accepted update", header, rows)
