"""Whether the updates that were let in point the same way: a site that works against the others is seen here."""

import statistics
from collections.abc import Sequence

from ..aggregation.directions import AGAINST
from ..federation.events import Compared, RoundLine
from .page.blocks import note, table
from .page.markup import Markup, tag, together
from .page.units import count

MOST_ROWS = 40


def agreement(rounds: Sequence[RoundLine]) -> Markup:
    """Each site's lengths and cosines over all rounds; of many sites, those with the lowest cosines."""
    by_site: dict[str, list[Compared]] = {}
    for line in rounds:
        for name, update in line.updates.items():
            by_site.setdefault(name, []).append(update)
    if not by_site:
        return Markup("")
    shown = list(by_site.items())
    if len(shown) > MOST_ROWS:
        shown = sorted(shown, key=lambda entry: _lowest(entry[1]))[:MOST_ROWS]
    below = f"below {AGAINST:g}".replace("-", "−")
    header = ["Site", "updates", "usual length", "longest", "usual cosine", "lowest", below]
    words = (
        "Length: of an update by the median of those known. Cosine: to the mean direction of the other updates of its "
        "round, by sketches, to within some 0.05; 1 is the same direction, 0 perpendicular, −1 the opposite one. Of "
        "two sites that disagree both are below zero."
    )
    left = len(by_site) - len(shown)
    more = f"Shown are the {len(shown)} sites with the lowest cosines; there are {left:,} more." if left else ""
    return together(
        table("Updates that were let in", header, [[name, *_cells(updates)] for name, updates in shown]),
        note(words),
        note(more) if more else "",
    )


def _cells(updates: Sequence[Compared]) -> list[str]:
    lengths = [update.norm_ratio for update in updates]
    cosines = [update.cosine for update in updates if update.cosine is not None]
    against = sum(cosine < AGAINST for cosine in cosines)
    cells = [count(len(updates)), f"{statistics.median(lengths):.2f}", f"{max(lengths):.2f}"]
    if not cosines:
        return [*cells, "–", "–", "–"]
    lowest = _signed(min(cosines))
    return [
        *cells,
        _signed(statistics.median(cosines)),
        tag("td", lowest, class_="n rejected") if against else lowest,
        count(against),
    ]


def _lowest(updates: Sequence[Compared]) -> float:
    return min((update.cosine for update in updates if update.cosine is not None), default=1.0)


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")
