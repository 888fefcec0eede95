"""The model and data hub: asked once, briefly, whether it answers. What its cache holds works without it."""

from __future__ import annotations

import os
import sys
import threading
from functools import lru_cache

SECONDS = 3.0
"""How long the hub has for its first answer."""


@lru_cache(maxsize=1)
def why_offline() -> str | None:
    """Why the hub cannot be asked; None when it answers.

    From a hub that does not answer this process, and those it starts, take what the cache holds without asking again:
    each later request would wait and retry for many seconds.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    # In a thread, because looking a name up knows no time limit.
    problems = [f"no answer from {constants.ENDPOINT} within {SECONDS:g} s"]
    asking = threading.Thread(target=_ask, args=(constants.ENDPOINT, problems), daemon=True)
    asking.start()
    asking.join(SECONDS)
    problem = problems[-1:]
    if not problem:
        return None
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
    print(f"hub not reachable ({problem[0]}): names come from its cache on this machine", file=sys.stderr, flush=True)
    return f"the hub is not reachable ({problem[0]})"


def _ask(endpoint: str, problems: list[str]) -> None:
    """Empty `problems` when the hub answers; add what went wrong when it does not."""
    from huggingface_hub import get_session

    try:
        status = get_session().head(endpoint, timeout=SECONDS).status_code
    # A client library of the hub's choosing: whatever it raises is the reason that is shown.
    except Exception as error:
        problems.append(f"{endpoint}: {type(error).__name__}: {error}")
        return
    if status in (403, 407) or status >= 500:
        problems.append(f"{endpoint} answered {status}")
    else:
        problems.clear()


def remedy(thing: str) -> str:
    """What to do about a hub name that leads nowhere."""
    if why_offline() is None:
        return f"correct the name or its revision, log in if it is not public, or give {thing}"
    return f"set HF_HUB_OFFLINE=0 and see to the network, or give {thing}"
