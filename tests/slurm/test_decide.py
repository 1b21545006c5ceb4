"""When a run continues, and when it gives up."""

from dataclasses import replace

import pytest

from nft_megatron.config.slurm import SlurmConfig
from nft_megatron.slurm.decide import decide
from nft_megatron.slurm.job_folder import Attempt

NODES = ("n1", "n2", "n3", "n4")


def attempt(number, kind, progress=(0, 0, 0), blamed=(), cause="why"):
    return Attempt(number, "7", NODES, 10.0 * number, 10.0 * number + 9, kind, cause, blamed, progress)


def decided(*attempts, **others):
    return decide(attempts, SlurmConfig(max_failures=3, max_excluded=2, exclude_after=2), **others)


@pytest.mark.parametrize(
    ("kind", "action"),
    [
        ("finished", "finished"),
        ("wrong", "fatal"),
        ("left", "continue"),
        ("short", "continue"),
        ("failed", "continue"),
        ("lost", "continue"),
    ],
)
def test_what_follows_each_kind_of_end(kind, action):
    decision = decided(attempt(1, kind, (1, 1, 0)))
    assert (decision.action, decision.reason, decision.exclude) == (action, "why", {})


def test_a_person_who_stops_it_is_heard_after_any_end_but_the_last():
    assert decided(attempt(1, "failed"), stopped=True).action == "stopped"
    assert decided(attempt(1, "finished"), stopped=True).action == "finished"


def test_attempts_without_progress_in_a_row_are_counted():
    crash = [attempt(1, "failed", (2, 3, 0)), attempt(2, "failed", (2, 3, 0)), attempt(3, "lost", (2, 3, 0))]
    assert decided(*crash).action == "continue"  # the first of them had made progress
    end = decided(*crash, attempt(4, "failed", (2, 3, 0), cause="no memory"))
    assert (end.action, end.reason) == ("fatal", "3 attempts in a row made no progress; the last one: no memory")


def test_whatever_is_new_on_the_disk_is_progress_also_after_parts_became_one_file():
    going = [attempt(n, "failed", (2, 3, pieces)) for n, pieces in enumerate((59, 11, 20, 30), start=1)]
    assert decided(*going).action == "continue"
    before = [replace(attempt(n, "failed", (2, 3, 0)), progress_before=(2, 3, 0)) for n in (1, 2, 3)]
    assert decided(*before).action == "fatal", "what stood there before they began is none of theirs"


def test_preemptions_are_no_failures():
    assert decided(*(attempt(n, "left") for n in range(1, 20))).action == "continue"


def test_a_node_is_excluded_after_the_preflight_or_when_blamed_twice_in_a_row():
    assert decided(attempt(1, "bad nodes", blamed=("n2",))).exclude == {"n2": "why"}
    once = attempt(1, "failed", (1, 0, 0), ("n2",))
    assert decided(once).exclude == {}
    assert decided(once, attempt(2, "failed", (2, 0, 0), ("n2", "n3"))).exclude == {"n2": "why"}
    between = attempt(2, "failed", (2, 0, 0), ("n3",))
    assert decided(once, between, attempt(3, "failed", (3, 0, 0), ("n2",))).exclude == {}, "it was good in between"
    elsewhere = replace(between, nodes=("n1", "n3"))
    assert decided(once, elsewhere, attempt(3, "failed", (3, 0, 0), ("n2",))).exclude == {"n2": "why"}, "it had no part"


def test_finding_another_bad_node_each_time_is_no_failure():
    found = [attempt(n, "bad nodes", blamed=(f"n{n}",)) for n in range(1, 5)]
    excluded = {"n1": "", "n2": "", "n3": ""}
    assert decide(found, SlurmConfig(max_failures=3, max_excluded=8), excluded=excluded).action == "continue"
    again = [attempt(n, "bad nodes", blamed=("n1",)) for n in range(1, 5)]
    assert decide(again, SlurmConfig(max_failures=3, max_excluded=8), excluded=excluded).action == "fatal"


def test_input_that_was_right_before_gets_another_chance():
    ran = attempt(1, "failed", (1, 1, 0))
    assert decided(ran, attempt(2, "wrong", (1, 1, 0))).action == "continue"
    assert decided(attempt(1, "left"), attempt(2, "wrong")).action == "fatal"


def test_too_many_bad_nodes_are_a_fault_elsewhere():
    end = decided(attempt(1, "bad nodes", blamed=("n1", "n3")), excluded={"n4": "before"})
    assert end.action == "fatal"
    assert end.reason.startswith("n1, n3, n4 are bad, more than slurm.max_excluded = 2")
