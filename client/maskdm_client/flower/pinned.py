"""Flower's processes of a site, which run no code that a coordinator sends.

Flower's server ships an app bundle to the nodes, and whoever can submit a run decides what is in it. Here a bundle is
looked at by its sha256 alone: one that this site does not allow is answered with a code, and none is ever unpacked,
since the code that runs is the installed `maskdm_client.flower.client_app`.

    python -m maskdm_client.flower.pinned supernode  SITE [options of flower-supernode]
    python -m maskdm_client.flower.pinned superexec  SITE [options of flower-superexec]
    python -m maskdm_client.flower.pinned clientapp  SITE [options of flwr-clientapp]
"""

import hashlib
import sys
import tomllib
import zipfile
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from maskdm.errors import UsageError
from maskdm.federated.auditlog import AUDIT
from maskdm.federated.bundle import PROJECT
from maskdm.federated.flower_names import UNFIT, require
from maskdm.federated.parcel import Outcome

from ..folder.events import CodeRefused, note
from ..folder.settings import load_settings
from ..gate.gate import release_outcome
from ..gate.record_incoming import record_foreign
from .private_names import CLIENTAPP, REPLACED, USED

COMPONENT = "maskdm_client.flower.client_app:app"
LARGEST_BUNDLE = 1_000_000  # bytes
# A file in the folder of a site whose ClientApp ended without an answer, with the address of its SuperNode, which would
# wait for one for ever.
UNANSWERED = ".flwr/unanswered"
# Another that says that the server let a site in, with the port of its SuperNode.
ADMITTED = ".flwr/admitted"
ADDRESS = "--runtime-api-address"  # of the SuperNode, among the arguments of SuperExec and ClientApp
PORT = "--port"  # of the same, among its own
PROGRAM = "flwr-clientapp"  # the only one that a SuperExec may start; it is found in a folder of the site's
# Python's audit events of what begins a program.
BEGINNINGS = (
    *("subprocess.Popen", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile"),
    *("os.system", "pty.spawn"),
)
# What Flower would send of an exception is its text.
SILENCE = "the site's own log says why"


def problem_of_bundle(content: bytes, allowed: frozenset[str]) -> str | None:
    """What keeps a bundle from being run here; nothing of it is read before its sha256 is known to be allowed."""
    digest = hashlib.sha256(content).hexdigest()
    if digest not in allowed:
        return f"the coordinator sent code with sha256 {digest}, which neither kit nor policy allows"
    try:
        with zipfile.ZipFile(BytesIO(content)) as archive:
            if archive.getinfo(PROJECT).file_size > LARGEST_BUNDLE:
                return f"the bundle {digest} is too large"
            component = tomllib.loads(archive.read(PROJECT).decode())["tool"]["flwr"]["app"]["components"]["clientapp"]
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError, OSError, NotImplementedError, RuntimeError):
        return f"the bundle {digest} cannot be read"
    return None if component == COMPONENT else f"the bundle {digest} names other code than the installed client's"


def run_supernode(site: Path) -> None:
    """Flower's SuperNode, which reads nothing of a bundle that is not allowed, and signs whole requests.

    Raises:
        UsageError: the installed Flower lacks a name.
    """
    require(USED, REPLACED)  # also of the ClientApp, so that it is said before a site joins
    import flwr.supernode.fleet_http_connection as connection
    import flwr.supernode.start_client_internal as internal
    from flwr.supercore.constant import TaskType
    from flwr.supernode.cli.flower_supernode import flower_supernode

    from .signatures import SignedRequests

    fused = internal.get_fused_config_from_fab

    def fused_if_allowed(content: bytes, run: Any) -> Any:
        run.primary_task_type = TaskType.SERVER_APP  # of an ordinary run; others start programs that no site needs
        problem = problem_of_bundle(content, allowed_by(site))
        if problem:
            note(site, CodeRefused(reason=problem))
        return {} if problem else fused(content, run)

    def admitted() -> None:
        (site / ADMITTED).write_text(sys.argv[sys.argv.index(PORT) + 1])

    internal.get_fused_config_from_fab = fused_if_allowed
    connection.NodeAuthHttpInterceptor = partial(SignedRequests, admitted=admitted)
    flower_supernode()


def run_superexec(site: Path) -> None:
    """Flower's SuperExec, which can start nothing but our ClientApp, whatever another Flower would.

    Raises:
        UsageError: the installed Flower lacks a name.
    """
    require(USED, REPLACED)
    from flwr.supercore.cli.flower_superexec import flower_superexec

    sys.addaudithook(begin_nothing_else)
    flower_superexec()


def begin_nothing_else(event: str, given: tuple[Any, ...]) -> None:
    """A hook that looks at every program that this process is about to begin.

    Raises:
        PermissionError: it is none of ours.
    """
    other = event in BEGINNINGS and not (event == "subprocess.Popen" and given[0] == PROGRAM)
    # Processes of `multiprocessing` begin without an event of their own.
    if other or (event == "import" and str(given[0]).startswith("multiprocessing.popen_")):
        raise PermissionError(f"Flower's superexec may start nothing but {PROGRAM}: {event}")


def run_clientapp(site: Path) -> None:
    """Flower's ClientApp process around the installed app; a bundle that is not allowed is answered with a code.

    Raises:
        UsageError: the installed Flower lacks a name.
    """
    require(USED, CLIENTAPP)
    import flwr.supernode.runtime.run_clientapp as runtime
    from flwr.supercore.exit import add_exit_handler
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

    problem: str | None = "no bundle came"
    answered = False
    error, push = runtime.Error, runtime.push_message

    def look(content: bytes, **_: Any) -> None:
        nonlocal problem
        problem = problem_of_bundle(content, allowed_by(site))

    def load(**_: Any) -> Callable[..., Any]:
        return lambda *_: refuse if problem else _installed()

    def refuse(message: Any, context: Any) -> Any:
        from maskdm.federated.flower_records import asked_in, reply_to, size_in

        asked, audit = asked_in(message.content), site / AUDIT
        record_foreign(audit, size_in(message.content))
        return reply_to(message, release_outcome(Outcome.CODE_REFUSED, 1, asked.exchange if asked else 0, audit))

    def push_and_note(*given: Any) -> None:
        nonlocal answered
        push(*given)
        answered = True

    def leave() -> None:
        if not answered:
            (site / UNANSWERED).write_text(sys.argv[sys.argv.index(ADDRESS) + 1])

    runtime.install_from_fab = look
    runtime.get_load_client_app_fn = load
    runtime.Error = lambda code, reason: error(code=code, reason=SILENCE)
    runtime.push_message = push_and_note
    add_exit_handler(leave, run_before_force_exit=True)  # Flower does not wait long for the others
    try:
        flwr_clientapp()
    finally:
        leave()


def allowed_by(site: Path) -> frozenset[str]:
    """The bundles that a site lets run."""
    settings = load_settings(site)
    return frozenset({settings.bundle, *settings.policy.bundles})


def _installed() -> Any:
    from .client_app import app

    return app


PROCESSES = {"supernode": run_supernode, "superexec": run_superexec, "clientapp": run_clientapp}

if __name__ == "__main__":
    command, folder = sys.argv[1], Path(sys.argv[2])
    sys.argv = [f"flower-{command}", *sys.argv[3:]]
    try:
        PROCESSES[command](folder)
    except UsageError as error:
        print(error, file=sys.stderr)
        sys.exit(UNFIT)
