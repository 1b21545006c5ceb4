"""What a process does when its standard output or error cannot be written. Each case is a process of its own."""

import fcntl
import os
import subprocess
import sys

import pytest

LINE = "nft-megatron: standard output: {}; the run continues without its display\n"


def run(program, *, stdout=subprocess.PIPE, stderr=subprocess.PIPE, before=None, options=(), **variables):
    command = [sys.executable, *options, "-c", program]
    env = os.environ | variables
    return subprocess.run(command, stdout=stdout, stderr=stderr, preexec_fn=before, env=env, timeout=240, check=False)


def no_reader():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def lost_terminal():
    master, terminal = os.openpty()
    os.close(master)
    return terminal


def command(*words):
    return f"from nft_megatron.cli.main import main; main({list(words)})"


def full():
    return os.open("/dev/full", os.O_WRONLY)


BROKEN = {
    "full": (full, "No space left on device"),
    "a pipe without a reader": (no_reader, "Broken pipe"),
    "a terminal that is gone": (lost_terminal, "Input/output error"),
    "open for reading only": (lambda: os.open("/dev/null", os.O_RDONLY), "Bad file descriptor"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("words", [("completion", "bash"), ("train", "--help")], ids=" ".join)
def test_a_command_whose_result_cannot_be_written_says_so_in_one_line(case, words):
    make, problem = BROKEN[case]
    ended = run(command(*words), stdout=make())
    if case == "a pipe without a reader":
        assert (ended.returncode, ended.stderr) == (141, b"")  # as `yes | head`
        return
    assert ended.returncode == 1
    assert ended.stderr.decode() == f"nft-megatron: standard output: {problem}; what was printed is incomplete\n"


@pytest.mark.parametrize("case", BROKEN)
def test_the_exit_code_of_a_mistake_survives_a_broken_standard_error(case):
    make, _ = BROKEN[case]
    assert run(command("train", "no.yaml"), stderr=make()).returncode == 2
    both = make()
    assert run(command("train", "no.yaml"), stdout=both, stderr=both).returncode == 2


def test_closed_streams_are_no_fault():
    for number in range(3):
        ended = run(command("completion", "bash"), before=lambda number=number: os.close(number))
        assert (ended.returncode, ended.stderr) == (0, b"")
        assert ended.stdout.startswith(b"#") == (number != 1)


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path):
    program = f"""
import os, subprocess, sys
from nft_megatron.base.output import guard_output
guard_output()
file = open({str(tmp_path / "file")!r}, "w")
print("lost")
os.write(1, b"lost too")
subprocess.run(["echo", "of a child"], check=True)
assert file.fileno() > 2
"""
    assert run(program, before=lambda: os.closerange(0, 3), stdout=None, stderr=None).returncode == 0
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "ascii:strict", "utf-8"])
def test_characters_that_an_encoding_lacks_are_escaped(encoding):
    program = """
from nft_megatron.base.output import guard_output
guard_output()
import sys
print("r\\u0302 \\u00e9 \\u2713 \\U0001d70b")
print("\\u2713", file=sys.stderr)
"""
    ended = run(program, PYTHONIOENCODING=encoding)
    assert ended.returncode == 0
    name = encoding.partition(":")[0]
    assert ended.stdout == "r\u0302 \u00e9 \u2713 \U0001d70b\n".encode(name, "backslashreplace")
    assert ended.stderr == "\u2713\n".encode(name, "backslashreplace")


def test_the_help_has_an_ascii_form():
    ended = run(command("train", "--help"), PYTHONIOENCODING="ascii")
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert ended.stdout.isascii() and b"\\u" in ended.stdout


OUTLIVES = """
import sys
from nft_megatron.base.output import outlive_output
outlive_output()
for number in range(5):
    print("step", number)
    sys.stdout.flush()
print("still there", file=sys.stderr)
"""


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("options", [(), ("-u",)], ids=str)
def test_a_run_continues_and_says_once_what_it_lost(case, options):
    make, problem = BROKEN[case]
    ended = run(OUTLIVES, stdout=make(), options=options)
    assert (ended.returncode, ended.stderr.decode()) == (0, LINE.format(problem) + "still there\n")
    ended = run(OUTLIVES, stderr=make(), options=options)
    assert ended.returncode == 0
    remark = f"nft-megatron: standard error: {problem}; the run continues without its warnings\n"
    lines = ended.stdout.decode().splitlines(keepends=True)
    assert sorted(lines) == sorted([remark, *(f"step {number}\n" for number in range(5))])
    both = make()
    assert run(OUTLIVES, stdout=both, stderr=both, options=options).returncode == 0
    assert run(OUTLIVES, stdout=make(), RANK="3", WORLD_SIZE="4").stderr == b"still there\n"  # it has no display to lose


def test_a_run_says_that_its_output_was_closed():
    ended = run(OUTLIVES, before=lambda: os.close(1))
    assert (ended.returncode, ended.stderr.decode()) == (0, LINE.format("is closed") + "still there\n")


def test_a_run_waits_for_a_reader_that_takes_nothing_only_once():
    program = """
import sys, time
from nft_megatron.base import output
output._PATIENCE_SECONDS = 0.05
output.outlive_output()
sys.stdout.write("x" * 10_000_000)
sys.stdout.flush()
"""
    reader, writer = os.pipe()
    ended = run(program, stdout=writer)
    os.close(writer)
    assert (ended.returncode, ended.stderr.decode()) == (0, LINE.format("nobody reads it"))
    with os.fdopen(reader, "rb") as pipe:
        taken = pipe.read()
    assert 4096 <= len(taken) < 10_000_000 and set(taken) == {ord("x")}


def test_a_full_disk_that_has_room_again_gets_the_display_again(tmp_path):
    program = f"""
import os, sys
from nft_megatron.base.output import outlive_output
outlive_output()
full, room = os.open("/dev/full", os.O_WRONLY), os.open({str(tmp_path / "log")!r}, os.O_WRONLY | os.O_CREAT)
for number, target in enumerate((full, full, room)):
    os.dup2(target, 1)
    print("step", number, flush=True)
"""
    ended = run(program)
    assert (ended.returncode, ended.stderr.decode()) == (0, LINE.format("No space left on device"))
    assert (tmp_path / "log").read_text() == "step 2\n"


def test_a_pipe_that_does_not_block_loses_nothing():
    program = "from nft_megatron.base.output import guard_output; guard_output(); print('y' * 300_000)"
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETFL, os.O_NONBLOCK)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        taken = pipe.read()
    assert process.wait(240) == 0
    assert taken == b"y" * 300_000 + b"\n"


def test_streams_that_something_else_has_replaced_are_left_alone(capsys):
    from nft_megatron.base.output import outlive_output

    before = sys.stdout, sys.stderr
    outlive_output()
    print("shown")
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr().out == "shown\n"
