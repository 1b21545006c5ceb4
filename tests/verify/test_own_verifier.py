"""A user's own verifier: a function by import path in the grader pool, a service behind HTTP. Real processes, a real server."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from grader_processes import workers_of
from waiting import until

from nft_megatron.base.errors import UserError
from nft_megatron.base.records import Answer, Completion, Group, Prompt
from nft_megatron.base.run_folder import RunFolder
from nft_megatron.collect.rules import earlier_rules
from nft_megatron.config.sections import VerifyConfig
from nft_megatron.data.ledger import read_verifiers, write_ledger
from nft_megatron.evaluate.grade_file import verify_file
from nft_megatron.verify.grade_answers import grade_answers
from nft_megatron.verify.modes import check_for_training
from nft_megatron.verify.rules import other_rules, rules_of
from nft_megatron.verify.service import Verifier

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of the Linux kernel")

DOC = Path(__file__).parents[2] / "docs" / "own_verifier.md"


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module that can be imported; returns a function of its name and source."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))

    return write


# ------------------------------------------------------------------------------------------------------------ a function


def test_a_function_sees_answer_gold_and_question_and_its_three_verdicts_count(module):
    module(
        "echo_grader",
        """
        def grade(answer, gold, question):
            print("to nobody")
            return {"say": gold, "yes": True, "no": False, "none": None, "bad": 0.5, "question": question == "Q"}[answer]
        """,
    )
    asked = [("say", "correct"), ("say", "wrong"), ("say", "unknown"), ("yes", ""), ("no", ""), ("none", ""), ("bad", "")]
    with Verifier(VerifyConfig(mode="echo_grader:grade", workers=1)) as verifier:
        verdicts = list(verifier.verify_many((text, gold, "stop") for text, gold in asked))
        assert [v.label for v in verdicts] == ["correct", "wrong", "unknown", "correct", "wrong", "unknown", "unknown"]
        assert [v.reason for v in verdicts][2:] == ["undecided", "accepted", "rejected", "undecided", "no verdict: 0.5"]
        assert verdicts[0].reason == "accepted"
        asked_q = [verifier.submit("question", "", "stop", question).result(60).label for question in ("Q", "another", "")]
        assert asked_q == ["correct", "wrong", "wrong"], "the question is part of the task, and of what is remembered"
        assert verifier.submit("yes", "", "length").result(60).reason == "truncated"
        assert verifier.submit("yes", "", "abort").result(60).reason == "engine fault"
        assert verdicts[0].verifier == rules_of("echo_grader:grade")
    assert re.fullmatch(r"echo_grader:grade/[0-9a-f]{12}", rules_of("echo_grader:grade"))
    check_for_training("echo_grader:grade")


HOSTILE = {
    "raises": ("raise ValueError('no\\n good')", "crash: ValueError: no good"),
    "exits": ("sys.exit(3)", "crash: SystemExit: 3"),
    "an error that cannot be shown": ("raise Rude()", "crash: Rude"),
    "endless": ("while True: pass", "soft limit"),
    "swallows the limit": (
        "while True:\n        try:\n            while True: sum(range(99))\n        except BaseException: pass",
        "soft limit.*",
    ),
    "one endless call": ("sum(range(10**13))", "soft limit: ended by the kernel"),
    "eats memory": ("bytearray(1 << 40)", "crash: MemoryError"),
    "eats memory slowly": ("eaten = []\n    while True: eaten.append(bytearray(1 << 24))", "crash: MemoryError"),
    "dies": ("os._exit(7)", "worker died: exit code 7"),
    "kills itself": ("os.kill(os.getpid(), 9)", "worker died: exit code -9"),
    "segmentation fault": ("ctypes.string_at(0)", "worker died: exit code -11"),
    "recursion": ("grade(answer, gold, question)", "crash: RecursionError: .*"),
    "sleeps": ("time.sleep(3600)", "hard limit"),
    "closes every file": ("os.closerange(0, 100)", "worker died.*"),
    "forks and both return": ("os.fork()\n    return True", "accepted"),
    "leaves a process behind": ("os.fork() or time.sleep(3600)\n    return True", "accepted"),
    "dies and leaves a process behind": ("os.fork() or time.sleep(3600)\n    os._exit(1)", "hard limit"),
    "returns something huge": ("return 'x' * 10_000_000", "no verdict: 'x{199}"),
    "a verdict that is no text": ("return Rude()", "no verdict.*|crash.*"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_function_costs_its_own_answer_alone(module, kind):
    """The verdict has the documented reason, and the same pool grades the next answer; nothing is left running."""
    body, reason = HOSTILE[kind]
    name = "hostile_" + re.sub(r"\W", "_", kind)
    module(
        name,
        f"""
