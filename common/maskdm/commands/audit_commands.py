"""`audit-log verify` and `audit-log show`, the same at the coordinator and at a site."""

import os
import sys
from collections import deque
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UsageError
from ..federated.auditlog import AUDIT, Line, lines, verify
from ..federated.parcel import Outcome
from ..run.reporting import readable_size

audit_log = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="The log of every message in and out: show it, or verify that nobody changed it.",
)

Out = Annotated[Path, typer.Option(help="The folder that holds audit.jsonl: a site's, or a federation's.")]


@audit_log.command("verify")
def verify_command(
    out: Out,
    head: Annotated[
        str | None, typer.Option(help="A head that was noted earlier; it must still be in the chain.")
    ] = None,
) -> int:
    """Check the chain of hashes; exit code 1 where a line was changed, removed, inserted or moved.

    What was cut off at the end, and a log that was written anew as a whole, can only be told by a hash that was noted
    elsewhere: write down the head that is printed, and give it next time as --head.
    """
    if head is not None and (len(head) != 64 or set(head) - set("0123456789abcdef")):
        raise UsageError(f"--head {head}: give the 64 digits that audit-log verify printed")
    path = _existing(out)
    found = verify(path, head)
    for number in found.unreadable:
        print(f"line {number} cannot be read: torn by a loss of power, or older than the chain")
    if found.problem:
        print(f"BROKEN: {path}: {found.problem}")
        return 1
    print(f"whole: {path}, {found.lines:,} lines{', the noted one among them' if head else ''}")
    print(f"head:  {found.head}  (note it elsewhere: only --head tells whether the end is cut off)")
    return 0


@audit_log.command("show")
def show_command(
    out: Out,
    round_number: Annotated[
        int | None, typer.Option("--round", envvar="MASKDM_ROUND", min=1, help="Only messages of this round.")
    ] = None,
    last: Annotated[int | None, typer.Option(min=1, help="Only the last so many messages.")] = None,
) -> None:
    """Show the messages, one a line: time (UTC), direction, peer, round, bytes, verdict, content, sha256."""
    found = (line for line in lines(_existing(out)) if round_number is None or _is_of(line, round_number))
    try:
        for line in found if last is None else deque(found, maxlen=last):
            print(described(line))
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read it has seen enough; nothing more is written when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def described(line: Line) -> str:
    """A line for a person; nothing in it is obeyed by a terminal."""
    try:
        text = _described(line.entry) if line.entry else f"line {line.place} cannot be read"
    except (KeyError, TypeError, ValueError, AttributeError):
        text = f"line {line.place} is none that this program writes"
    return "".join(character if character.isprintable() else "?" for character in text)


def _described(entry: dict[str, Any]) -> str:
    time = str(entry["time"]).replace("+00:00", "").replace("T", " ")
    where = f"{entry['direction']:3}  {entry['peer']:12}  round {entry['round']:>4}  {readable_size(entry['bytes']):>9}"
    return f"{time}  {where}  {entry['verdict']}{_content(entry)}  {entry['sha256'][:12]}"


def _content(entry: dict[str, Any]) -> str:
    scalars, arrays = entry["scalars"], entry["arrays"]
    code = scalars.get("outcome")
    parts = [Outcome(code).name] if code in list(Outcome) else []
    for count, what in ((len(scalars), "number"), (len(arrays), "array")):
        parts += [f"{count} {what}{'s' if count > 1 else ''}"] if count else []
    return f" ({', '.join(parts)})" if parts else ""


def _is_of(line: Line, number: int) -> bool:
    return line.entry is not None and line.entry.get("round") == number


def _existing(out: Path) -> Path:
    path = out / AUDIT
    if not path.is_file():
        raise UsageError(f"--out {out} holds no {AUDIT}: give the folder of a site or of a federation")
    return path
