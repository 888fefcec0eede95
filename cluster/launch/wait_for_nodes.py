"""Wait until a Ray cluster has so many machines: `python cluster/launch/wait_for_nodes.py HOST:PORT COUNT SECONDS`.

Ends with 0 when they are there, and with 1 and a line that says how many are when the seconds are over. Run it on a
machine of the cluster, with its token.
"""

from __future__ import annotations

import logging
import sys
import time


def main(address: str, count: int, seconds: float) -> int:
    import ray

    deadline = time.monotonic() + seconds
    there = 0
    while time.monotonic() < deadline:
        if not ray.is_initialized():
            try:
                ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
            except ConnectionError:  # the head is not up yet
                time.sleep(1)
                continue
        there = sum(node["Alive"] for node in ray.nodes())
        if there >= count:
            print(f"{there} of {count} machines are there", flush=True)
            return 0
        time.sleep(1)
    print(
        f"wait_for_nodes: got {there} machines at {address} after {seconds:g} s, expected {count}; "
        "see the output of those that did not come",
        file=sys.stderr,
        flush=True,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
