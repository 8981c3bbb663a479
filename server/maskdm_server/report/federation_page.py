"""A federation as a page: where it stands, what it learned, who took part, what it cost, what went wrong."""

from maskdm.run.reporting import readable_size

from .agreement import agreement
from .costs import costs, round_by_round
from .gather import Federation, State
from .incidents import audit, faults, privacy, rejections
from .page.blocks import code, colophon, configuration, facts, page, picture, row_of, section, tiles
from .page.markup import Markup, tag, together
from .page.pictures import read_picture
from .page.units import count, duration, figure, moment, percent
from .participation import participation
from .quality import quality, quality_at_sites

STATES: dict[State, tuple[str, str]] = {
    "starting": ("warn", "is starting"),
    "waiting": ("warn", "is waiting for clients"),
    "running": ("warn", "is running"),
    "finished": ("good", "is finished"),
    "stopped by patience": ("good", "is finished: it was stopped by its patience"),
    "failed": ("bad", "failed"),
    "interrupted": ("bad", "was interrupted: the same command continues it"),
}


def federation_page(found: Federation, *, written: float = 0.0, note: str = "") -> str:
    """The whole page.

    Args:
        written: when, in seconds since 1970.
        note: on the page itself, at its end.
    """
    sections = [
        section("Samples", _samples(found)),
        section("Held-out loss and cost of the rounds", costs(found.rounds)),
        section("Quality of the samples", quality(found.folder), quality_at_sites(found.quality)),
        section("Who took part", participation(found.sites, found.done())),
        section("How the updates agree", agreement(found.rounds)),
        section("Rejected updates", rejections(found)),
        section("What went wrong", faults(found)),
        section("Privacy", *privacy(found)),
        section("Audit log", *audit(found)),
        section("Round by round", round_by_round(found.rounds)),
        section("Where it comes from", _origin(found)),
        section("Configuration", configuration(found.settings)),
    ]
    kind = "MaskDM simulation" if "simulation.clients" in found.settings else "MaskDM federation"
    return page(kind, found.folder.resolve().name, _lead(found), sections, colophon(written, note))


def _lead(found: Federation) -> list[Markup]:
    """What a person wants to know first."""
    kind, words = STATES[found.state]
    rounds = f"{count(found.done())} of {count(found.planned())} rounds are done."
    prior, newest = found.losses()
    learned = ""
    if prior is not None and newest is not None and found.rounds:
        change = f" ({percent(newest / prior - 1)})" if prior else ""
        whose = "the final model" if found.result and found.result.loss_final is not None else "the newest one measured"
        learned = f" Held-out loss: {figure(prior)} for the prior, {figure(newest)} for {whose}{change}."
    about = tag(
        "p",
        tag("span", found.state, class_=f"state {kind}"),
        f"The federation {words}. {rounds}{learned}",
        class_="lead",
    )
    return [about, *_now(found), _tiles(found)]


def _now(found: Federation) -> list[Markup]:
    happened = found.happened
    if found.state == "failed" and happened.failure:
        return [tag("p", happened.failure)]
    if found.state == "waiting" and happened.waiting:
        there, needed = happened.waiting
        return [tag("p", f"{there} of {needed} clients are there.")]
    if found.state == "running" and happened.at_work:
        number, asked, images = happened.at_work
        seen = f"; they have seen {images:,} images until now" if images else ""
        return [tag("p", f"Round {number}: {asked} {'client is' if asked == 1 else 'clients are'} at work{seen}.")]
    if found.result and found.result.model_of_round != found.result.rounds:
        best = found.result.model_of_round
        return [tag("p", f"The model is that of round {best}, which had the lowest held-out loss.")]
    return []


def _tiles(found: Federation) -> Markup:
    rounds = found.rounds
    prior, newest = found.losses()
    down, up = (sum(getattr(line, name) for line in rounds) for name in ("bytes_down", "bytes_up"))
    if found.result:
        down, up = found.result.bytes_down, found.result.bytes_up
    rejected, silent = sum(line.rejected for line in rounds), sum(line.silent for line in rounds)
    sites = sum(bool(site.asked()) for site in found.sites.by_name.values())
    latest = f"{count(rounds[-1].clients)} in the last round" if rounds else ""
    return tiles(
        [
            ("Rounds", f"{count(found.done())} / {count(found.planned())}", duration(sum(r.seconds for r in rounds))),
            ("Held-out loss", figure(newest), f"prior {figure(prior)}"),
            ("Sites", count(sites), latest),
            ("Images trained on", count(sum(line.images_seen for line in rounds)), "repetitions counted"),
            ("Sent to sites", readable_size(down), "models"),
            ("Received", readable_size(up), "updates"),
            ("Updates rejected", count(rejected), f"a site silent: {count(silent)}×"),
            ("ε spent", "none", "no differential privacy, so no ε applies"),
        ]
    )


def _samples(found: Federation) -> Markup:
    folder = found.folder / "samples"
    before, after = folder / "before.png", folder / "after.png"
    pair = []
    if before.exists():
        alt = "Grid of images that the prior draws, before the federation"
        pair.append(picture("The prior", read_picture(before), alt))
    if after.exists():
        alt = "Grid of images that the final model draws from the same noise"
        pair.append(picture("The final model, from the same noise", read_picture(after), alt))
    strip = [
        picture(f"After round {number}", read_picture(path), f"Grid of images drawn after round {number}, same noise")
        for number, path in found.grids
    ]
    through = [tag("h3", "Through the rounds, from the same noise"), row_of(*strip, class_="strip")] if strip else []
    return together(row_of(*pair, class_="pair"), *through)


def _origin(found: Federation) -> Markup:
    about: dict[str, str] = {}
    if found.settings.get("federation.federation"):
        about["Federation"] = code(str(found.settings["federation.federation"]))
    about["sha256 of the prior"] = code(str(found.settings.get("federation.prior_sha256", "–")))
    if found.model_sha256:
        about["sha256 of model.safetensors"] = code(found.model_sha256)
    if found.model:
        shape = found.model.model
        about["Network"] = f"{shape.network}, {shape.depth} blocks of {shape.dim}, {shape.heads} heads"
        about["Images"] = f"{shape.image_size}×{shape.image_size} pixels, {shape.channels} channels"
        about["Images seen in all"] = count(found.model.images_seen)
    if found.happened.begun:
        about["First event"] = f"{moment(found.happened.begun)} UTC"
        about["Newest event"] = f"{moment(found.happened.ended)} UTC"
    for newest in found.versions[-1:]:
        about["Versions"] = ", ".join(f"{name} {version}" for name, version in newest if version)
    about |= {f"Unreadable lines of {name}": count(lines) for name, lines in found.unreadable.items()}
    return facts(about)
