"""The records that `maskdm-server evaluate` left beside a model → tables, and lines over rounds or images."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from maskdm.evaluation.record import Evaluation, Measured, records_of

from ..federation.events import QualityLine
from .page.blocks import chart, note, row_of, table
from .page.charts import Series, line_chart
from .page.markup import Markup, tag, together
from .page.units import count, figure

MOST_RECORDS = 200
MOST_CHARTS = 4
MOST_SITES = 40


def quality(folder: Path) -> Markup:
    """What was measured: a table for each feature network, reference and way of sampling, whose numbers compare."""
    records = list(records_of(folder))[-MOST_RECORDS:]
    groups = groupby(sorted(records, key=_conditions), key=_conditions)
    return together(*(_group(sorted(group, key=_age)) for _, group in groups))


def quality_at_sites(lines: Sequence[QualityLine]) -> Markup:
    """What sites measured themselves: all of them together for each model, then each of them for the newest one."""
    if not lines:
        return Markup("")
    shown = lines[-MOST_RECORDS:]
    names = list(dict.fromkeys(name for line in shown for name in line.quality))
    header = ["Model", "sites", "images of theirs", *names]
    rows = [
        [_model(line), count(line.sites), count(line.quality_images), *(figure(line.quality.get(n)) for n in names)]
        for line in shown
    ]
    newest = shown[-1]
    each = [
        [site, count(found.get("quality_images")), *(figure(found.get(name)) for name in names)]
        for site, found in list(newest.by_site.items())[:MOST_SITES]
    ]
    alone = table(f"Each site on its own: {_model(newest)}", ["Site", *header[2:]], each) if each else ""
    measured_by = {frozenset(line.by_site) for line in shown}
    warning = note("Not all of these models were measured by the same sites: part of a difference may be theirs.")
    compared = table("Compared by the sites with images of their own", header, rows)
    return together(compared, warning if len(measured_by) > 1 else "", alone)


def _model(line: QualityLine) -> str:
    return f"after round {line.round}" if line.round else "the prior"


def _conditions(record: Evaluation) -> str:
    parts = {"extractor", "reference", "training", "neighbours", "sampling"}
    return record.model_dump_json(include=parts)


def _age(record: Evaluation) -> tuple[int, int]:
    return record.rounds, record.images_seen


def _group(records: Sequence[Evaluation]) -> Markup:
    last = records[-1]
    names = list(dict.fromkeys([last.headline, *(name for record in records for name in record.metrics)]))
    rows = []
    for record in records:
        model = Path(record.model or record.sampling.file or "images").name
        cells = [_measured(record.metrics.get(name)) for name in names]
        rows.append([model, count(record.rounds), count(record.images_seen), *cells])
    ways = {"sampler": last.sampling.sampler, "steps": last.sampling.steps, "guidance": last.sampling.guidance}
    way = ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
                    for name, value in ways.items() if value is not None)  # fmt: skip
    said = (
        f"{count(last.sampling.count)} generated images ({way or 'made elsewhere'}, seed {last.sampling.seed}) against "
        f"{count(last.reference.images)} of the reference’s {last.reference.split} images, features of "
        f"{last.extractor.name}"
    )
    about = [f"Reference {last.reference.sha256[:12]}, features {last.extractor.sha256[:12]}.", *last.notes]
    header = ["Model", "rounds", "images seen", *(_named(name, records) for name in names)]
    return together(
        table(said, header, rows),
        note(
            f"In brackets the {100 * last.confidence:.0f} % interval; the floor is what "
            f"{count(last.metrics[last.headline].floor_images)} real images get against as many others. ",
            *_spaced(about),
        ),
        row_of(*(_over_time(name, records) for name in names[:MOST_CHARTS])),
    )


def _spaced(sentences: Sequence[str]) -> list[str]:
    return [part for sentence in sentences for part in (sentence, " ")]


def _named(name: str, records: Sequence[Evaluation]) -> str:
    better = next((record.metrics[name].better for record in records if name in record.metrics), None)
    return f"{name} {({'lower': '↓', 'higher': '↑', 'one': '→ 1'}).get(better or '', '')}".strip()


def _measured(found: Measured | None) -> Markup:
    if found is None:
        return tag("td", "–", class_="n")
    interval = f"[{figure(found.low)}, {figure(found.high)}]" if found.low is not None else ""
    floor = f"floor {figure(found.floor)}" if found.floor is not None else ""
    return tag("td", figure(found.value), tag("small", f" {interval} {floor}".rstrip()), class_="n")


def _over_time(name: str, records: Sequence[Evaluation]) -> Markup:
    by_rounds = len({record.rounds for record in records}) > 1
    found = [(float(r.rounds if by_rounds else r.images_seen), r.metrics[name]) for r in records if name in r.metrics]
    if len({x for x, _ in found}) < 2:
        return Markup("")
    lines = [Series(name, [(x, measured.value) for x, measured in found])]
    floors = [(x, measured.floor) for x, measured in found if measured.floor is not None]
    if floors:
        lines.append(Series("floor: real images", floors))
    across = "round" if by_rounds else "images seen"
    return chart(name, line_chart(name, lines, x=across, y=_named(name, records)))
