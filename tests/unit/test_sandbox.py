"""Programs that a model may write, the worst among them: contained, told apart, and worth nothing."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from rewards.base import check_settings, load_function
from rewards.sandbox import (
    Limits,
    SandboxError,
    check_sandbox,
    last_program,
    passes_tests,
    read_test,
    run_program,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
QUICK = Limits(time_limit=20.0)
ROOT = Path(__file__).resolve().parents[2]


def children() -> set[int]:
    """Everything that descends from this process."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


@pytest.fixture(autouse=True)
def _nothing_is_left():
    before = children()
    yield
    assert children() - before == set()


def said(program: str, limits: Limits = QUICK, **given) -> str:
    outcome = run_program(program, limits=limits, **given)
    assert outcome.kind == "done", outcome
    return outcome.stdout.strip()


def test_a_program_runs_as_it_would_outside():
    program = "import json, sys\nprint(json.dumps([len(line) for line in sys.stdin]), input.__name__, 'é')"
    assert said(program, stdin="one\nthree\n") == "[4, 6] input é"
    assert said("import collections, decimal, random, re\nprint(decimal.Decimal('0.1') + 1)") == "1.1"
    assert said("print(list({'a', 'b', 'c', 'd'}))") == said("print(list({'a', 'b', 'c', 'd'}))")
    assert said("import sys\nprint(input())\nsys.exit(0)", stdin="x") == "x"
    outcome = run_program("import sys\nprint('half')\nsys.exit(3)", limits=QUICK)
    assert (outcome.kind, outcome.stdout, outcome.detail) == ("failed", "half\n", "exit code 3")
    assert run_program("1 / 0", limits=QUICK).kind == "failed"
    assert run_program("def", limits=QUICK).kind == "failed"


def test_no_file_of_the_machine_is_there():
    outside = "import os\nfor path in {paths!r}:\n    try:\n        print(open(path).read())\n"
    outside += "    except OSError as error:\n        print(type(error).__name__)"
    home = Path.home()
    secret = Path(tempfile.mkdtemp()) / "canary"
    secret.write_text("canary")
    secret.chmod(0o644)
    paths = [str(secret), "/etc/shadow", "/etc/passwd", str(home / ".ray" / "auth_token"), str(home / ".bashrc")]
    try:
        shown = said(outside.format(paths=[*paths, str(ROOT / "README.md"), "/proc/1/environ", "/proc/self/maps"]))
    finally:
        shutil.rmtree(secret.parent)
    assert set(shown.split()) == {"FileNotFoundError"}
    writing = outside.replace("open(path).read()", "open(path, 'w').write('x')")
    library = f"{os.path.realpath(sys.base_prefix)}/lib/python{sys.version_info[0]}.{sys.version_info[1]}/os.py"
    assert set(said(writing.format(paths=["/etc/cron", "/lib/x", library, "/x"])).split()) <= {
        "FileNotFoundError",
        "PermissionError",
        "OSError",
    }
    assert said("import os\nopen('own', 'w').write('12')\nprint(os.getcwd(), open('own').read())") == "/tmp 12"


def test_no_privilege_and_no_environment(monkeypatch):
    monkeypatch.setenv("CANARY", "secret")
    program = """
import os, ctypes
libc = ctypes.CDLL(None, use_errno=True)
print(dict(os.environ), os.getenv('CANARY'), 0 in (os.getuid(), os.geteuid(), os.getgid()), os.getgroups())
try:
    os.setuid(0)
    print('root')
except OSError as error:
    print(error.errno)
print(libc.mount(b'none', b'/tmp', b'tmpfs', 0, None), libc.chroot(b'/tmp'), libc.sethostname(b'x', 1))
"""
    first, second, third = said(program).splitlines()
    groups = "[]" if os.geteuid() == 0 else first[first.index("[") :]
    assert first == f"{{}} None False {groups}"
    assert (second, third) == ("1", "-1 -1 -1")


BEYOND = """
import ctypes, os
libc = ctypes.CDLL(None)
print(libc.unshare(0x10000000), libc.shmget(0, 4096, 0o1600), libc.msgget(0, 0o1600), libc.semget(0, 1, 0o1600))
try:
    os.memfd_create("x")
except OSError as error:
    print(error.errno)
"""


def test_no_capability_comes_back_and_no_memory_is_out_of_count():
    assert said(BEYOND).split() == ["-1", "-1", "-1", "-1", "1"]


