"""What FED/events.jsonl tells, in words: for the terminal while a federation runs, and for its report."""

from collections.abc import Mapping
from typing import Any

from maskdm.run.reporting import say


def tell(event: Mapping[str, Any]) -> None:
    """Say what happened, if it is worth a line."""
    if line := described(event):
        say(line)


def described(event: Mapping[str, Any]) -> str:
    """One event as a line for a person; nothing where it is none for people.

    Raises:
        KeyError, TypeError, ValueError: it is none that this program writes.
    """
    kind = event["event"]
    if kind == "start":
        down, later, up = (event[name] / 1e6 for name in ("bytes_down", "bytes_down_later", "bytes_up"))
        first = f"{down:.1f} MB to a client at first, then " if later < down else ""
        return (
            f"each round sends {first}{later:.1f} MB to a client and gets {up:.1f} MB back; "
            f"{event['round']} rounds done before"
        )
    if kind == "waiting":
        return f"{event['clients']} of {event['needed']} clients are there; waiting"
    if kind == "sent" and event["action"] == "train":
        return f"round {event['round']}/{event['rounds']}: {event['clients']} clients at work"
    if kind == "sent" and event["action"] == "evaluate":
        return f"{event['clients']} clients evaluate a model"
    if kind == "quality":
        return _quality(event)
    if kind == "rejected":
        return f"round {event['round']}: the reply of site {event['site']} was rejected: {event['reason']}"
    if kind == "round":
        return (
            f"round {event['round']}/{event['rounds']}: held-out loss {_loss(event['loss_before'])} → "
            f"{_loss(event['loss_after'])} at {event['clients']} clients, {event['images_seen']:,} images, "
            f"{event['seconds']:.0f} s, {event['bytes_up'] / 1e6:.1f} MB up"
        )
    if kind == "against":
        return (
            f"round {event['round']}: the update of site {event['site']} points against those of the others "
            f"(cosine {event['cosine']:.2f}, {event['norm_ratio']:.2g} times the usual length) and was let in"
        )
    if kind == "working":
        return f"round {event['round']}: site {event['site']} is at {event['images']:,} images, all at {event['all']:,}"
    if kind == "silent":
        return f"round {event['round']}: site {event['site']} is not waited for any more: {event['reason']}"
    if kind == "late":
        return f"round {event['round']}: a reply of site {event['site']} to an earlier question was dropped"
    if kind == "rests":
        return f"site {event['site']} failed again and again; it is left alone until round {event['until']}"
    if kind == "disk full":
        return f"round {event['round']}: the disk is full; make room within {event['seconds'] / 60:.0f} minutes"
    if kind == "crashed":
        return f"the process that runs the rounds failed: {event['reason']}"
    if kind == "retry":
        return f"round {event['round']}: {event['accepted']} usable updates, {event['needed']} needed; trying again"
    if kind == "finished" and event["clients"]:
        return f"held-out loss: prior {_loss(event['loss_prior'])} → final {_loss(event['loss_final'])}"
    if kind == "finished":
        return "WARNING: no client was there at the end: the final model was not measured, and none of them has it"
    return ""


def _loss(value: float | None) -> str:
    return "untold" if value is None else f"{value:.4f}"


def _quality(event: Mapping[str, Any]) -> str:
    """An evaluation, headed by the kernel distance, which small numbers of images do not bias."""
    model = f"the model of round {event['round']}" if event["round"] else "the prior"
    if not event["sites"]:
        return f"WARNING: no site evaluated {model}: each one's own log says why"
    figures = dict(event["quality"])
    headline = f"kernel distance {figures.pop('kernel'):.4g}, " if "kernel" in figures else ""
    rest = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    return (
        f"{model}: {headline}{rest} between {event['images']:,} drawn images and "
        f"{event['quality_images']:,} held out at {event['sites']} sites"
    )
