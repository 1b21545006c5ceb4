"""Runs Python that nobody has read, such as a model's answer, isolated by the Linux kernel.

Namespaces of its own (user, mount, process, network, IPC, host name): no network, no other process, and a file system of the
interpreter, read-only, and an empty /tmp in memory. In it: limits on processor time, memory, files and output, no privileges,
and a filter of system calls without new processes, sockets and whatever else widens the kernel's surface. When the program ends
or its parent dies, the kernel ends everything in the namespace.

    this process → a child with the namespaces → process 1 in them, which builds the file system → the program

It needs user namespaces without privileges (Linux ≥ 5.12) and x86-64 or arm64. :func:`probe` proves the isolation.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import math
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

# linux/sched.h, linux/mount.h, linux/prctl.h, linux/seccomp.h, linux/audit.h
_NEW_NAMESPACES = 0x10000000 | 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_MNT_DETACH, _AT_FDCWD, _AT_RECURSIVE, _ATTR_RDONLY, _ATTR_NOSUID = 2, -100, 0x8000, 1, 2
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_FILTER = 1, 22, 38, 2
_RET_ALLOW, _RET_ERRNO, _RET_KILL, _CLONE_THREAD = 0x7FFF0000, 0x00050000, 0x80000000, 0x10000
_NOBODY = 65534
_ABOVE = 512
"""Descriptors from here on are this module's own."""
_MOUNT_SETATTR = 442


class _Machine(NamedTuple):
    """Numbers of one architecture: of the audit architecture, and of system calls (asm/unistd.h)."""

    audit: int
    pivot_root: int
    clone: int
    refused: tuple[int, ...]
    """fork, vfork, socket, connect, ptrace, mount, umount2, pivot_root, unshare, setns, bpf, perf_event_open, keyctl, add_key,
    request_key, userfaultfd, process_vm_readv and _writev, memfd_create, shmget; io_uring_setup and mount_setattr are the same
    everywhere."""


_X86_64 = (57, 58, 41, 42, 101, 165, 166, 155, 272, 308, 321, 298, 250, 248, 249, 323, 310, 311, 319, 29)
_ARM64 = (198, 203, 117, 40, 39, 41, 97, 268, 280, 241, 219, 217, 218, 282, 270, 271, 279, 194)
_MACHINES = {
    "x86_64": _Machine(0xC000003E, 155, 56, _X86_64),
    "aarch64": _Machine(0xC00000B7, 41, 220, _ARM64),
}
_REFUSED_EVERYWHERE = (425, _MOUNT_SETATTR)
_CLONE3 = 435


class Limits(NamedTuple):
    """``cpu_seconds`` are rounded up to whole ones. Bytes: of address space, of one file or the output, of all of /tmp."""

    cpu_seconds: float
    memory_bytes: int
    file_bytes: int = 1 << 24
    disk_bytes: int = 1 << 26


class Outcome(NamedTuple):
    """``status``: the program's exit code, or −n if signal n ended it; None if it was lost. ``output``: what it printed."""

    status: int | None
    output: bytes


class IsolationError(OSError):
    """This machine cannot isolate a program."""


def run(source: str, stdin: bytes, limits: Limits, beside: bytes = b"") -> Outcome:
    """Run ``source`` with ``stdin`` by this interpreter and its standard library. ``beside`` can be read from descriptor 3.

    There is no limit on time that passes: kill this process, and everything ends.

    Raises:
        IsolationError: something of the isolation could not be set up; the program has not been started.
    """
    files = [_memory_file(content) for content in (stdin, b"", beside)]
    report, lower = os.pipe()
    write_report = fcntl.fcntl(lower, fcntl.F_DUPFD_CLOEXEC, _ABOVE)
    os.close(lower)
    try:
        child = os.fork()
        if not child:
            _guarded(write_report, lambda: _enter(source, files, write_report, limits))
        os.close(write_report)
        with os.fdopen(report, "rb") as lines:
            told = lines.read()
        os.waitpid(child, 0)
        os.lseek(files[1], 0, os.SEEK_SET)
        output = os.read(files[1], limits.file_bytes)
    finally:
        for file in files:
            os.close(file)
    result = json.loads(told.splitlines()[0]) if told else {"status": None}
    if "problem" in result:
        raise IsolationError(result["problem"])
    return Outcome(result["status"], output)