def test_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = (
            "import socket\nfor where in (('127.0.0.1', {port}), ('192.0.2.1', 80)):\n    try:\n"
            "        socket.create_connection(where, timeout=2)\n        print('open')\n"
            "    except OSError as error:\n        print(error.errno)"
        )
        shown = said(program.format(port=port)).split()
        socket.create_connection(("127.0.0.1", port)).close()  # it is there
    assert shown == ["101", "101"]


@pytest.mark.parametrize(
    ("program", "kind", "detail"),
    [
        ("while True: pass", "timeout", "out of time"),
        ("import time\ntime.sleep(60)", "timeout", "out of time"),
        ("import os, time\nos.fork()\nos.setsid() if os.getpid() > 2 else 0\ntime.sleep(60)", "timeout", ""),
        ("import os, time\nos.close(1)\ntime.sleep(60)", "timeout", ""),
        ("import signal, time\nsignal.pthread_sigmask(0, range(1, 65))\ntime.sleep(60)", "timeout", ""),
        ("x = bytearray(10 * 2**30)", "failed", "exit code 1"),
        ("x = []\nwhile True: x.append(' ' * 2**20)", "failed", "exit code 1"),
        ("import os\nos._exit(7)", "failed", "exit code 7"),
        ("import os\nos.abort()", "crash", "SIGABRT"),
        ("import ctypes\nctypes.string_at(0)", "crash", "SIGSEGV"),
        ("import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()", None, ""),
        ("while True: print('x' * 10000)", "output", "more than"),
        ("import os\nwhile True: os.write(1, b'x' * 4096)", "output", "more than"),
        ("f = open('f', 'wb')\nwhile True: f.write(b'0' * 2**20)", None, ""),
    ],
)
def test_what_takes_too_much_ends_and_is_named(program, kind, detail):
    began = time.monotonic()
    outcome = run_program(program, limits=Limits(time_limit=1.5))
    assert outcome.kind in ({kind} if kind else {"failed", "crash", "timeout"})
    assert detail in outcome.detail
    assert time.monotonic() - began < 15


def test_a_fork_bomb_has_few_processes():
    bomb = """
import os, time
count = 0
for _ in range(100):
    try:
        if not os.fork():
            time.sleep(30)
    except OSError as error:
        print(count, error.errno)
        break
    count += 1
"""
    assert said(bomb, Limits(time_limit=20.0, processes=5)) == "4 11"
    endless = run_program(
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", limits=Limits(time_limit=1)
    )
    assert endless.kind == "timeout"


def test_no_process_of_the_machine_can_be_reached():
    program = f"""
import os, signal
print(os.getpid(), os.getppid())
for pid in (1, os.getppid(), {os.getpid()}, {os.getppid()}):
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        pass
print('alive')
"""
    assert said(program) == "2 1\nalive"
    assert run_program("import os\nos.kill(-1, 9)\nos.kill(2, 9)", limits=QUICK).kind in ("crash", "failed", "done")


def test_a_program_that_clears_its_death_signal_ends_with_its_launcher():
    """The launcher is killed, not asked: nothing of the namespace outlives it."""
    program = "import ctypes, time\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\nprint('up', flush=True)\ntime.sleep(600)"
    code = f"from rewards.sandbox import *\nimport sys\nrun_program({program!r}, limits=Limits(time_limit=600.0))\n"
    before = children()
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(family := children() - before) < 4:  # the caller, the launcher, the init, the program
        assert time.monotonic() < deadline
        time.sleep(0.01)
    caller.kill()
    caller.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in family):
        assert time.monotonic() < deadline
        time.sleep(0.01)


ADD = "Sure:\n```python\n{}\n```\nDone."
TESTS = ["assert add(1, 2) == 3", {"function": "add", "args": [[1], [2]], "returns": [1, 2]}]


def score(program: str, tests: list | None = None, **settings) -> float | None:
    settings = {"time_limit": 10.0, **settings}
    (number,) = passes_tests(["p"], [ADD.format(program)], tests=[TESTS if tests is None else tests], **settings)
    return number