import ctypes, os, sys, time

class Rude(Exception):
    def __str__(self): raise RuntimeError
    __repr__ = __str__

def grade(answer, gold, question):
    if answer == "fine":
        return gold
    {body}
""",
    )
    settings = VerifyConfig(mode=f"{name}:grade", workers=1, soft_seconds=0.5, hard_seconds=1.5, memory_gib=0.5)
    slow = settings.model_copy(update={"hard_seconds": 60.0})
    with Verifier(settings if "limit" in reason and "soft" not in reason else slow) as verifier:
        verdict = verifier.submit("evil", "", "stop").result(240)
        assert re.fullmatch(reason, verdict.reason), verdict
        assert verdict.label == ("correct" if reason == "accepted" else "unknown")
        assert [verifier.submit("fine", gold, "stop").result(240).label for gold in ("correct", "wrong")] == [
            "correct",
            "wrong",
        ]
        children = set(workers_of(os.getpid()))
    until(lambda: not any(_is_running(group) for group in children))


def _is_running(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    states = [path.read_text().rpartition(")")[2].split() for path in Path("/proc").glob("[0-9]*/stat") if path.exists()]
    return any(int(state[2]) == group and state[0] != "Z" for state in states)


def test_a_function_that_cannot_be_loaded_is_refused_before_anything_is_asked(module, tmp_path):
    module("broken_grader", "import no_such_library")
    module("numbers_grader", "grade = 5")
    module("leaving_grader", "import os; os._exit(3)")
    cases = {
        "no_such_grader:grade": r"there is no module no_such_grader; install its package, or put its folder on PYTHONPATH",
        "broken_grader:grade": r"cannot be imported: ModuleNotFoundError: No module named 'no_such_library'; install",
        "numbers_grader:grade": r"is no function but int; name a function",
        "numbers_grader:other": r"the module numbers_grader cannot give other: .*; correct the name",
        "leaving_grader:grade": r"its grader ended, or took too long, before it was ready; import its module by hand",
        "sys:exit": r"has no source file",
    }
    for grader, message in cases.items():
        with pytest.raises(UserError, match=rf"{grader}: {message}|{message}"), Verifier(VerifyConfig(mode=grader)) as verifier:
            verifier.check()


def test_a_source_that_changes_during_a_run_ends_it(module):
    """A grader process that starts later would judge by other rules than the ones that the verdicts name."""
    module("edited_grader", "def grade(answer, gold, question): return True")
    with Verifier(VerifyConfig(mode="edited_grader:grade", workers=1), tasks_per_worker=1) as verifier:
        assert verifier.submit("a", "", "stop").result(60).label == "correct"
        module("edited_grader", "def grade(answer, gold, question): return False")
        with pytest.raises(UserError, match="its source has changed while it was in use"):
            for text in "bcde":  # a spare may have loaded the old one
                assert verifier.submit(text, "", "stop").result(60).label == "correct"


def test_the_hash_covers_a_package_whole_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "own_rules" / "inner"
    package.mkdir(parents=True)
    for name in ("own_rules/__init__.py", "own_rules/inner/__init__.py", "own_rules/inner/grade.py", "own_rules/helper.py"):
        (tmp_path / name).write_text("raise SystemExit('never run')")
    before = rules_of("own_rules.inner.grade:grade")
    (tmp_path / "own_rules" / "notes.txt").write_text("not a source")
    assert rules_of("own_rules.inner.grade:grade") == before
    (tmp_path / "own_rules" / "helper.py").write_text("# another")
    changed = rules_of("own_rules.inner.grade:grade")
    assert changed != before
    (tmp_path / "own_rules" / "helper.py").rename(tmp_path / "own_rules" / "helper2.py")
    assert rules_of("own_rules.inner.grade:grade") not in (before, changed)


# ------------------------------------------------------------------------------------------------------------ resuming


def ledger(folder: RunFolder, step: int, verifier: Verifier) -> None:
    completion = Completion(0, 0, np.ones(1, np.int32), -np.ones(1, np.float32), "stop", 0, 0.0)
    answers = tuple(Answer(completion, text, verifier.submit(text, "x", "stop").result(60)) for text in ("x", "y"))
    folder.ledgers.mkdir(parents=True, exist_ok=True)
    group = Group(0, step, Prompt("q", "", "x", np.ones(1, np.int32)), answers)
    write_ledger(folder.ledger(step), [group], fates=["trained"], meta={})


def test_a_run_is_not_resumed_under_another_source_unless_told(module, tmp_path):
    source = "def grade(answer, gold, question): return answer == gold"
    module("run_grader", source)
    settings, folder = VerifyConfig(mode="run_grader:grade", workers=1), RunFolder(tmp_path / "run")
    assert earlier_rules(folder, settings) is None, "no answers yet"
    with Verifier(settings) as verifier:
        ledger(folder, 1, verifier)
    before = rules_of("run_grader:grade")
    assert read_verifiers(folder.ledger(1)) == [before]
    assert earlier_rules(folder, settings) is None
    module("run_grader", source + " or None")
    after = rules_of("run_grader:grade")
    with pytest.raises(UserError) as refused:
        earlier_rules(folder, settings)
    assert f"were judged by {before}; those to come would be judged by {after}" in str(refused.value)
    assert str(refused.value).endswith(f"or continue with verify.accept_rules={after}")
    accepting = settings.model_copy(update={"accept_rules": after})
    assert earlier_rules(folder, accepting) == before
    with pytest.raises(UserError):  # the flag names one source; it accepts no third one
        module("run_grader", source + " or True")
        earlier_rules(folder, accepting)
    module("run_grader", source + " or None")
    with Verifier(accepting) as verifier:
        ledger(folder, 2, verifier)
    assert earlier_rules(folder, settings) is None, "the newest answers are by today's rules"
    assert other_rules([before, "none"], "run_grader:grade") == before
    for other in (VerifyConfig(), VerifyConfig(url="http://127.0.0.1:1/grade")):
        with pytest.raises(UserError, match=r"accept_rules="):
            earlier_rules(folder, other)


# ------------------------------------------------------------------------------------------------------------- a service


class Service(BaseHTTPRequestHandler):
    """Answers as the text says; keeps what it was asked."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        kind, num = body["answer"], sum(each["answer"] == body["answer"] for each in self.server.asked)
        status, reply = 200, json.dumps({"verdict": body["gold"]}).encode()
        if kind == "busy twice" and num <= 2:
            status, reply = (429, 503)[num - 1], b"later"
        elif kind == "drops once" and num == 1:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        elif kind == "refuses":
            status = 422
        elif kind == "redirects":
            status = 307
        elif kind == "no json":
            reply = b"<html>"
        elif kind == "no object":
            reply = b"[1]"
        elif kind == "deep":
            reply = b"[" * 60000
        elif kind == "a number":
            reply = b'{"verdict": true}'
        elif kind == "huge":
            reply = b" " * 10_000_000
        elif kind == "always broken":
            status = 500
        elif kind in ("silent", "drips"):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            while not self.server.over.wait(0.2):
                if kind == "drips":
                    self.wfile.write(b" ")
            return
        self.send_response(status)
        if status == 307:
            self.send_header("Location", self.path)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the client has left
            super().handle()


