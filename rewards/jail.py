"""Run one Python program where it can reach nothing: `rewards.sandbox` starts this file as a script of its own.

Three processes, each the other's parent. The *launcher* (this script) makes the namespaces and ends everything when
the time is up. The *init* is process 1 of the new process namespace: with it, whatever is left in there ends. The
*program* has given up every privilege before its first line runs; it sees an empty file system with the interpreter
in it, no network, no other process, no environment, and of what it is tested with only its own input.

Linux only. As root the program gets a user id that nothing else has. Otherwise it runs in a user namespace, where its
own files are out of sight rather than forbidden. What cannot be had is refused; nothing is left out.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import runpy
import signal
import struct
import sys
import time
from typing import Any

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 4096, 16384, 1 << 18, 2
MS_NOATIME, MS_NODIRATIME, MS_RELATIME, ST_RELATIME = 1024, 2048, 1 << 21, 4096
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
PR_SET_SECCOMP, SECCOMP_MODE_FILTER, SECCOMP_ERRNO, SECCOMP_ALLOW = 22, 2, 0x00050001, 0x7FFF0000
BPF_LOAD, BPF_EQUAL, BPF_AT_LEAST, BPF_RETURN = 0x20, 0x15, 0x35, 0x06
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "ppc64le": 203, "riscv64": 41}
UNCOUNTED = {
    "x86_64": (0xC000003E, (29, 64, 68, 319)),
    "aarch64": (0xC00000B7, (194, 190, 186, 279)),
    "ppc64le": (0xC0000015, (395, 393, 399, 360, 117)),
    "riscv64": (0xC00000F3, (194, 190, 186, 279)),
}
"""What the kernel calls the machine, and its calls that make memory which counts towards no limit of a process:
shmget, semget, msgget, memfd_create and, where there is one, the older ipc."""
FOREIGN_CALLS = 0x40000000
"""From here on calls are of another convention (x32)."""
NOBODY = 65534
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
MOUNT_POINT = "/proc"
"""Where the new file system is mounted before it becomes the root: a folder that every machine has, and whose contents
nothing here needs by then."""
INNER = "/inner"
"""The folder of it that the program sees as its root: whoever is not at the root of the mounts may make no user
namespace, and so get no capabilities back."""
NEW_ROOT = MOUNT_POINT + INNER
HERE = "/tmp"
"""The program's own folder, in its file system."""
AWAITED = (signal.SIGCHLD, signal.SIGTERM)
"""What the launcher waits for: that the program has ended, or that it is to be ended."""

libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """What the machine does not allow."""


def call(name: str, *args: Any) -> None:
    """A function of the C library that returns 0."""
    given = [arg.encode() if isinstance(arg, str) else arg for arg in args]
    if getattr(libc, name)(*given) != 0:
        error = ctypes.get_errno()
        shown = ", ".join(str(arg) for arg in args if arg is not None)
        raise Refused(f"{name}({shown}): {os.strerror(error)}")


def main() -> None:
    status = int(sys.argv[1])
    with os.fdopen(0, "rb", closefd=False) as asked:
        request = json.loads(asked.read())
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != request["parent"]:
        os._exit(1)
    try:
        ended = launch(request)
    except (Refused, OSError) as error:
        ended = {"refused": str(error)}
    os.write(status, json.dumps(ended).encode())
    os._exit(0)