def test_right_and_wrong_programs():
    assert score("def add(a, b):\n    print('noise')\n    return a + b") == 1.0
    assert score("def add(a, b):\n    return 3") == 0.0
    assert score("def add(a, b):\n    return 3", partial=True) == 0.5
    assert score("def sub(a, b):\n    return 3") == 0.0
    assert score("def add(a, b):\n    return a + b", tests=[]) is None
    echo = [{"stdin": "2\n3\n", "stdout": "5"}, {"stdout": "0\n", "stdin": "0\n0\n"}]
    assert score("print(int(input()) + int(input()), ' ')", echo) == 1.0
    assert score("print(5)", echo) == 0.0
    assert passes_tests(["p"], ["no program"], tests=[TESTS]) == [0.0]
    assert score("def f(x): return {2, 1}, x", ["assert f((1.0, None)) == ({1, 2}, (1.0, None))"]) == 1.0
    assert score("def f(): return 0.1 + 0.2", ["assert f() == 0.3"]) == 1.0
    assert score("def f(): return True", ["assert f() == 1"]) == 0.0
    assert score("def f(): return '1'", ["assert f() == 1"]) == 0.0


@pytest.mark.parametrize(
    "program",
    [
        # Objects that are equal to everything, and whatever else speaks for itself.
        "class Any(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n"
        "def add(a, b): return Any(0)",
        "class Any(list):\n    def __eq__(self, other): return True\ndef add(a, b): return Any()",
        "import json\njson.dumps = lambda *a, **k: 'true'\ndef add(a, b): return 0",
        "import os\nos.write(1, b'true')\nos.write(3, b'null')\nos._exit(0)",
        "import os\nfor fd in range(64):\n    try: os.write(fd, b'{\"code\": 0}')\n"
        "    except OSError: pass\nos._exit(0)",
        "import sys\nsys.exit(0)",
        "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\ndef add(a, b): return 0",
        # Look for what is expected: among all objects, in the callers' variables, in the interpreter's arguments.
        "import gc, sys\n"
        "def add(a, b):\n"
        "    texts = [o for o in gc.get_objects() if isinstance(o, (dict, list, tuple))]\n"
        "    frame, seen = sys._getframe(), []\n"
        "    while frame:\n        seen.append(str(frame.f_locals))\n        frame = frame.f_back\n"
        "    found = [o for o in texts if isinstance(o, dict) and 'returns' in o]\n"
        "    if found or 'returns' in ' '.join(seen): return found[0]['returns']\n"
        "    return 0",
        "def add(a, b): return [[]] * 10**6",
        "def add(a, b):\n    x = []\n    for _ in range(10**5): x = [x]\n    return x",
    ],
)
def test_no_program_speaks_for_itself(program):
    assert score(program, partial=True) == 0.0


def test_a_number_beyond_floats_is_compared():
    tests = [{"function": "f", "args": [], "returns": 10**400}]
    assert score("def f(): return 1.0", tests) == 0.0
    assert score("def f(): return 10**400", tests) == 1.0


def test_tests_of_another_form_are_refused():
    for bad in (
        3,
        {},
        {"stdin": "x"},
        {"function": "f"},
        "f(1) == 2",
        "assert f(x) == 2",
        "assert f(1) == g(2)",
        "x =",
        "assert f(1) == 1j",
        "assert f(1) == b'x'",
        "assert f(1) == ...",
        "assert f(**{'a': 1}) == 2",
        {"function": "f", "args": [float("nan")], "returns": 1},
        {"function": "f", "args": [], "returns": float("inf")},
        {"function": "f", "args": 5, "returns": 1},
        {"function": "f", "args": "ab", "returns": 1},
        {"function": 5, "returns": 1},
    ):
        with pytest.raises(ValueError, match=r"tests: got .* expected stdin and stdout, or function, args"):
            read_test(bad)
    assert read_test("assert f([1], k=2) == (3, {4})").returns == (3, {4})


def test_the_last_closed_block_counts():
    assert last_program("a\n```python\nx\n```\nb\n```\ny\nz\n```\n```python\nhalf") == "y\nz\n"
    assert last_program("```python\r\nx = '\u2028\f\x85'\r\n```") == "x = '\u2028\f\x85'\n"
    assert last_program("no block") is None
    assert last_program("```python\nx") is None


def test_settings_and_the_machine_are_checked_before_a_run():
    function = load_function("sandbox:passes_tests")
    check_settings("sandbox:passes_tests", function, {"time_limit": 2, "partial": True})
    with pytest.raises(ValueError, match=r"got memory_mb: '1' as a setting of sandbox:passes_tests, expected int"):
        check_settings("sandbox:passes_tests", function, {"memory_mb": "1"})
    with pytest.raises(ValueError, match=r"sandbox: got time_limit 0, .* expected more than 0 seconds"):
        check_settings("sandbox:passes_tests", function, {"time_limit": 0.0})


