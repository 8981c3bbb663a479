"""`maskdm-server provision`, `provision renew` and `provision revoke`."""

from pathlib import Path
from typing import Annotated

import typer

from maskdm.errors import UsageError
from maskdm.federated.kit import fingerprint
from maskdm.federated.policy import TEMPLATE, UNATTENDED, load_policy
from maskdm.run.reporting import say
from maskdm.run.runfolder import owned
from maskdm.training.checkpoint import describe_checkpoint

from ..kits.provision import provision, renew, revoke

app = typer.Typer(add_completion=False)

Kits = Annotated[Path, typer.Option(help="Folder of the authority, the server's files and the kits.")]
Days = Annotated[int, typer.Option(min=1, max=825, help="Days that certificates and kits are valid.")]
Policy = Annotated[Path | None, typer.Option(help="Policy to propose to the sites (TOML); default: the strict one.")]

NoApproval = Annotated[
    bool,
    typer.Option("--no-approval", help="Propose that sites take the first terms that come, and ask nobody there."),
]


@app.callback(invoke_without_command=True)
def provision_command(
    context: typer.Context,
    out: Kits = Path("kits"),
    server: Annotated[str | None, typer.Option(help="HOST:PORT as the clients reach the server.")] = None,
    client: Annotated[list[str] | None, typer.Option(help="Name of a client; one --client for each.")] = None,
    san: Annotated[list[str] | None, typer.Option(help="Another name or address of the server.")] = None,
    days: Days = 90,
    policy: Policy = None,
    prior: Annotated[Path | None, typer.Option(help="The prior, so that clients can try its model.")] = None,
    no_approval: NoApproval = False,
) -> None:
    """Make startup kits: an authority, the server's certificate, and a signed kit for each client."""
    if context.invoked_subcommand:
        return
    if not client and not (out / "server").exists():
        raise UsageError("--client is missing: give a name for each client, e.g. --client hospital-a")
    model = describe_checkpoint(prior, "--prior").model if prior else None
    text = _policy(policy, no_approval)
    with owned(out):  # two at a time would lose what one of them changed
        made = provision(out, server, client or [], names=san or [], days=days, policy=text, model=model)
    _tell(out, made)
    for name in [name for name in client or [] if out / f"{name}.zip" not in made]:
        say(f"{name} has a kit already; provision renew --client {name} makes a new one")


@app.command("renew")
def renew_command(
    out: Kits = Path("kits"),
    client: Annotated[list[str] | None, typer.Option(help="Whose kit; default: everybody's.")] = None,
    days: Days = 90,
    policy: Policy = None,
    no_approval: NoApproval = False,
) -> None:
    """Make a new server certificate and new kits; the old keys stay valid until they expire."""
    text = _policy(policy, no_approval)
    with owned(out):
        made = renew(out, client or [], days=days, policy=text)
    _tell(out, made)


@app.command("revoke")
def revoke_command(
    name: Annotated[str, typer.Argument(help="The client to let in no more.")], out: Kits = Path("kits")
) -> None:
    """Let a client in no more; a running server sees it within seconds."""
    with owned(out):
        revoke(out, name)
    say(f"{name} is let in no more; a server that uses {out / 'server'} ends its connection within seconds")


def _policy(path: Path | None, no_approval: bool) -> bytes:
    if path and no_approval:
        raise UsageError("--policy and --no-approval exclude each other: set approve-first-round in the file")
    if path is None:
        return (UNATTENDED if no_approval else TEMPLATE).encode()
    load_policy(path)
    return path.read_bytes()


def _tell(out: Path, made: list[Path]) -> None:
    for path in made:
        say(f"{path}: hand it to {path.stem} by a channel that you trust, then delete it here")
    say(f"server: maskdm-server serve --tls {out / 'server'} …; keep {out / 'authority' / 'ca.key'} offline")
    say(f"authority: SHA-256 {fingerprint((out / 'authority' / 'ca.crt').read_bytes())}")
