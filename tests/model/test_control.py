"""Who waits for whom, and how long."""

import re

import pytest
from control_worker import come_late, give_up


def test_rank_0_gives_up_on_a_rank_that_takes_no_part_after_the_deadline_of_a_collective(world, tmp_path):
    said = world(2)(give_up, tmp_path, 2.0)
    assert sorted(said) == ["exchange", "first_of", "on_main", "together"]
    for message in said.values():  # as slurm/cause.py recognizes it
        assert re.search(r"Timed out waiting 2000ms", message)


@pytest.mark.slow
def test_the_others_wait_for_rank_0_longer_than_for_a_collective(world):
    assert world(2)(come_late, 20.0) == [17, 17]