@pytest.mark.skipif(os.geteuid() != 0, reason="takes a privilege of root's away")
def test_a_machine_without_namespaces_is_refused_and_runs_nothing():
    code = (
        "import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.prctl(24, 21, 0, 0, 0) == 0\n"  # CAP_SYS_ADMIN
        "import os, sys, subprocess\n"
        "sys.exit(subprocess.run([sys.executable, '-c', sys.argv[1]]).returncode)\n"
    )
    inner = (
        "from rewards.sandbox import *\n"
        "for call in (check_sandbox, lambda: run_program('print(1)')):\n"
        "    try:\n        call()\n        print('RAN')\n"
        "    except Exception as error:\n        print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, inner], cwd=ROOT, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first.startswith("ValueError sandbox: got unshare(")
    assert "expected namespaces of its own for a program; run on Linux as root" in first
    assert second.startswith("SandboxError unshare(")


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user's path is all that the other tests take then")
def test_an_ordinary_user_has_the_same_sandbox(tmp_path):
    """The same questions to the second way in: by a user namespace instead of another user."""
    folder = Path(tempfile.mkdtemp())
    shutil.copytree(ROOT / "rewards", folder / "rewards", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "ask.py").write_text(
        "from rewards.sandbox import *\nimport os\ncheck_sandbox()\nquick = Limits(time_limit=20.0, processes=5)\n"
        "print(os.getuid())\n"
        'look = \'import os\\nprint(os.getuid(), os.listdir("/"), os.path.exists("/home"))\'\n'
        "print(run_program(look, limits=quick))\n"
        "bomb = 'import os, time\\nn = 0\\nwhile True:\\n  try:\\n    if not os.fork(): time.sleep(30)\\n'\n"
        "bomb += '  except OSError: break\\n  n += 1\\nprint(n)'\n"
        "print(run_program(bomb, limits=quick).stdout)\n"
        "own = 'import ctypes\\nlibc = ctypes.CDLL(None)\\n'\n"
        'own += \'print(libc.mount(b"none", b"/tmp", b"tmpfs", 0, None), libc.umount2(b"/lib", 2))\'\n'
        "print(run_program(own, limits=quick).stdout)\n"
        f"print(*run_program({BEYOND!r}, limits=quick).stdout.split())\n"
        "print(run_program('while True: pass', limits=Limits(time_limit=1.0)).kind)\n"
        "print(run_program('import os\\nos.kill(1, 9)\\nprint(os.getppid())', limits=quick).stdout)\n"
        "print(passes_tests(['p'], ['```\\ndef f(x): return x\\n```'], tests=[['assert f(1) == 1']]))\n"
    )
    subprocess.run(["chmod", "-R", "a+rX", str(folder)], check=True)
    python = f"/mnt/bin/{Path(os.path.realpath(sys.executable)).name}"
    script = (
        f"mount --bind {os.path.realpath(sys.base_prefix)} /mnt && cd {folder} && "
        f"PYTHONPATH={folder} exec setpriv --reuid 12345 --regid 12345 --clear-groups {python} -B ask.py"
    )
    try:
        done = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, check=False)
    finally:
        shutil.rmtree(folder)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line]
    assert lines[0] == "12345"
    assert lines[1].startswith("Outcome(kind='done', stdout=\"65534 [")
    assert lines[1].count("False") == 1
    assert lines[2:] == ["4", "-1 -1", "-1 -1 -1 -1 1", "timeout", "1", "[1.0]"]


def test_twenty_programs_that_hang_leave_nothing():
    before = children()
    for _ in range(20):
        assert run_program("import os\nos.fork()\nwhile True: pass", limits=Limits(time_limit=0.2)).kind == "timeout"
    assert children() == before


def test_a_caller_that_keeps_its_files_to_itself_has_a_sandbox():
    before = os.umask(0o077)
    try:
        check_sandbox()
    finally:
        os.umask(before)


def test_a_sandbox_that_fails_says_nothing_of_the_answer():
    with pytest.raises(SandboxError):
        run_program("print(1)", limits=Limits(disk_mb=-1))
    check_sandbox()