@contextlib.contextmanager
def service():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    server.daemon_threads = True
    server.asked, server.over = [], threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server, f"http://127.0.0.1:{server.server_port}/grade"
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()


FAULTY = {
    "fine": ("accepted", 1),
    "busy twice": ("accepted", 3),
    "drops once": ("accepted", 2),
    "refuses": ("no verdict: status 422", 1),
    "redirects": ("no verdict: status 307", 1),
    "no json": ("no verdict: b'<html>'", 1),
    "no object": (r"no verdict: b'\[1\]'", 1),
    "deep": (r"no verdict: b'\[{198}", 1),
    "a number": ("no verdict: True", 1),
    "huge": ("no verdict: more than 65536 bytes", 1),
}


def test_a_service_grades_and_its_faults_are_unknown():
    with service() as (server, url), Verifier(VerifyConfig(url=url, workers=4, hard_seconds=120.0)) as verifier:
        verifier.check()
        for kind, (reason, num_asked) in FAULTY.items():
            verdict = verifier.submit(kind, "correct", "stop", "Q?").result(240)
            assert re.fullmatch(reason, verdict.reason), (kind, verdict)
            assert verdict.label == ("correct" if reason == "accepted" else "unknown")
            assert verdict.verifier == f"service/{url}"
            asked = [each for each in server.asked if each["answer"] == kind]
            assert asked == [{"answer": kind, "gold": "correct", "question": "Q?"}] * num_asked
        assert [verifier.submit("fine", gold, "stop").result(60).label for gold in ("wrong", "unknown")] == ["wrong", "unknown"]
        assert verifier.submit("fine", "correct", "length").result(60).reason == "truncated"


