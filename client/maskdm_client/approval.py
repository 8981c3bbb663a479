"""Approval of a federation's first update by a person: the worker holds it, `maskdm-client approve` decides."""

import json
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from maskdm.auditlog import AUDIT
from maskdm.errors import MaskDMError, UsageError
from maskdm.runfolder import write_json
from maskdm_client.gate import record
from maskdm_client.mailbox import POLL_SECONDS

HELD = Path("work") / "approval.json"  # what waits, or waited last
APPROVALS = "approvals.json"  # decisions by federation


class NotApproved(MaskDMError):
    """A person at this site denied what would have left."""


def decision(folder: Path, federation: str) -> bool | None:
    """Whether updates of a federation may leave; None where nobody has decided, or what was decided cannot be read."""
    try:
        found = json.loads((folder / APPROVALS).read_text())[federation]["approved"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, bool) else None


def check_not_denied(folder: Path, federation: str) -> None:
    """See that nobody denied the updates of a federation.

    Raises:
        NotApproved: somebody did.
    """
    if decision(folder, federation) is False:
        raise NotApproved("the updates of this federation were denied here: maskdm-client approve lets them leave")


def wait_for_decision(folder: Path, federation: str, superseded: Callable[[], bool]) -> bool:
    """Wait until somebody approves; returns False where something newer is asked for.

    Raises:
        NotApproved: it was denied.
    """
    while (decided := decision(folder, federation)) is None:
        if superseded():
            return False
        time.sleep(POLL_SECONDS)
    check_not_denied(folder, federation)
    return decided


def approve(
    out: Annotated[Path, typer.Option(help="The site's folder.")] = Path("maskdm-site"),
    deny: Annotated[bool, typer.Option("--deny", help="Let no update of this federation leave.")] = False,
) -> None:
    """Let the updates of a federation leave whose first one waits for approval, or deny them.

    The decision counts for the whole federation, until the opposite is decided.
    """
    try:
        summary = json.loads((out / HELD).read_text())
        lines, federation, number = _described(summary), str(summary["federation"]), int(summary["round"])
    except FileNotFoundError as error:
        raise UsageError(
            f"--out {out}: no update waits for approval (the policy's approve-first-round makes the first one wait)"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--out {out}: {HELD} cannot be read: {error}") from error
    for line in lines:
        print(line)
    verdict = "denied" if deny else "approved"
    record(out / AUDIT, "out", number, f"{verdict} by a person here")
    _decide(out, federation, not deny)
    print(f"{verdict}: federation {federation}")


def _decide(folder: Path, federation: str, approved: bool) -> None:
    path = folder / APPROVALS
    try:
        decisions = dict(json.loads(path.read_text())) if path.exists() else {}
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path} is damaged: delete it to decide anew on every federation") from error
    when = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(path, {**decisions, federation: {"approved": approved, "time": when}})


def _described(summary: Mapping[str, Any]) -> list[str]:
    """What would leave, for a person."""
    numbers = summary["numbers"]
    return [
        f"federation  {summary['federation']}",
        f"round       {summary['round']} of {summary['rounds']}",
        f"update      {summary['arrays']} arrays, {summary['bytes']:,} bytes as {summary['encoding']}, "
        f"of {summary['train']} weights, sha256 {summary['sha256'][:12]}",
        f"norm        {summary['norm']:.4g}, the model's is {summary['norm_of_model']:.4g}",
        f"trained on  {numbers['examples']:,} images, {numbers['images_seen']:,} seen",
        f"numbers     {', '.join(f'{name} {value}' for name, value in numbers.items())}",
    ]
