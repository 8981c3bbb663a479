"""What the coordinator remembers of each client: who answers, who fails, who rests."""

from collections.abc import Iterable, Mapping

import torch

from maskdm.config import Frozen
from maskdm.seeding import generator

FAILURES_BEFORE_REST = 2  # in a row
LONGEST_REST = 16  # rounds


class Standing(Frozen):
    """Of one client."""

    replies: int = 0
    failures: int = 0  # in a row
    rests_until: int = 0  # the first round in which it is asked again
    declared: int | None = None  # images it said to have in its first good reply

    def answered(self, examples: int) -> "Standing":
        """After a good reply."""
        declared = examples if self.declared is None else self.declared
        return Standing(replies=self.replies + 1, declared=declared)

    def failed(self, round_number: int) -> "Standing":
        """After a bad reply, or none: from the second in a row on it rests 1 round, then 2, 4, … rounds."""
        failures = self.failures + 1
        rest = min(LONGEST_REST, 2 ** max(0, failures - FAILURES_BEFORE_REST)) if failures > 1 else 0
        rests_until = round_number + 1 + rest if rest else 0
        return self.model_copy(update={"failures": failures, "rests_until": rests_until})


def choose(
    sites: Iterable[int],
    standings: Mapping[int, Standing],
    round_number: int,
    *,
    needed: int,
    at_most: int | None,
    seed: int,
    attempt: int = 1,
) -> list[int]:
    """Who is asked in a round: all that do not rest, or a random sample of them; the resting where it takes them,
    first those whose rest is over soonest.

    Args:
        attempt: at this round; another one draws another sample.
    """
    until = {site: standings.get(site, Standing()).rests_until for site in sorted(sites)}
    awake = [site for site in until if until[site] <= round_number]
    if len(awake) < needed:
        resting = sorted((site for site in until if until[site] > round_number), key=until.__getitem__)
        awake += resting[: needed - len(awake)]
    if at_most is None or len(awake) <= at_most:
        return sorted(awake)
    order = torch.randperm(len(awake), generator=generator("clients", seed, round_number, attempt))
    return sorted(awake[place] for place in order[:at_most].tolist())
