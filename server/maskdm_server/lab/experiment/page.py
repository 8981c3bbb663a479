"""An experiment's results as a page: what may be said of it, curves, a table, and samples to look at."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from maskdm.run.runfolder import flatten

from ...report.page.blocks import chart, colophon, configuration, facts, note, page, picture, row_of, section, table
from ...report.page.charts import Series, line_chart, picture_of
from ...report.page.markup import Markup, tag, together
from ...report.page.pictures import read_picture
from ...report.page.units import compact, count, figure
from .arms import Arm
from .budget import ExperimentConfig
from .summary import ArmRun

BY_IMAGES = ("masked", "unmasked", "scratch-short", "scratch")
BY_COMPUTE = ("masked", "unmasked", "scratch", "everything")
FEDERATED = ("masked", "federated", "federated-skewed", "federated-scratch-short")

Results = Mapping[str, Sequence[ArmRun]]


def experiment_page(
    name: str,
    results: Results,
    arms: Mapping[str, Arm],
    said: Sequence[str],
    config: ExperimentConfig,
    floor: Mapping[str, float],
    about: Mapping[str, str],
    pictures: Mapping[str, Path],
    written: float,
) -> str:
    """The whole page.

    Args:
        floor: what real images score.
        about: facts of images and feature network.
        pictures: a grid of samples of each arm.
        written: when, in seconds since 1970.
    """
    runs = max((len(seeds) for seeds in results.values()), default=0)
    lead = [
        tag(
            "p",
            f"{len(results)} arms, {runs} seeds: equal compute for each, less for those called short.",
            class_="lead",
        )
    ]
    others = [arm for arm in results if arm not in {*BY_IMAGES, *BY_COMPUTE, *FEDERATED}]
    sections = [
        section("What the numbers allow to say", tag("ul", *(tag("li", sentence) for sentence in said))),
        section(
            "Curves",
            note(
                "Means of the seeds; both axes are logarithmic. Lower is better, and ",
                f"{count(floor['n'])} real images score ",
                figure(floor["fd"]),
                ".",
            ),
            row_of(
                _curves("Distance against local images", results, BY_IMAGES, "images"),
                _curves("Distance against compute, prior included", results, BY_COMPUTE, "flops"),
                _curves("Federated, against local images of all sites", results, FEDERATED, "images"),
                *(
                    _curves("Other arms", results, ("masked", *others[i : i + 3]), "images")
                    for i in range(0, len(others), 3)
                ),
            ),
        ),
        section("Samples", _samples(results, arms, pictures)),
        section("All runs", _table(results, floor)),
        section("Images and features", facts(about)),
        section("Configuration", configuration(flatten(config.model_dump(mode="json")))),
    ]
    return page("MaskDM experiment", name, lead, sections, colophon(written))


def mean_curve(runs: Sequence[ArmRun], over: str) -> list[tuple[float, float]]:
    """Mean distance of the seeds at each point, over "images" or "flops"."""
    points = zip(*(run.curve for run in runs), strict=True)
    return [(float(lines[0][over]), fmean(line["fd"] for line in lines)) for lines in points]


def curves(title: str, results: Results, names: Sequence[str], over: str) -> Markup:
    """The chart of some arms, as far as they ran."""
    series = [Series(name, mean_curve(results[name], over)) for name in names if name in results]
    x = "local images seen" if over == "images" else "FLOPs"
    return line_chart(title, series, x=x, y="Fréchet distance", log=True, log_x=True)


def curves_file(results: Results) -> str:
    """The chart of the pooled arms over local images, as an SVG file."""
    names = [name for name in BY_IMAGES if name in results]
    drawn = curves("Distance against local images", results, names, "images")
    return picture_of(drawn, names) if drawn else ""


def _curves(title: str, results: Results, names: Sequence[str], over: str) -> Markup:
    return chart(title, curves(title, results, names, over))


def _samples(results: Results, arms: Mapping[str, Arm], pictures: Mapping[str, Path]) -> Markup:
    shown = [
        picture(
            f"{name}: {arms[name].what}", read_picture(pictures[name]), f"Grid of samples of the arm {name}", "wide"
        )
        for name in results
        if name in pictures
    ]
    return together(
        note("First seed, at the end of the budget, all from the same noise."), row_of(*shown, class_="strip")
    )


def _table(results: Results, floor: Mapping[str, float]) -> Markup:
    rows = [
        [
            name,
            str(run.seed),
            f"{run.lr:g}",
            count(run.last["images"]),
            compact(run.last["flops"]),
            figure(run.best["fd"]),
            figure(run.last["fd"]),
            figure(run.last["kd"]),
            figure(run.last["loss"]),
        ]
        for name, runs in results.items()
        for run in runs
    ]
    rows.append(
        [
            f"{count(floor['n'])} real images",
            "",
            "",
            "",
            "",
            figure(floor["fd"]),
            figure(floor["fd"]),
            figure(floor["kd"]),
            "",
        ]
    )
    header = ["Arm", "seed", "rate", "local images", "FLOPs", "FD, best", "FD, last", "KD, last", "held-out loss, last"]
    return table("Best: at the point that other held-out images choose; last: at the end of the budget", header, rows)