_PROBE = """
import os, socket
found = []
def attempt(what, action):
    try: action()
    except OSError: return
    found.append(what)
attempt("opens a socket", lambda: socket.socket())
attempt("starts a process", lambda: os.fork() or os._exit(0))
attempt("writes outside of /tmp", lambda: open("/written", "w"))
attempt("reads a file of this machine", lambda: open({secret!r}))
attempt("sees processes", lambda: os.listdir("/proc"))
open("/tmp/written", "w").close()
print(" and ".join(found) or "isolated")
"""


def probe(limits: Limits) -> None:
    """Run a program that tries to get out.

    Raises:
        IsolationError: with what it achieved, or why it could not even be started.
    """
    status, output = run(_PROBE.format(secret=os.path.abspath(__file__)), b"", limits._replace(cpu_seconds=60.0))
    if (status, output) != (0, b"isolated\n"):
        raise IsolationError(output.decode(errors="replace").strip() or f"a first program ended with {status}")


def _memory_file(content: bytes) -> int:
    file = os.memfd_create("sandbox")
    os.set_inheritable(file, True)
    os.write(file, content)
    os.lseek(file, 0, os.SEEK_SET)
    return file


def _guarded(report: int, action: Callable[[], NoReturn]) -> NoReturn:
    """``action``, in a process of its own; tells the parent if it fails."""
    try:
        action()
    except BaseException as error:
        os.write(report, json.dumps({"problem": f"{error}"}).encode() + b"\n")
    finally:
        os._exit(1)


def _enter(source: str, files: Sequence[int], report: int, limits: Limits) -> NoReturn:
    """In the child: namespaces, then process 1 in them."""
    _die_with_parent()
    user, group = os.getuid(), os.getgid()
    _check(_libc().unshare(_NEW_NAMESPACES), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{_NOBODY} {user} 1"), ("gid_map", f"{_NOBODY} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    first = os.fork()
    if not first:
        _guarded(report, lambda: _supervise(source, files, report, limits))
    os.close(report)
    os.waitpid(first, 0)
    os._exit(0)


def _supervise(source: str, files: Sequence[int], report: int, limits: Limits) -> NoReturn:
    """In process 1: the file system, then the program. When this process ends, the kernel ends all others in the namespace."""
    _die_with_parent()
    interpreter = _build_root(limits)
    program = os.fork()
    if not program:
        _guarded(report, lambda: _become(source, files, limits, interpreter))
    status = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    os.write(report, json.dumps({"status": status}).encode() + b"\n")
    os._exit(0)


def _build_root(limits: Limits) -> str:
    """A root that holds the interpreter, read-only, and an empty /tmp; the old one is gone. Returns the interpreter's path."""
    interpreter = os.path.realpath(sys.executable)
    needed = ["/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/dev/null", "/dev/urandom", sys.base_prefix]
    root = "/sys"  # exists everywhere, and nothing that is needed lies there
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID, "size=1m,mode=755")
    for path in needed:
        if os.path.islink(path):
            os.symlink(os.readlink(path), root + path)
        elif os.path.exists(path) and not any(path.startswith(f"{other}/") for other in ("/usr", "/lib")):
            if os.path.isdir(path):
                os.makedirs(root + path, exist_ok=True)
            else:
                os.makedirs(os.path.dirname(root + path), exist_ok=True)
                os.close(os.open(root + path, os.O_CREAT))
            _mount(path, root + path, None, _MS_BIND | _MS_REC)
    os.makedirs(f"{root}/tmp", exist_ok=True)
    attributes = struct.pack("QQQQ", _ATTR_RDONLY | _ATTR_NOSUID, 0, 0, 0)
    number = _libc().syscall(_MOUNT_SETATTR, _AT_FDCWD, root.encode(), _AT_RECURSIVE, attributes, len(attributes))
    _check(number, "mount_setattr")
    _mount("tmpfs", f"{root}/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={limits.disk_bytes},nr_inodes=4096,mode=1777")
    os.chdir(root)
    _check(_libc().syscall(_machine().pivot_root, b".", b"."), "pivot_root")
    _check(_libc().umount2(b".", _MNT_DETACH), "umount2")
    os.chdir("/tmp")
    return interpreter


