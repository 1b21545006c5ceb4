"""Programs under test: right, wrong, hostile. Each runs in a real sandbox, through the pool that training uses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from grader_processes import workers_of
from waiting import until

from nft_megatron.config.sections import VerifyConfig
from nft_megatron.data.questions import load_questions
from nft_megatron.verify import sandbox
from nft_megatron.verify.program import judge_program
from nft_megatron.verify.sandbox import IsolationError, Limits, run
from nft_megatron.verify.service import Verifier

LIMITS = Limits(cpu_seconds=20.0, memory_bytes=1 << 30)


def isolates() -> str:
    try:
        sandbox.probe(LIMITS)
    except OSError as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(isolates()), reason=f"programs cannot be isolated here: {isolates()}")


def answer(program: str) -> str:
    return f"Let me think.\n\n```python\n{program}\n```\nThat is all."


SUMS = json.dumps({"inputs": ["1 2\n", "3 4"], "outputs": ["3\n", "7"]})
ASSERTS = "assert add(1, 2) == 3\nassert add(3, 4) == 7"

VERDICTS = {
    "adds": (SUMS, "a, b = map(int, input().split())\nprint(a + b)", "accepted"),
    "adds, as a script": (SUMS, "if __name__ == '__main__':\n    print(sum(map(int, input().split())), '\\n')", "accepted"),
    "knows the first test": (SUMS, "print(3)", "tests failed: test 2 of 2, another result"),
    "prints the right number and fails": (SUMS, "print(3)\nraise ValueError", "tests failed: test 1 of 2, exit code 1"),
    "is no Python": (SUMS, "prin 3", "tests failed: test 1 of 2, exit code 1"),
    "defines the function": (ASSERTS, "def add(a, b):\n    return a + b", "accepted"),
    "defines it and leaves": (ASSERTS, "import sys\ndef add(a, b): return a + b\nsys.exit()", "accepted"),
    "defines another": (ASSERTS, "def add(a, b):\n    return a - b", "tests failed: exit code 1"),
    "leaves before the tests": (ASSERTS, "import os\nos._exit(0)", "tests failed: another result"),
    "leaves within the tests": (ASSERTS, "import sys\ndef add(a, b): sys.exit(0)", "tests failed: another result"),
    "uses the library": (ASSERTS, "from operator import add\nimport dataclasses, re, decimal, json, random", "accepted"),
    "a thread": (
        SUMS,
        "import threading\nthreading.Thread(target=lambda: print(sum(map(int, input().split())))).start()",
        "accepted",
    ),
    "a file of its own": (ASSERTS, "open('notes', 'w').write('x')\nadd = lambda a, b: a + b", "accepted"),
}


@pytest.mark.parametrize("kind", VERDICTS)
def test_programs(kind):
    gold, program, reason = VERDICTS[kind]
    found, detail = judge_program(gold, answer(program), LIMITS)
    assert f"{found}: {detail}".rstrip(": ") == reason


def test_what_is_no_program_and_what_is_no_test():
    assert judge_program(SUMS, "print(3)", LIMITS) == ("no answer found", "")
    for gold in (
        "{}",
        '{"inputs": [1], "outputs": ["1"]}',
        '{"inputs": ["1"], "outputs": []}',
        "{" * 9999,
        "def f(:",
        "72",
        "\0",
    ):
        assert judge_program(gold, answer("pass"), LIMITS)[0] == "unreadable gold", gold


IS_OPEN = """
def is_open(fd):
    import os
    try: os.fstat(fd)
    except OSError: return False
    return True
