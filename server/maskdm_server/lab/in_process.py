"""A federation in one process: the same rounds and the same client code, one client after another, no network.

For tests, for hundreds of virtual clients on one machine, and, with Flower's Ray runtime around it, for several at a
time. The client's code is found by its entry point: server and client never import each other.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from maskdm.federated.parcel import Parcel
from maskdm.federated.virtual import folder_of, virtual_site
from maskdm.run.events import EVENTS, Event
from maskdm.run.interruption import Interruption
from maskdm.run.runfolder import LineReader
from maskdm.seeding import derive_seed

from ..federation.events import known, tell
from ..federation.folder import SAMPLES, begin, conclude
from ..federation.round_pictures import RoundPictures
from ..federation.rounds import run_federation
from ..federation.settings import FederationConfig
from ..federation.transport import Question, Reply

Answer = Callable[[str, bytes, Path], Parcel]


class InlineLink:
    """Sites are folders; each works when its reply is wanted, so that one reply is in memory at a time."""

    may_lose = False

    def __init__(self, folders: Sequence[Path], answer: Answer, check: Callable[[], None] = lambda: None) -> None:
        self._folders, self._answer, self._check = folders, answer, check
        self._asked: list[tuple[int, Question]] = []

    def sites(self) -> list[int]:
        return list(range(1, len(self._folders) + 1))

    def name(self, site: int) -> str:
        return str(site)

    def ask(self, sites: Sequence[int], question: Question, seconds: float) -> None:
        self._asked += [(site, question) for site in sites]

    def receive(self) -> Iterator[Reply]:
        asked, self._asked = self._asked, []
        for site, question in asked:
            self._check()
            assert question.weights is not None
            parcel = self._answer(question.document, question.weights.read_bytes(), self._folders[site - 1])
            yield Reply(site, parcel, question=question)

    def carried(self) -> Mapping[int, int]:
        return {}


def prepare_folders(data: Sequence[Path], sites: Path, settings: Mapping[str, Any]) -> list[Path]:
    """The folder of each virtual site, below that of all of them.

    Args:
        settings: of all of them, with their `seed`.
    """
    folders = []
    for number, path in enumerate(data, start=1):
        own = {"data": path.absolute(), "secret_seed": derive_seed("simulated site", settings["seed"], number)}
        folders.append(folder_of(sites, number))
        virtual_site().prepare(folders[-1], {"threads": 1, **own, **settings})
    return folders


def simulate_inline(
    prior: Path,
    out: Path,
    config: FederationConfig,
    prepare_sites: Callable[[], list[Path]],
    simulation: Mapping[str, Any],
    *,
    ray: bool = False,
) -> Path:
    """Run the federation in this process, or under Flower's Ray runtime, and return the path of the final model."""
    if begin(prior, out, config, simulation):
        return conclude(out, config)
    folders = prepare_sites()
    events = LineReader(out / EVENTS)
    with RoundPictures(out, config, SAMPLES) as pictures, Interruption() as interruption:

        def hear(event: Event) -> None:
            tell(event)
            pictures.hear(event)

        def check() -> None:
            interruption.check()
            for event in known(events.new()):
                hear(event)

        if ray:
            from ..flower.simulation import simulate_ray

            simulate_ray(out, len(folders), interruption.check, hear)
        else:
            run_federation(
                InlineLink(folders, virtual_site().answer, check), out, config, pause=lambda seconds: check()
            )
            check()
    return conclude(out, config)
