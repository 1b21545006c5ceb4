"""Why an attempt ended, from what ranks and srun leave."""

import pytest

from nft_megatron.lifecycle.exit_report import ExitReport
from nft_megatron.slurm.cause import find_cause

NODES = ["n1", "n1", "n2", "n2"]


def report(rank, code, message="", phase="update", seconds=0.0):
    return ExitReport(rank, NODES[rank], code, message, phase, 1.8e9 + seconds)


def test_the_first_killed_task_is_the_cause_and_not_those_that_lost_their_peer():
    log = "srun: error: n2: task 3: Killed\nsrun: error: n1: tasks 0-1: Exited with exit code 1\n"
    reports = [report(0, 1, "RuntimeError: Connection closed by peer"), report(1, 1, "RuntimeError: Connection reset")]
    cause = find_cause(137, reports, log, NODES)
    assert (cause.code, cause.text, cause.blamed) == (1, "rank 3 on n2: Killed", ("n2",))


def test_the_first_fault_that_is_no_echo_of_another_is_the_cause():
    reports = [
        report(2, 1, "RuntimeError: [../gloo] Connection closed by peer", seconds=0),
        report(1, 1, "ValueError: odd", seconds=1),
        report(0, 1, "RuntimeError: Broken pipe", seconds=2),
    ]
    log = "srun: error: n1: task 1: Exited with exit code 1\n"
    cause = find_cause(1, reports, log, NODES)
    assert (cause.text, cause.blamed) == ("rank 1 on n1: ValueError: odd", ())


def test_a_fault_of_the_hardware_blames_its_node():
    cause = find_cause(1, [report(2, 1, "RuntimeError: CUDA error: uncorrectable ECC error encountered")], "", NODES)
    assert cause.blamed == ("n2",)


def test_ranks_without_a_word_are_who_the_others_waited_for():
    reports = [report(rank, 70, "silent for 10 s", "update") for rank in (0, 1, 3)]
    cause = find_cause(70, reports, "srun: error: n2: task 2: Killed", NODES)
    assert cause.code == 1  # killed before anybody noticed a silence
    log = "srun: error: n1: tasks 0-1: Exited with exit code 70\nsrun: error: n2: task 2: Killed"
    cause = find_cause(137, reports, log, NODES)
    assert cause.code == 70
    assert cause.text == "rank 2 on n2 gave no sign of life while rank 0, 1, 3 waited in phase update"
    assert cause.blamed == ("n2",)


def test_a_collective_that_timed_out_was_waiting_for_the_rank_without_a_word():
    reports = [report(rank, 1, "RuntimeError: Timed out waiting 60000ms for send operation", "save") for rank in (0, 1, 2)]
    cause = find_cause(137, reports, "srun: error: n1: tasks 0-1: Exited with exit code 1", NODES)
    assert (cause.code, cause.blamed) == (70, ("n2",))
    assert cause.text == "rank 3 on n2 gave no sign of life while rank 0, 1, 2 waited in phase save"


def test_when_all_stand_still_nobody_is_blamed():
    cause = find_cause(70, [report(rank, 70, "silent for 10 s", "save") for rank in range(4)], "", NODES)
    assert (cause.text, cause.blamed) == ("all ranks hung in phase save: silent for 10 s", ())


@pytest.mark.parametrize("code", [2, 75])
def test_messages_for_people_are_passed_on(code):
    assert find_cause(code, [report(0, code, "say this")], "", NODES).text == "say this"
    assert (
        find_cause(code, [], "nft-megatron: say that\nsrun: error: n1: task 0: Exited with exit code 2", NODES).text
        == "say that"
    )


def test_a_run_folder_that_an_earlier_attempt_still_holds_is_no_wrong_input():
    message = "run_dir = /runs/a: another process is training in it; wait for it"
    assert find_cause(2, [report(0, 2, message)], "", NODES).code == 1


def test_without_a_word_the_last_line_printed_is_what_there_is():
    cause = find_cause(127, [], "bash: python3: command not found\n", NODES)
    assert cause.text == "the trainers exited with 127 without an exit report: bash: python3: command not found"
