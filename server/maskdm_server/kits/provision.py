"""Startup kits: who may join, with which key, until when. Everything that is made lies in one folder.

KITS/authority/   the key that signs (it may be kept elsewhere, offline, between two uses) and its certificate
KITS/server/      what `serve --tls` needs: certificates, the server's key, and the list of sites
KITS/NAME.zip     a site's kit: hand it over by a channel that you trust, then delete it
"""

import hashlib
import json
import re
import zipfile
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path

from maskdm.config import ModelConfig
from maskdm.errors import UsageError
from maskdm.federated.bundle import bundle_sha256
from maskdm.federated.kit import AUTHORITY, KEY, KIT, POLICY, PUBLIC_KEY, README, SIGNATURE, SITE_NAME, Kit, sign
from maskdm.run.address import host_and_port
from maskdm.run.runfolder import atomic_write, close_to_others

from .authority import (
    key_bytes,
    load_authority,
    make_authority,
    new_key,
    server_certificate,
    site_key_bytes,
    site_public_key,
    write_private,
)
from .sites import SITES, Server, Site, read_server, read_sites, write_server, write_sites

HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")


def provision(
    out: Path,
    server: str | None,
    clients: Sequence[str],
    *,
    names: Sequence[str] = (),
    days: int = 90,
    policy: bytes,
    model: ModelConfig | None = None,
) -> list[Path]:
    """Make what is not there yet: an authority, the server's certificate, a kit for each new client.

    Args:
        server: HOST:PORT as the sites reach it; None where it was given before.
        names: other names and addresses by which the server is reached.
        days: that certificates and kits are valid.
        policy: the policy that is proposed to the sites (TOML).
        model: what will be trained, for `maskdm-client doctor`.

    Returns:
        The kits that were made.

    Raises:
        UsageError: a name that cannot be one, or another server than before.
    """
    for name in clients:
        if not re.fullmatch(SITE_NAME, name):
            raise UsageError(f"--client {name}: give a name of letters, digits, dots, dashes and underscores")
    before = read_server(out / "server")
    address = _address(server, before, out)
    out.mkdir(parents=True, exist_ok=True, mode=0o700)
    if before or all(path.name.startswith(".") for path in out.iterdir()):  # else it holds other things, too
        close_to_others(out)
    if not (out / "authority" / "ca.key").exists():
        if before:
            raise UsageError(f"--out {out}: authority/ca.key is not there: put it back for as long as kits are made")
        make_authority(out / "authority")
    wanted = Server(
        server=address,
        names=tuple(dict.fromkeys((*(before.names if before else ()), *names))),
        model=model or (before.model if before else None),
    )
    if not before or before.names != wanted.names:
        _certify(out, wanted, days)
    write_server(out / "server", wanted)
    known = {site.name for site in _sites(out) if site.revoked is None}
    return [_make_kit(out, name, wanted, days, policy) for name in dict.fromkeys(clients) if name not in known]


def renew(out: Path, clients: Sequence[str], *, days: int = 90, policy: bytes) -> list[Path]:
    """Make a new certificate for the server, and new kits; the old keys stay valid until they expire.

    Args:
        clients: whose kits; none stands for everybody's that was not revoked.

    Raises:
        UsageError: nothing was made here before, or an unknown client.
    """
    server = read_server(out / "server")
    if server is None:
        raise UsageError(f"--out {out} holds no kits that could be renewed: maskdm-server provision makes them")
    known = list(dict.fromkeys(site.name for site in _sites(out) if site.revoked is None))
    if unknown := [name for name in clients if name not in known]:
        raise UsageError(f"--client {unknown[0]} has no kit, or was revoked: maskdm-server provision makes a new one")
    close_to_others(out)
    _certify(out, server, days)
    return [_make_kit(out, name, server, days, policy) for name in clients or known]


def revoke(out: Path, client: str) -> None:
    """Let a client in no more; `serve` sees it within seconds.

    Raises:
        UsageError: there is none of that name that could be revoked.
    """
    sites, now = _sites(out), datetime.now(UTC)
    have = list(dict.fromkeys(site.name for site in sites if site.revoked is None))
    if client not in have:
        raise UsageError(f"{client} has no kit that could be revoked; these have one: {', '.join(have) or 'nobody'}")
    mine = [site.name == client and site.revoked is None for site in sites]
    changed = [site.model_copy(update={"revoked": now}) if its else site for site, its in zip(sites, mine, strict=True)]
    write_sites(out / "server" / SITES, changed)
    (out / f"{client}.zip").unlink(missing_ok=True)


