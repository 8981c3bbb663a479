"""Flower's own simulation runtime (Ray) around the same rounds and the same clients: several virtual ones at a time.

Needs the extra `maskdm[simulation]`. Ray's files go to a short path of their own, because its sockets need one; nothing
of it listens elsewhere than on loopback, and it asks nobody which cloud it runs in.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from maskdm.errors import UsageError
from maskdm.run.events import EVENTS, Event
from maskdm.run.processes import free_port, script
from maskdm.run.reporting import say
from maskdm.run.runfolder import LineReader

from .control import Control
from .superlink import SuperLink


def simulate_ray(out: Path, clients: int, check: Callable[[], None], hear: Callable[[Event], None]) -> None:
    """Run the federation of a prepared folder, one client for each core (or GPU) at a time.

    Args:
        hear: is told each event.

    Raises:
        UsageError: Ray is not installed.
        FederationError: the run failed.
    """
    if find_spec("ray") is None:
        raise UsageError("--engine ray needs Ray: pip install 'maskdm[simulation]'")
    import torch

    cores, gpus = os.cpu_count() or 1, torch.cuda.device_count()
    slots = min(clients, gpus or cores)
    resources = {
        "num_supernodes": clients,
        "client_resources_num_cpus": max(1, cores // slots),
        "client_resources_num_gpus": 1.0 if gpus else 0.0,
        "init_args_num_cpus": max(1, cores // slots) * slots,
    }
    with _ray_folder() as folder:
        around = {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(folder),
            "RAY_ADDRESS": "local",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # which makes it listen on loopback only
            "http_proxy": "http://127.0.0.1:9",  # it looks for a cloud's metadata service otherwise
            "no_proxy": "127.0.0.1,localhost,::1",
        }
        events = LineReader(out / EVENTS)
        with Simulation(out, resources, around) as link:
            link.submit(check)
            say(f"{clients} virtual clients, {slots} at a time")
            link.follow(hear, check, events)


class Simulation(SuperLink):
    """A SuperLink whose nodes are virtual; it runs all of the federation in one process of its own, and in Ray's."""

    def __init__(self, folder: Path, resources: Mapping[str, float], around: Mapping[str, str]) -> None:
        self._resources, self._around = resources, around
        super().__init__(folder, "127.0.0.1", free_port(), None, 0, say)

    def _commands_for(self, host: str, port: int, largest_update: int) -> dict[str, list[str]]:
        self._environment |= self._around
        self._private = f"{host}:{port}"
        link = [script("flower-superlink"), "--simulation", "--insecure", "--host", host, "--port", str(port)]
        return {"superlink": [*link, "--disable-runtime-dependency-installation"]}

    def _start_run(self, control: Control) -> None:
        control.start_run("flower-simulation", self._folder, self._resources)


@contextmanager
def _ray_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="mdm-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
