"""A Ray of one's own is nobody else's: no process of it listens beyond this machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

LISTENERS = """
import psutil, ray
from actors.launch import connect

assert connect()

@ray.remote
class Holder:
    def pid(self):
        return psutil.Process().pid

holders = [Holder.options(num_cpus=0.1).remote() for _ in range(2)]
ray.get([holder.pid.remote() for holder in holders])
tree = [psutil.Process(), *psutil.Process().children(recursive=True)]
found = [c.laddr.ip for p in tree for c in p.net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN]
assert len(found) >= 4, found
print(*sorted(set(found)))
"""


def test_a_private_ray_listens_on_loopback_alone(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = subprocess.run([sys.executable, "-c", LISTENERS], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(done.stdout.split()) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
