"""The process that does a site's work: it outlives every connection, and takes up after a crash what it had begun."""

import sys
import time
from pathlib import Path

from maskdm.parcel import Outcome
from maskdm_client.fine_tuning import Superseded
from maskdm_client.gate import release_again
from maskdm_client.mailbox import POLL_SECONDS, Mailbox
from maskdm_client.received import key_of
from maskdm_client.site import answer


def work(folder: Path) -> None:
    """Answer the requests in the mailbox of a site's folder, for ever; the newest counts, older work is dropped."""
    box = Mailbox(folder)
    while True:
        asked = box.asked()
        replied = box.replied()
        if asked is None or (replied and replied[0] == asked):
            time.sleep(POLL_SECONDS)
            continue
        request = box.request()
        assert request is not None
        key = key_of(request.document, request.weights)
        if key and replied and replied[1] == key:  # the same work under another number: the reply was lost on its way
            parcel = release_again(box.take_reply()[1], request.exchange, folder / "audit.jsonl")
        else:
            try:
                parcel = answer(request.document, request.weights, folder, box, request.exchange)
            except Superseded:
                continue
        # Only what was done well is worth sending again; a failure may have passed when the work is asked for again.
        box.reply(request.exchange, key if parcel.scalars["outcome"] == Outcome.DONE else "", parcel)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
