"""What a reader has to be able to trust: what was rejected, what went wrong, privacy, and the audit log."""

from maskdm.federated.auditlog import AUDIT

from .gather import Federation
from .happened import KEPT, Fault
from .page.blocks import code, facts, note, table
from .page.markup import Markup, tag, together
from .page.units import count, moment


def rejections(found: Federation) -> Markup:
    """Why updates were rejected, and how often."""
    reasons = found.happened.reasons.most_common(20)
    if not reasons:
        return note("None.") if found.rounds else Markup("")
    return table(
        "Reasons, numbers left out", ["Reason", "times"], [[reason, count(times)] for reason, times in reasons]
    )


def faults(found: Federation) -> Markup:
    """Everything that went wrong, oldest first; of very much, the newest."""
    counted = found.happened.counted
    if not counted:
        return (
            note("Nothing: no site was silent, nothing crashed, no round had to be repeated.")
            if found.rounds
            else Markup("")
        )
    total = sum(counted.values())
    rows = [[moment(fault.first), fault.kind, fault.words + _times(fault)] for fault in found.happened.faults]
    shown = f"The newest {KEPT} of {total:,} events, oldest first" if len(rows) == KEPT else "Every event, oldest first"
    kinds = "; ".join(f"{kind} {times:,}×" for kind, times in counted.most_common())
    return together(
        note(f"{kinds}."), table(f"{shown}; times are UTC", ["Time", "Kind", "What"], rows, text=(1, 2), class_="words")
    )


def _times(fault: Fault) -> str:
    return f" ({fault.times:,} times, until {moment(fault.last)})" if fault.times > 1 else ""


def privacy(found: Federation) -> list[Markup]:
    """What can be said about ε: nothing, and why."""
    sites = sum(bool(site.asked()) for site in found.sites.by_name.values())
    return [
        tag(
            "p",
            tag("b", "No ε applies. "),
            "This version trains without differential privacy: there is no ε or δ to report, and no budget that could "
            "have been spent. Images stay at their sites; updates leave, and an update can reveal something about the "
            "images behind it.",
        ),
        facts(
            {"Differential privacy": "none", "ε, δ": "do not apply", "Sites whose updates were asked for": count(sites)}
        ),
    ]


def audit(found: Federation) -> list[Markup]:
    """Whether the chain of the audit log is whole, and what is in it."""
    verdicts = found.sites.verdicts
    if not verdicts:
        return [note(f"There is no {AUDIT} yet.")]
    verdict = found.audit
    if verdict is None:  # on the live page
        said = note(
            "The chain is not verified on the live page: ",
            code("maskdm-server audit-log verify --out FED"),
            " does it.",
        )
    elif verdict.problem:
        badge = tag("span", "broken", class_="state bad")
        said = tag("p", badge, f"{verdict.problem}. {count(verdict.lines)} lines; head ", code(verdict.head))
    else:
        torn = f", {len(verdict.unreadable):,} of them torn" if verdict.unreadable else ""
        badge = tag("span", "whole", class_="state good")
        said = tag(
            "p",
            badge,
            f"{count(verdict.lines)} lines{torn}, each chained to the one before it; head ",
            code(verdict.head),
        )
    directions = {"in": "from a site", "out": "to a site"}
    rows = [[f"{directions[way]}: {kind}", count(times)] for (way, kind), times in sorted(verdicts.items())[:40]]
    return [said, table("Messages and decisions", ["Verdict", "lines"], rows)]
