"""What a kit's policy has that the defaults have not, and whether the site changed it: the kit's signature leaves it to
the site, so nobody else would notice who did."""

from typing import Any

from maskdm.federated.kit import POLICY, OpenedKit
from maskdm.federated.policy import SitePolicy
from maskdm.run.reporting import say


def warn_of_change(opened: OpenedKit, terms: SitePolicy) -> None:
    """Say which keys of the policy differ from the defaults, also of one that the coordinator made so."""
    usual = SitePolicy(approve_first_round=True)
    differing = [name for name in SitePolicy.model_fields if getattr(terms, name) != getattr(usual, name)]
    found = "; ".join(f"{name.replace('_', '-')} = {_shown(getattr(terms, name))}" for name in differing)
    if not opened.policy_is_as_made:
        say(
            f"WARNING: {POLICY} was changed since {opened.kit.name}'s kit was made. It differs from the defaults in: "
            f"{found or 'nothing'}. If nobody at this site changed it, stop now and ask the coordinator for a new kit"
        )
    elif found:
        say(f"{POLICY}, as the coordinator made it, differs from the defaults in: {found}")


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(str(part) for part in value)}]"
    return str(value).lower() if isinstance(value, bool) else "not given" if value is None else str(value)
