"""`maskdm-server`: the coordinator's command line."""

import typer

from maskdm.commands.audit_commands import audit_log
from maskdm.commands.prepare import prepare

from .demo_command import demo_command
from .evaluate_command import evaluate
from .experiment_command import experiment
from .features_command import features
from .pretrain_command import pretrain
from .provision_commands import app as provision_app
from .report_command import report
from .sample_command import sample
from .serve_command import serve_command
from .simulate_command import simulate

app = typer.Typer(add_completion=False, no_args_is_help=True, help="The coordinator of a MaskDM federation.")
app.command("pretrain")(pretrain)
app.command("prepare")(prepare)
app.command("sample")(sample)
app.command("report")(report)
app.command("evaluate")(evaluate)
app.command("features")(features)
app.command("experiment")(experiment)
app.command("serve")(serve_command)
app.command("simulate")(simulate)
app.command("demo")(demo_command)
app.add_typer(provision_app, name="provision")
app.add_typer(audit_log, name="audit-log")
