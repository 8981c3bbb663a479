"""What somebody at the site decided about a federation's terms; whatever is new to them waits, or is refused."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from maskdm.errors import UsageError
from maskdm.federated.auditlog import AUDIT
from maskdm.federated.policy import SitePolicy
from maskdm.federated.terms import Terms
from maskdm.run.runfolder import write_json

from ..folder.mailbox import POLL_SECONDS
from ..refusals import NotApproved
from .gate import record

HELD = Path("work") / "approval.json"  # what waits, or waited last
APPROVALS = "approvals.json"  # decisions by federation
BY_FINGERPRINT, AT_FIRST_CONTACT = "by its fingerprint", "as the first terms that came"


def decision(folder: Path, terms: Terms) -> bool | None:
    """Whether what a federation asks for under these terms may leave; None where nobody has decided on them, or what
    was decided cannot be read.
    """
    decided = _decided(folder, terms.federation)
    if decided is None:
        return None
    approved, agreed = decided
    return None if approved and any(agreed.changes(terms)) else approved


def agree(folder: Path, terms: Terms, policy: SitePolicy, fingerprint: str | None = None) -> str:
    """See that work may begin under these terms; the first ones that come are agreed to, unless a person wants to.

    Args:
        fingerprint: of the terms that the site's owner approved before they came.

    Returns:
        How they were agreed to, where that was now.

    Raises:
        NotApproved: somebody denied them, or agreed to others and is not asked again (`approve-first-round`).
        OSError: that they were agreed to cannot be written down.
    """
    check_not_denied(folder, terms)
    if decision(folder, terms):
        return ""
    decided, how = _decided(folder, terms.federation), ""
    if decided is None and _is_damaged(folder, terms.federation):
        raise NotApproved(
            f"{folder / APPROVALS} is damaged, so nobody knows what was decided: delete it to decide anew"
        )
    if fingerprint == terms.fingerprint():
        how = BY_FINGERPRINT
    elif decided and not policy.approve_first_round:
        write_json(folder / HELD, {"terms": terms.model_dump(mode="json")})
        changes = "; ".join(decided[1].changes(terms))
        raise NotApproved(f"the terms were changed ({changes}): maskdm-client approve agrees to the new ones")
    elif not policy.approve_first_round:
        how = AT_FIRST_CONTACT
    if how:
        _decide(folder, terms, True, how)
    return how


def check_not_denied(folder: Path, terms: Terms) -> None:
    """See that nobody denied what a federation asks for.

    Raises:
        NotApproved: somebody did.
    """
    if decision(folder, terms) is False:
        raise NotApproved("the updates of this federation were denied here: maskdm-client approve lets them leave")


def wait_for_decision(folder: Path, terms: Terms, superseded: Callable[[], bool]) -> bool:
    """Wait until somebody approves; returns False where something newer is asked for.

    Raises:
        NotApproved: it was denied.
    """
    while (decided := decision(folder, terms)) is None:
        if superseded():
            return False
        time.sleep(POLL_SECONDS)
    check_not_denied(folder, terms)
    return decided


def approve(
    fingerprint: Annotated[
        str | None, typer.Argument(help="Of the terms that are meant; others are refused.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="The site's folder.")] = Path("maskdm-site"),
    deny: Annotated[bool, typer.Option("--deny", help="Let nothing of this federation leave.")] = False,
) -> None:
    """Let leave what waits for approval, and all that this federation asks for under the same terms; or deny it.

    The decision counts until the opposite is decided, or the coordinator changes the terms.
    """
    try:
        summary = json.loads((out / HELD).read_text())
        terms = Terms.model_validate(summary["terms"])
        lines, number = _described(summary), int(summary.get("round", 1))
    except FileNotFoundError as error:
        raise UsageError(
            f"--out {out}: nothing waits for approval (the policy's approve-first-round makes a federation wait)"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--out {out}: {HELD} cannot be read: {error}") from error
    if fingerprint not in (None, terms.fingerprint()):
        raise UsageError(f"{fingerprint}: the terms that wait have the fingerprint {terms.fingerprint()}: look at them")
    before = _decided(out, terms.federation)
    changes = [f"CHANGED     {change}" for change in before[1].changes(terms)] if before else []
    for line in (*terms.described(), *changes, *lines):
        print(line)
    if sys.stdin.isatty():
        typer.confirm("Let nothing of it leave?" if deny else "Let it leave?", abort=True)
    verdict = "denied" if deny else "approved"
    record(out / AUDIT, "out", number, f"{verdict} by a person here")
    _decide(out, terms, not deny, "by a person")
    print(f"{verdict}: federation {terms.federation}")


def _decided(folder: Path, federation: str) -> tuple[bool, Terms] | None:
    """What was decided, and on which terms."""
    try:
        found = json.loads((folder / APPROVALS).read_text())[federation]
        approved, terms = found["approved"], Terms.model_validate(found["terms"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (approved, terms) if isinstance(approved, bool) else None


def _is_damaged(folder: Path, federation: str) -> bool:
    """Whether something was decided on a federation, and nobody can read what."""
    try:
        return federation in json.loads((folder / APPROVALS).read_text())
    except FileNotFoundError:
        return False
    except (OSError, ValueError, TypeError):
        return True


def _decide(folder: Path, terms: Terms, approved: bool, how: str) -> None:
    path = folder / APPROVALS
    try:
        decisions = dict(json.loads(path.read_text())) if path.exists() else {}
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path} is damaged: delete it to decide anew on every federation") from error
    when = datetime.now(UTC).isoformat(timespec="seconds")
    new = {"approved": approved, "how": how, "time": when, "terms": terms.model_dump(mode="json")}
    write_json(path, {**decisions, terms.federation: new})


def _described(summary: Mapping[str, Any]) -> list[str]:
    """What would leave, for a person; nothing where only terms wait."""
    if "numbers" not in summary:
        return []
    numbers = summary["numbers"]
    lines = [f"round       {summary['round']} of {summary['rounds']}"]
    if summary["arrays"]:
        lines += [
            f"update      {summary['arrays']} arrays, {summary['bytes']:,} bytes as {summary['encoding']}, "
            f"of {summary['train']} weights, sha256 {summary['sha256'][:12]}",
            f"norm        {summary['norm']:.4g}, the model's is {summary['norm_of_model']:.4g}",
            f"trained on  {numbers['examples']:,} images, {numbers['images_seen']:,} seen",
        ]
    return [*lines, f"numbers     {', '.join(f'{name} {value}' for name, value in numbers.items())}"]