def launch(request: dict[str, Any]) -> dict[str, Any]:
    """Run the program and say how it ended: `{"code": 0}`, negative for a signal, or `{"timeout": true}`."""
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    as_root = os.geteuid() == 0
    uid = unused_uid() if as_root else NOBODY
    enter_namespaces(as_root)
    build_root(request)
    signal.pthread_sigmask(signal.SIG_BLOCK, AWAITED)
    told, tell = os.pipe()
    init = os.fork()
    if not init:
        os.close(told)
        be_init(request, uid, as_root, tell)
    os.close(tell)
    os.close(1)
    deadline = time.monotonic() + request["time_limit"]
    cut = False
    while not cut and os.waitid(os.P_PID, init, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        news = signal.sigtimedwait(AWAITED, max(deadline - time.monotonic(), 0))
        if cut := time.monotonic() >= deadline or (news is not None and news.si_signo == signal.SIGTERM):
            os.kill(init, signal.SIGKILL)
    os.waitpid(init, 0)  # returns when every process of the namespace is gone
    said = os.read(told, 4096)
    if cut:
        return {"timeout": True}
    ended: dict[str, Any] = json.loads(said.splitlines()[0]) if said else {"refused": "process 1 was ended"}
    return ended


def unused_uid() -> int:
    """A user id of the machine's range that no account has and no other running program was given."""
    with open("/proc/self/uid_map") as file:
        ranges = [tuple(int(number) for number in line.split()) for line in file]
    first, _, count = max(ranges, key=lambda one: one[2])
    if count < 65536:
        raise Refused(f"user ids: {count} of them")
    return first + count - 2 - os.getpid() % min(count // 2, 1 << 22)


def enter_namespaces(as_root: bool) -> None:
    kinds = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    if as_root:
        call("unshare", kinds)
    else:
        uid, gid = os.geteuid(), os.getegid()
        call("unshare", kinds | CLONE_NEWUSER)
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{NOBODY} {uid} 1"),
            ("gid_map", f"{NOBODY} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    call("mount", None, "/", None, MS_REC | MS_PRIVATE, None)


def build_root(request: dict[str, Any]) -> None:
    """Become a file system of the interpreter, its libraries and an empty folder; nothing else is there to be read."""
    machine = os.uname().machine
    if machine not in PIVOT_ROOT:
        raise Refused(f"machine {machine}")
    os.umask(0o022)  # the caller may keep its files to itself; the program is somebody else
    call("mount", "none", MOUNT_POINT, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    os.makedirs(NEW_ROOT + HERE)  # before the interpreter, which may be installed below it
    size = f"size={request['disk_mb']}m,mode=1777"
    call("mount", "none", NEW_ROOT + HERE, "tmpfs", MS_NOSUID | MS_NODEV, size)
    for path in dict.fromkeys((*LIBRARIES, *DEVICES, os.path.realpath(sys.base_prefix))):
        show(path)
    os.chdir(MOUNT_POINT)
    if libc.syscall(PIVOT_ROOT[machine], b".", b".") != 0:
        raise Refused(f"pivot_root: {os.strerror(ctypes.get_errno())}")
    call("umount2", ".", MNT_DETACH)
    call("mount", None, "/", None, MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV, None)
    os.chroot(INNER)
    os.chdir(HERE)


def show(path: str) -> None:
    """Let the new root have what is there, read-only; a link stays a link."""
    if not os.path.lexists(path) or os.path.lexists(NEW_ROOT + path):
        return
    target = NEW_ROOT + path
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o600))
    call("mount", path, target, None, MS_BIND, None)
    if path not in DEVICES:
        # In a user namespace, what the mount forbids already may not be allowed again.
        flags = os.statvfs(target).f_flag
        kept = flags & (MS_NODEV | MS_NOEXEC | MS_NOATIME | MS_NODIRATIME) | MS_RELATIME * bool(flags & ST_RELATIME)
        call("mount", None, target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | kept, None)


def be_init(request: dict[str, Any], uid: int, as_root: bool, tell: int) -> None:
    """Wait for the program; when this process ends, so does everything in the namespace."""
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    program = os.fork()
    if not program:
        be_program(request, uid, as_root, tell)
    os.close(1)
    while True:
        pid, state = os.wait()
        if pid == program:
            os.write(tell, json.dumps({"code": os.waitstatus_to_exitcode(state)}).encode())
            os._exit(0)


def be_program(request: dict[str, Any], uid: int, as_root: bool, tell: int) -> None:
    """Give up all privileges and become the program; what it raises ends it with exit code 1."""
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, AWAITED)
        give_input(request["stdin"])
        give_up(request, uid, as_root)
        with open("program.py", "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(request["program"])
    except (Refused, OSError, ValueError) as error:
        os.write(tell, json.dumps({"refused": str(error)}).encode() + b"\n")
        os._exit(1)
    function = request["function"]
    request.clear()
    os.closerange(3, 1024)
    os.environ.clear()
    sys.argv[:] = ["program.py"]
    code = 1
    try:
        if function:
            run_function(function)
        else:
            runpy.run_path("program.py", run_name="__main__")
        sys.stdout.flush()
        code = 0
    except SystemExit as ended:
        sys.stdout.flush()
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        os._exit(code & 255)


def run_function(entry: dict[str, Any]) -> None:
    """Call a function of the program and write what it returned, as JSON, where its own prints do not go."""
    import ast

    answer = os.dup(1)
    os.dup2(2, 1)
    args, kwargs = ast.literal_eval(entry["args"]), ast.literal_eval(entry["kwargs"])
    function = runpy.run_path("program.py", run_name="program")[entry["name"]]
    told = json.dumps(plain(function(*args, **kwargs))).encode()
    while told:
        told = told[os.write(answer, told) :]


def plain(value: Any) -> Any:
    """A value as JSON can say it: tuples and sets as lists, sets in order."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((plain(one) for one in value), key=json.dumps)
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value


def give_input(text: str) -> None:
    """The program's standard input and, for what it complains about, nowhere."""
    source = os.memfd_create("stdin")
    data = memoryview(text.encode(errors="surrogatepass"))
    while data:
        data = data[os.write(source, data) :]
    os.lseek(source, 0, os.SEEK_SET)
    os.dup2(source, 0)
    os.dup2(os.open("/dev/null", os.O_RDWR), 2)


def give_up(request: dict[str, Any], uid: int, as_root: bool) -> None:
    """Bound what the program may take, then drop every privilege for good."""
    megabyte = 2**20
    for kind, limit in (
        (resource.RLIMIT_AS, request["memory_mb"] * megabyte),
        (resource.RLIMIT_CPU, int(request["time_limit"]) + 1),
        (resource.RLIMIT_FSIZE, request["disk_mb"] * megabyte),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        # In a user namespace the launcher and the init count too.
        (resource.RLIMIT_NPROC, request["processes"] + (0 if as_root else 2)),
    ):
        resource.setrlimit(kind, (limit, limit))
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    if as_root:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    call("capset", header, (ctypes.c_uint32 * 6)())
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    refuse_uncounted()
    # Cleared by the change of user, and set again: a launcher that is killed leaves no program.
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def refuse_uncounted() -> None:
    """Let the calls of UNCOUNTED, and all of another convention than the machine's own, fail with EPERM."""
    machine, calls = UNCOUNTED[os.uname().machine]
    tests = [(BPF_AT_LEAST, FOREIGN_CALLS), *((BPF_EQUAL, number) for number in calls)]
    steps = [(BPF_LOAD, 0, 0, 4), (BPF_EQUAL, 0, len(tests) + 2, machine), (BPF_LOAD, 0, 0, 0)]
    steps += [(code, len(tests) - place, 0, number) for place, (code, number) in enumerate(tests)]
    steps += [(BPF_RETURN, 0, 0, SECCOMP_ALLOW), (BPF_RETURN, 0, 0, SECCOMP_ERRNO)]
    rules = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HP", len(steps), ctypes.addressof(rules)))
    call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0)


if __name__ == "__main__":
    main()