def _become(source: str, files: Sequence[int], limits: Limits, interpreter: str) -> NoReturn:
    """In the last child: descriptors, limits, no privileges, no dangerous system calls; then the program."""
    null = os.open("/dev/null", os.O_WRONLY)
    kept = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, _ABOVE) for file in (files[0], files[1], null, files[2])]
    for index, file in enumerate(kept):
        os.dup2(file, index)
    os.closerange(len(kept), _ABOVE)  # this module's own close when the program starts
    os.closerange(max(kept) + 1, 1 << 16)
    seconds = math.ceil(limits.cpu_seconds)
    for kind, value, most in (
        (resource.RLIMIT_CPU, seconds, seconds + 1),
        (resource.RLIMIT_AS, limits.memory_bytes, limits.memory_bytes),
        (resource.RLIMIT_FSIZE, limits.file_bytes, limits.file_bytes),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        resource.setrlimit(kind, (value, most))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    _check(_libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    _filter_calls()
    words = [interpreter, "-S", "-s", "-P", "-B", "-c", source]
    environment = {"HOME": "/tmp", "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
    os.execve(interpreter, words, environment | {"LD_LIBRARY_PATH": f"{sys.base_prefix}/lib"})


def _filter_calls() -> None:
    """Refuse system calls for this process for good (seccomp, classic BPF)."""
    machine = _machine()
    load, equal, at_least, any_bit, end = 0x20, 0x15, 0x35, 0x45, 0x06
    refused = (*machine.refused, *_REFUSED_EVERYWHERE)
    steps = [(load, 0, 0, 4), (equal, 1, 0, machine.audit), (end, 0, 0, _RET_KILL), (load, 0, 0, 0)]
    steps += [(at_least, 0, 1, 0x40000000), (end, 0, 0, _RET_KILL)]  # the x32 calls of x86-64
    for number in refused:
        steps += [(equal, 0, 1, number), (end, 0, 0, _RET_ERRNO | 1)]  # EPERM
    steps += [(equal, 0, 1, _CLONE3), (end, 0, 0, _RET_ERRNO | 38)]  # ENOSYS: the C library then calls clone
    steps += [(equal, 0, 3, machine.clone), (load, 0, 0, 16), (any_bit, 1, 0, _CLONE_THREAD), (end, 0, 0, _RET_ERRNO | 1)]
    steps += [(end, 0, 0, _RET_ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(code))
    _check(_libc().prctl(_PR_SET_SECCOMP, _SECCOMP_FILTER, ctypes.c_char_p(program), 0, 0), "seccomp")


def _machine() -> _Machine:
    if platform.machine() not in _MACHINES:
        raise OSError(f"the system calls of {platform.machine()} are not known here")
    return _MACHINES[platform.machine()]


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    words = [word.encode() if word is not None else None for word in (source, target, kind)]
    _check(_libc().mount(*words, ctypes.c_ulong(flags), options.encode()), f"mount {target}")


def _die_with_parent() -> None:
    _check(_libc().prctl(_PR_SET_PDEATHSIG, signal.SIGKILL), "prctl")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result:
        raise OSError(f"{what}: {os.strerror(ctypes.get_errno())}")