def test_a_service_that_does_not_answer_in_time_leaves_unknown_and_one_that_is_not_there_is_refused():
    with service() as (_, url), Verifier(VerifyConfig(url=url, workers=3, soft_seconds=0.1, hard_seconds=1.0)) as verifier:
        verdicts = list(verifier.verify_many((kind, "correct", "stop") for kind in ("silent", "drips", "always broken")))
        assert [verdict.reason for verdict in verdicts] == ["no reply", "no reply", "no reply: status 500"]
        assert {verdict.label for verdict in verdicts} == {"unknown"}
    with Verifier(VerifyConfig(url=url, soft_seconds=0.1, hard_seconds=0.5)) as verifier:
        assert verifier.submit("fine", "correct", "stop").result(60).reason.startswith("no reply: ClientConnectorError")
        with pytest.raises(UserError, match=rf"verify\.url = {url}: gives no reply.* within verify.hard_seconds = 0\.5; start"):
            verifier.check()


@pytest.mark.parametrize(
    "url", ["ftp://h/x", "http://", "http://u:p@h/x", "http://h:0", "http://h:99999", "http://h/x?key=1", "h:1"]
)
def test_what_is_no_address_of_a_service(url):
    with pytest.raises(ValueError, match="is not the address of a service"):
        VerifyConfig(url=url)


def test_one_grader_at_a_time():
    with pytest.raises(
        ValueError, match=r"verify.url = http://h/x: grades instead of verify.mode = dapo; set only one of them"
    ):
        VerifyConfig(url="http://h/x", mode="dapo")


# --------------------------------------------------------------------------------------------------- the page's examples


def examples() -> dict[str, str]:
    """The files that docs/own_verifier.md shows: by the name in their first line."""
    blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", DOC.read_text(), re.DOTALL)
    return dict(blocks)


def test_the_function_of_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "word_grader.py").write_text(examples()["word_grader.py"])
    verdicts = grade_answers(
        ["It is <answer>Paris</answer>", "<answer>Rome</answer>", "Paris"],
        ["paris"] * 3,
        mode="word_grader:grade",
        questions=["What is the capital of France?"] * 3,
    )
    assert [verdict.label for verdict in verdicts] == ["correct", "wrong", "wrong"]
    rows = [{"question": "?", "response": "<answer>4</answer>", "answer": "4"}, {"response": "5", "answer": "5"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    verify_file(tmp_path / "rows.jsonl", mode="word_grader:grade", workers=1)
    assert "correct 50.00%, wrong 50.00%, unknown 0.00% of 2 answers" in capsys.readouterr().out


def test_the_service_of_the_page(tmp_path):
    (tmp_path / "grading_service.py").write_text(examples()["grading_service.py"])
    command = [sys.executable, str(tmp_path / "grading_service.py"), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().split()[-1]
            with Verifier(VerifyConfig(url=url, hard_seconds=60.0)) as verifier:
                verifier.check()
                labels = [verifier.submit(text, "4", "stop").result(60).label for text in ("so it is 4", "so it is 5", "")]
                assert labels == ["correct", "wrong", "unknown"]
        finally:
            process.kill()
