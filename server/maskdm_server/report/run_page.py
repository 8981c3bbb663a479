"""A pre-training run as a page: how far it is, how the loss fell, what it draws."""

from collections.abc import Sequence
from statistics import median

from .gather import MetricsLine, PretrainRun
from .page.blocks import chart, code, colophon, configuration, facts, note, page, picture, row_of, section, tiles
from .page.charts import Series, line_chart
from .page.markup import Markup, tag, together
from .page.pictures import read_picture
from .page.units import count, duration, figure, percent
from .quality import quality

# Above this ratio of the largest to the smallest loss a logarithmic axis shows more.
LOG_FROM = 5.0
STATES = {"running": ("warn", "is running"), "finished": ("good", "is finished")}


def run_page(found: PretrainRun, *, written: float = 0.0) -> str:
    """The whole page.

    Args:
        written: when, in seconds since 1970.
    """
    sections = [
        section("Samples", _samples(found)),
        section("Loss and speed", _charts(found.metrics, found.begins())),
        section("Quality of the samples", quality(found.folder)),
        section("Where it comes from", _origin(found)),
        section("Configuration", configuration(found.settings)),
    ]
    return page("MaskDM pre-training", found.folder.resolve().name, _lead(found), sections, colophon(written))


def _lead(found: PretrainRun) -> list[Markup]:
    kind, words = STATES.get(found.state, ("bad", "was interrupted: the same command continues it"))
    planned, seen, metrics = found.begins()[-1], found.seen(), found.metrics
    speed = median([line.images_per_s for line in metrics]) if metrics else 0.0
    left = f" About {duration((planned - seen) / speed)} are left." if found.state == "running" and speed else ""
    said = f"The run {words}. It has seen {count(seen)} of {count(planned)} images.{left}"
    first, last = _ends(metrics)
    waited = sum(line.data_wait for line in metrics) / len(metrics) if metrics else 0.0
    return [
        tag("p", tag("span", found.state, class_=f"state {kind}"), said, class_="lead"),
        tiles(
            [
                ("Images seen", count(seen), f"of {count(planned)}"),
                ("Loss", figure(last), f"{figure(first)} at first"),
                ("Images a second", f"{speed:,.1f}" if metrics else "–", "median"),
                ("Waiting for images", percent(waited) if metrics else "–", "of the time"),
            ]
        ),
    ]


def _ends(metrics: Sequence[MetricsLine]) -> tuple[float | None, float | None]:
    losses = [line.loss for line in metrics if line.loss is not None]
    return (losses[0], losses[-1]) if losses else (None, None)


def _samples(found: PretrainRun) -> Markup:
    if not found.grids:
        return note("None yet.")
    drawn = [
        picture(f"After {count(images)} images", read_picture(path), f"Grid of samples after {images:,} images")
        for images, path in found.grids
    ]
    if len(drawn) == 1:
        return row_of(*drawn, class_="pair")
    return together(note("All are drawn from the same noise."), row_of(*drawn, class_="strip"))


def _charts(metrics: Sequence[MetricsLine], begins: Sequence[int]) -> Markup:
    losses = [(float(line.images), line.loss) for line in metrics if line.loss is not None]
    values = [loss for _, loss in losses]
    log = bool(values) and min(values) > 0 and max(values) / min(values) > LOG_FROM
    speed = [(float(line.images), line.images_per_s) for line in metrics]
    waited = [(float(line.images), 100 * line.data_wait) for line in metrics]
    stages = [float(begin) for begin in begins[1:-1]]
    across = "images seen"
    remark = "Dotted lines: a stage with another mask begins." if stages else ""

    def drawn(
        title: str, points: Sequence[tuple[float, float]], y: str, *, log: bool = False, from_zero: bool = True
    ) -> Markup:
        return line_chart(title, [Series(y, points)], x=across, y=y, log=log, from_zero=from_zero, stages=stages)

    loss = drawn("Denoising loss", losses, "loss, logarithmic" if log else "loss", log=log, from_zero=False)
    return row_of(
        chart("Denoising loss", loss, remark or "on the patches that are shown"),
        chart("Speed", drawn("Speed", speed, "images a second")),
        chart("Waiting for images", drawn("Waiting for images", waited, "% of the time")),
    )


def _origin(found: PretrainRun) -> Markup:
    about: dict[str, str] = {}
    if found.prior_sha256:
        about["sha256 of prior.safetensors"] = code(found.prior_sha256)
    for key, name in (("corpus_sha256", "sha256 of the corpus"), ("init_sha256", "sha256 of what it started from")):
        if key in found.settings:
            about[name] = code(str(found.settings[key]))
    if found.prior:
        shape = found.prior.model
        about["Network"] = f"{shape.network}, {shape.depth} blocks of {shape.dim}, {shape.heads} heads"
        about["Hidden of each image"] = percent(found.prior.effective_mask_ratio)
    skipped = sum(line.skipped for line in found.metrics[-1:])
    about["Steps skipped, gradient not finite"] = count(skipped)
    for newest in found.versions[-1:]:
        about["Versions"] = ", ".join(f"{name} {version}" for name, version in newest if version)
    about |= {f"Unreadable lines of {name}": count(lines) for name, lines in found.unreadable.items()}
    return facts(about)
