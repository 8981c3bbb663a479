"""What tells a site that it was let in: a signed request for work that the server answered, whatever Flower prints."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, RegisterNodeFleetRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.supercore.primitives.asymmetric import generate_key_pairs

from maskdm_client.flower.signatures import SignedRequests


def signing(admitted: Callable[[], None]) -> SignedRequests:
    private, public = generate_key_pairs()
    return SignedRequests(private, public, admitted)


def answered(signed: SignedRequests, message: Any, status: int) -> None:
    context = SimpleNamespace(request=httpx.Request("POST", "https://a", content=b""), message=message)
    response = httpx.Response(status)
    assert signed.intercept(context, lambda _: response) is response


def told(*answers: tuple[Any, int]) -> list[int]:
    """After how many of the answered requests a site was told that it is let in."""
    found, counted = list[int](), list[Any]()
    signed = signing(lambda: found.append(len(counted)))
    for message, status in answers:
        counted.append(message)
        answered(signed, message, status)
    return found


def test_the_first_answer_to_a_request_for_work_tells_it_and_no_later_one() -> None:
    assert told((PullMessagesRequest(), 401), (PullMessagesRequest(), 200), (PullMessagesRequest(), 200)) == [2]


@pytest.mark.parametrize("message", [RegisterNodeFleetRequest(), ActivateNodeRequest(), SendNodeHeartbeatRequest()])
def test_no_other_answer_tells_it(message: Any) -> None:
    """Anything that answers may say yes to those; Flower's node asks for work once it has a number."""
    assert told((message, 200)) == []


@pytest.mark.parametrize("status", [302, 401, 403, 404, 500, 503])
def test_a_refusal_does_not_tell_it(status: int) -> None:
    assert told((PullMessagesRequest(), status)) == []


def test_what_cannot_be_written_down_is_tried_again_and_disturbs_no_request() -> None:
    tries: list[int] = []

    def full() -> None:
        tries.append(len(tries))
        if len(tries) < 2:
            raise OSError("no space left")

    signed = signing(full)
    for _ in range(3):
        answered(signed, PullMessagesRequest(), 200)
    assert tries == [0, 1]
