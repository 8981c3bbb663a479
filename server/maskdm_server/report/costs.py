"""What rounds brought and what they cost: charts, and the table behind them."""

from collections.abc import Sequence

from maskdm.run.reporting import readable_size

from ..federation.events import RoundLine
from .page.blocks import chart, row_of, table
from .page.charts import Series, line_chart
from .page.markup import Markup
from .page.units import count, duration, figure

MOST_LINES = 60  # of the table


def costs(rounds: Sequence[RoundLine]) -> Markup:
    """Charts by round: loss, what became of the updates, bytes, time."""

    def points(name: str, scale: float = 1.0) -> list[tuple[float, float]]:
        found = [(line.round, getattr(line, name)) for line in rounds]
        return [(float(number), value / scale) for number, value in found if value is not None]

    losses = [Series("model that came", points("loss_before")), Series("after local work", points("loss_after"))]
    top = max([max(line.bytes_down, line.bytes_up) for line in rounds], default=0)
    power, unit = next(((p, u) for p, u in ((1e9, "GB"), (1e6, "MB")) if top >= p), (1e3, "KB"))
    carried = [Series("to the sites", points("bytes_down", power)), Series("from the sites", points("bytes_up", power))]
    took_part = [
        Series("accepted", points("clients"), 1),
        Series("rejected", points("rejected"), 0),
        Series("silent", points("silent"), 3),
    ]
    seconds = [line.seconds for line in rounds]
    scale, name = (
        (3600, "hours")
        if seconds and max(seconds) >= 7200
        else (60, "minutes")
        if seconds and max(seconds) >= 120
        else (1, "seconds")
    )
    took = [Series("time", points("seconds", scale))]
    return row_of(
        chart(
            "Held-out denoising loss",
            line_chart("Held-out denoising loss", losses, x="round", y="loss"),
            "on images that no site trains on",
        ),
        chart(
            "Updates",
            line_chart("Updates", took_part, x="round", y="sites", counts=True, from_zero=True),
            "by what became of them",
        ),
        chart("Carried", line_chart("Bytes carried", carried, x="round", y=unit, from_zero=True), "in each round"),
        chart("Time", line_chart("Time of a round", took, x="round", y=name, from_zero=True), "of each round"),
    )


def round_by_round(rounds: Sequence[RoundLine]) -> Markup:
    """The lines of rounds.jsonl; of very many, evenly chosen ones."""
    if not rounds:
        return Markup("")
    every = -(-len(rounds) // MOST_LINES)
    shown = [*rounds[:-1:every], rounds[-1]]
    header = [
        "Round",
        "sites",
        "examples",
        "images",
        "loss before",
        "after",
        "sent",
        "received",
        "time",
        "rejected",
        "silent",
        "late",
        "attempts",
    ]
    rows = []
    for line in shown:
        losses = [figure(line.loss_before), figure(line.loss_after)]
        cost = [readable_size(line.bytes_down), readable_size(line.bytes_up), duration(line.seconds)]
        troubles = [count(n) for n in (line.rejected, line.silent, line.late, line.attempts)]
        rows.append(
            [
                str(line.round),
                count(line.clients),
                count(line.examples),
                count(line.images_seen),
                *losses,
                *cost,
                *troubles,
            ]
        )
    less = f"every {every}. of {len(rounds):,} rounds, and the last" if every > 1 else "all rounds"
    return table(f"From rounds.jsonl: {less}", header, rows)