def _address(server: str | None, before: Server | None, out: Path) -> str:
    if server is None and before is None:
        raise UsageError("--server is missing: give HOST:PORT as the clients will reach it")
    if server and before and server != before.server:
        raise UsageError(f"--server {server}: the kits in --out {out} are for {before.server}: choose another --out")
    address = server or (before.server if before else "")
    host, _ = host_and_port("--server", address)
    if not HOST.fullmatch(host):
        raise UsageError(f"--server {address}: give a host name or an IPv4 address, which serve listens on")
    return address


def _certify(out: Path, server: Server, days: int) -> None:
    """A new key and certificate for the server."""
    for name in server.names:
        if not HOST.fullmatch(name):
            raise UsageError(f"--san {name}: give a host name or an IPv4 address")
    folder, authority, key = out / "server", load_authority(out / "authority"), new_key()
    certificate = server_certificate(authority, key, [host_and_port("--server", server.server)[0], *server.names], days)
    write_private(folder / "server.key", key_bytes(key))
    atomic_write(folder / "server.crt", certificate)
    atomic_write(folder / "ca.crt", (out / "authority" / "ca.crt").read_bytes())
    if not (folder / SITES).exists():
        write_sites(folder / SITES, [])


def _make_kit(out: Path, name: str, server: Server, days: int, policy: bytes) -> Path:
    key, now = new_key(), datetime.now(UTC).replace(microsecond=0)
    public = site_public_key(key)
    expires = now + timedelta(days=days)
    files = {
        AUTHORITY: (out / "authority" / "ca.crt").read_bytes(),
        KEY: site_key_bytes(key),
        PUBLIC_KEY: f"{public} {name}\n".encode(),
        README: _readme(name, server.server, expires).encode(),
    }
    kit = Kit(
        name=name,
        server=server.server,
        issued=now,
        expires=expires,
        bundle=bundle_sha256(),
        files={path: _sha256(content) for path, content in files.items()},
        policy=_sha256(policy),
        model=server.model,
    )
    document = (json.dumps(kit.model_dump(mode="json"), indent=2) + "\n").encode()
    files |= {KIT: document, SIGNATURE: sign(document, load_authority(out / "authority")[0]), POLICY: policy}
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in files.items():
            entry = zipfile.ZipInfo(path, now.timetuple()[:6])
            entry.external_attr = (0o600 if path == KEY else 0o644) << 16
            archive.writestr(entry, content)
    # The kit first: a site that is listed without one would be nobody's.
    write_private(out / f"{name}.zip", packed.getvalue())
    site = Site(name=name, public_key=public, issued=now, expires=expires)
    write_sites(out / "server" / SITES, [*_sites(out), site])
    return out / f"{name}.zip"


def _sites(out: Path) -> list[Site]:
    path = out / "server" / SITES
    return read_sites(path) if path.exists() else []


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _readme(name: str, address: str, expires: datetime) -> str:
    return f"""# Startup kit of {name}

This kit lets one site, {name}, join the MaskDM federation at {address}. It is valid until {expires:%Y-%m-%d}.
`client.key` is this site's private key: keep it from other users, and tell the coordinator if it is lost.

1. Install: `pip install maskdm` (or the container image that you were given).
2. Compare the authority's fingerprint with the coordinator, by telephone: `maskdm-client doctor` prints it.
3. Look at `policy.toml`: it says what may leave this site, and it is yours to change.
4. Join, with the folder of your images:

       maskdm-client --data ./local --kit {name}.zip

Before that, this checks everything that can be checked, and sends nothing of your images:

       maskdm-client doctor --data ./local --kit {name}.zip

Only updates of the model's weights and the numbers that the policy lists leave; every message is listed in
`maskdm-site/audit.jsonl` (`maskdm-client audit-log show`). The same command again continues after an interruption.
"""
