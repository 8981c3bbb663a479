"""Serves a prior to a federation: one folder, one SuperLink, all rounds, resumable by the same command."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from maskdm.errors import FederationError, UsageError
from maskdm.federated.terms import terms_of
from maskdm.run.address import host_and_port
from maskdm.run.events import EVENTS, Event
from maskdm.run.interruption import Interruption
from maskdm.run.processes import Child
from maskdm.run.reporting import say
from maskdm.run.runfolder import LineReader
from maskdm.training.checkpoint import describe_checkpoint

from ..federation.events import tell
from ..federation.folder import SAMPLES, begin, conclude
from ..federation.round_pictures import RoundPictures
from ..federation.settings import FederationConfig, largest_update, round_plan
from ..kits.sites import check_folder, read_server
from .superlink import SuperLink

LOOPBACK = "127.0.0.1"
# Sites leave by themselves after the last round; those of a simulation get this long before they are ended.
LEAVE_SECONDS = 30.0

BANNER = """\
*****************************************************************************************
* INSECURE: nothing is encrypted, and whoever reaches this port takes part.             *
* Use it on one machine or a closed network only; `maskdm-server provision` makes kits. *
*****************************************************************************************"""

StartSites = Callable[[], Sequence[Child]]


def serve(
    prior: Path,
    out: Path,
    config: FederationConfig,
    *,
    host: str,
    port: int,
    tls: Path | None,
    start_sites: StartSites = lambda: (),
    simulation: Mapping[str, Any] | None = None,
    sample_count: int = SAMPLES,
) -> Path:
    """Run the federation to its end and return the path of the final model.

    Args:
        out: federation folder, already owned by this process.
        simulation: how `start_sites` makes its sites, kept in config.json with the rest.
        start_sites: called once the SuperLink runs; its children belong to the federation (simulations).

    Raises:
        FederationError: it could not be finished; the last good model stays in `out`.
    """
    if begin(prior, out, config, simulation or {}, sample_count):
        return conclude(out, config, sample_count)
    if tls is None and not simulation:
        say(BANNER)
    about = describe_checkpoint(prior, "--prior").model_copy(update={"prior_sha256": config.prior_sha256})
    largest, terms = largest_update(config, about.model), terms_of(round_plan(config, "train", 1, about, exchange=0))
    say(f"fingerprint of the terms, for sites to approve: {terms.fingerprint()}")
    pictures = RoundPictures(out, config, sample_count)
    with pictures, Interruption() as interruption, ExitStack() as children:
        events = LineReader(out / EVENTS)
        link = children.enter_context(SuperLink(out, host, port, tls, largest, say))
        link.submit(interruption.check)
        way = "--kit NAME.zip" if tls else f"--server {host}:{port}"
        say(f"listening on {host}:{port}; clients join with: maskdm-client --data ./local {way}")
        sites = [children.enter_context(site) for site in start_sites()]

        def check() -> None:
            interruption.check()
            for site in sites:
                if site.exit_code():
                    raise FederationError(f"a client ended: {site.last_lines(3)} (details: {site.log})")

        def hear(event: Event) -> None:
            tell(event)
            pictures.hear(event)

        link.follow(hear, check, events)
        link.close()  # which is what the sites wait for
        _let_leave(sites)
    return conclude(out, config, sample_count)


def address_of(tls: Path | None, insecure: bool, host: str | None, port: int | None) -> tuple[str, int]:
    """Where to listen: with TLS for everybody, at the port that the kits name; without on loopback, unless forced.

    Raises:
        UsageError: neither --tls nor --insecure, or both; or IPv6.
    """
    if host and ":" in host:
        raise UsageError(f"--host {host} is an IPv6 address, which is not supported: give an IPv4 one or a name")
    if tls and insecure:
        raise UsageError("--tls and --insecure exclude each other: choose one")
    if not tls and not insecure:
        raise UsageError(
            "--tls is missing: give the server's folder that maskdm-server provision made, e.g. kits/server, "
            "or --insecure to try it on one machine"
        )
    if not tls:
        return host or LOOPBACK, port or 8000
    check_folder(tls)
    known = read_server(tls)
    assert known is not None
    return host or "0.0.0.0", port or host_and_port("--server", known.server)[1]


def _let_leave(sites: Sequence[Child]) -> None:
    deadline = time.monotonic() + LEAVE_SECONDS
    while time.monotonic() < deadline and any(site.exit_code() is None for site in sites):
        time.sleep(0.1)