"""
ESCAPES = {
    "the network": "import socket; socket.create_connection(('127.0.0.1', {port}))",
    "a server": "import socket; socket.socket().bind(('127.0.0.1', 0))",
    "another process": "import subprocess; subprocess.run(['/bin/sh', '-c', 'true'])",
    "fork": "import os; os.fork()",
    "multiprocessing": "import multiprocessing as m; p = m.Process(target=print); p.start(); p.join()",
    "a file of this machine": "open({secret!r}).read()",
    "the home folder": "import os; os.listdir(os.path.expanduser('~root'))[0]",
    "other processes": "import os; os.kill({pid}, 9)",
    "/proc": "open('/proc/self/maps')",
    "the root": "open('/evil', 'w')",
    "the interpreter's library": "import os; open(os.__file__, 'a')",
    "a mount": "import ctypes, os; assert ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, b'') == 0",
    "a namespace": "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "ptrace": "import ctypes; assert ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0",
    "root's rights": "import os; os.setuid(0)",
    "a device": "import os; os.mknod('/tmp/d', 0o060600, os.makedev(8, 0))",
    "the grader's descriptors": "import os; assert any(map(is_open, range(4, 2000)))",
    "more processor time": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (10**6, 10**6))",
}


@pytest.mark.parametrize("kind", ESCAPES)
def test_a_program_cannot_reach(kind, tmp_path):
    """Each attempt raises in the program: it does not get as far as the next line."""
    (tmp_path / "secret").write_text("secret")
    program = ESCAPES[kind].format(port=1, secret=str(tmp_path / "secret"), pid=os.getpid())
    outcome = run(f"{IS_OPEN}{program}\nprint('reached')", b"", LIMITS)
    assert outcome.status != 0 and b"reached" not in outcome.output, outcome
    outcome = run("print('reached')", b"", LIMITS)
    assert outcome == (0, b"reached\n"), "and without the attempt it would have"


HOSTILE = {
    "endless": ("while True: pass", "tests failed: exit code -(24|9)"),
    "ignores the limit": (
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        "tests failed: exit code -9",
    ),
    "eats memory": ("a = bytearray(1 << 40)", "tests failed: exit code 1"),
    "eats memory slowly": ("a = []\nwhile True: a.append(bytearray(1 << 24))", "tests failed: exit code 1"),
    "fills the disk": ("for i in range(99): open(str(i), 'wb').write(bytes(1 << 23))", "tests failed: exit code 1"),
    "one huge file": ("open('a', 'wb').write(bytes(1 << 28))", "tests failed: exit code (1|-25)"),
    "prints without end": ("while True: print('x' * 4096)", "tests failed: exit code (1|-25|120)"),
    "fork bomb": ("import os\nwhile True: os.fork()", "tests failed: exit code 1"),
    "segmentation fault": ("import ctypes; ctypes.string_at(0)", "tests failed: exit code -11"),
    "kills everybody": ("import os\nos.kill(-1, 9)", "tests failed: .*|crash: the program was lost"),
    "kills its parent": ("import os\nos.kill(os.getppid(), 9)", "tests failed: .*"),
    "a thousand threads": (
        "import threading, time\nfor i in range(1000): threading.Thread(target=time.sleep, args=(1,)).start()",
        "tests failed: .*",
    ),
    "sleeps": ("import time\ntime.sleep(3600)", "hard limit"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_program_costs_its_own_answer_alone(kind):
    """The verdict is the documented one, the same pool judges the next answer, and no process is left."""
    program, reason = HOSTILE[kind]
    hard = 2.0 if kind == "sleeps" else 120.0
    settings = VerifyConfig(mode="program", workers=1, soft_seconds=1.0, hard_seconds=hard, memory_gib=0.5)
    with Verifier(settings) as verifier:
        verdict = verifier.submit(answer(program), ASSERTS, "stop").result(500)
        assert re.fullmatch(reason, verdict.reason), verdict
        assert verdict.label == ("wrong" if verdict.reason.startswith("tests failed") else "unknown")
        fine = verifier.submit(answer("def add(a, b): return a + b"), ASSERTS, "stop").result(500)
        assert (fine.label, fine.verifier) == ("correct", "program/1")
        groups = set(workers_of(os.getpid()))
    until(lambda: not any(_members(group) for group in groups))


def _members(group: int) -> list[str]:
    """The processes of a grader's group, those in namespaces included."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state != "Z":
            found.append(path.parent.name)
    return found


def test_the_golds_of_the_page(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "own_verifier.md").read_text()
    (rows,) = re.findall(r"```jsonl\n(.*?)```", page, re.DOTALL)
    (tmp_path / "tasks.jsonl").write_text(rows)
    golds = [question.gold for question in load_questions([tmp_path / "tasks.jsonl"])]
    assert golds == [json.dumps({"inputs": ["1 2\n", "3 4\n"], "outputs": ["3", "7"]}), ASSERTS]
    programs = ("print(sum(map(int, input().split())))", "def add(a, b): return a + b")
    graded = [[judge_program(gold, answer(program), LIMITS)[0] for program in programs] for gold in golds]
    assert graded == [["accepted", "tests failed"], ["tests failed", "accepted"]]


def test_truncated_answers_need_no_program():
    with Verifier(VerifyConfig(mode="program")) as verifier:
        assert verifier.submit(answer("def add"), ASSERTS, "length").result(60).reason == "truncated"


@pytest.mark.parametrize("name", ["_NEW_NAMESPACES", "_MOUNT_SETATTR", "_PR_SET_SECCOMP"])
def test_what_cannot_be_isolated_is_not_run(monkeypatch, name):
    monkeypatch.setattr(sandbox, name, 1 << 29 if name != "_NEW_NAMESPACES" else 0x7FFFFFFF)
    with pytest.raises(IsolationError, match=r"unshare|mount_setattr|seccomp"):
        run("print('started')", b"", LIMITS)


def test_a_sandbox_with_a_hole_is_noticed(monkeypatch):
    monkeypatch.setattr(sandbox, "_filter_calls", lambda: None)
    with pytest.raises(IsolationError, match="opens a socket"):
        sandbox.probe(LIMITS)


def test_a_machine_that_cannot_isolate_is_refused_before_anything_is_asked(tmp_path):
    """User namespaces are switched off for the grader and all that it starts, as administrators do."""
    switch_off = """
import ctypes, os, sys
uid, gid = os.getuid(), os.getgid()
if ctypes.CDLL(None).unshare(0x10000000): sys.exit(77)
open("/proc/self/setgroups", "w").write("deny")
open("/proc/self/uid_map", "w").write(f"{uid} {uid} 1")
open("/proc/self/gid_map", "w").write(f"{gid} {gid} 1")
open("/proc/sys/user/max_user_namespaces", "w").write("0")
from nft_megatron.config.sections import VerifyConfig
from nft_megatron.verify.service import Verifier
with Verifier(VerifyConfig(mode="program")) as verifier:
    try: verifier.check()
    except Exception as error: print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", switch_off], capture_output=True, text=True, timeout=300)
    if done.returncode == 77 or "max_user_namespaces" in done.stderr:
        pytest.skip("namespaces cannot be switched off here")
    assert done.stdout.startswith("UserError verify.mode = program: programs cannot be isolated here: unshare: "), done
    assert done.stdout.endswith("allow user namespaces, or grade with a service elsewhere (verify.url)\n")
