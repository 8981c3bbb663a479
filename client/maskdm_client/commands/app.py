"""`maskdm-client`: the institution's command line."""

import typer

from maskdm.commands.audit_commands import audit_log
from maskdm.commands.prepare import prepare

from ..doctor.command import doctor
from ..gate.approval import approve
from .join_command import join

app = typer.Typer(add_completion=False, no_args_is_help=False)
app.callback(invoke_without_command=True)(join)
app.command("prepare")(prepare)
app.command("doctor")(doctor)
app.command("approve")(approve)
app.add_typer(audit_log, name="audit-log")
