"""The rules of a stream against a simulation of it: whatever closes when, no group is trained after its deadline."""

import numpy as np
import pytest

from nft_megatron.collect.admission import Admission


class Stream:
    """Groups that take random times; every ``train`` ticks the trainer publishes a version if a ledger is there."""

    def __init__(self, rules, seed, *, mixed, train, longest):
        self.rules, self.rng = rules, np.random.default_rng(seed)
        self.mixed, self.train, self.longest = mixed, train, longest
        self.version, self.step, self.asked = 0, 1, 0  # the newest weights, the next ledger, the next question
        self.in_flight, self.waiting, self.left = {}, {}, {}
        self.trained, self.dropped, self.order = {}, set(), []  # position -> (step, version when asked)

    def run(self):
        busy = 0
        while self.step <= self.rules.last_step:
            while self.rules.may_ask(
                step=self.step,
                version=self.version,
                num_waiting=len(self.waiting),
                num_in_flight=len(self.in_flight),
                num_unfinished=len(self.in_flight) * self.rules.group_size,
                mixed_rate=self.mixed if self.step > 1 else None,
            ):
                self.in_flight[self.asked] = self.version
                self.left[self.asked] = int(np.ceil(self.rng.pareto(1.0))) % self.longest + 1
                self.asked += 1
            for group in sorted(self.in_flight, key=self.left.get):
                self.left[group] -= 1
                if self.left[group] == 0:
                    version = self.in_flight.pop(group)
                    if self.rng.random() < self.mixed:
                        self.waiting[group] = version
                    else:
                        self.dropped.add(group)
            closed, in_flight = (
                {group: self.rules.deadline(version) for group, version in groups.items()}
                for groups in (self.waiting, self.in_flight)
            )
            may_collect = self.step - 1 - self.rules.max_staleness <= self.version
            if may_collect and (chosen := self.rules.choose(self.step, closed, in_flight, self.mixed)) is not None:
                self.order.append((chosen, list(closed)))
                self.trained |= {group: (self.step, self.waiting.pop(group)) for group in chosen}
                self.step += 1
            if self.version < self.step - 1:
                busy += 1
                if busy >= self.train:
                    self.version, busy = self.version + 1, 0
        return self


@pytest.mark.parametrize("order", ["closed", "question"])
@pytest.mark.parametrize("staleness", [1, 2, 4])
@pytest.mark.parametrize(("mixed", "train", "longest"), [(1.0, 1, 3), (1.0, 9, 40), (0.5, 4, 60), (0.1, 2, 25), (0.9, 1, 200)])
def test_every_group_is_trained_once_and_in_time(order, staleness, mixed, train, longest):
    for seed in range(3):
        rules = Admission(4, staleness, group_size=2, num_answers=24, last_step=30, order=order)
        stream = Stream(rules, seed, mixed=mixed, train=train, longest=longest).run()
        for step, version in stream.trained.values():
            assert 0 <= step - 1 - version <= staleness
        steps = [step for step, _ in stream.trained.values()]
        sizes = np.bincount(steps, minlength=31)[1:]
        deviation = np.sqrt(4 * (1 - mixed))  # of the number of mixed ones among 4/p questions
        assert sizes.min() == 4 and sizes.mean() < 4.1 + deviation
        assert stream.trained.keys() | stream.dropped | stream.waiting.keys() | stream.in_flight.keys() == set(
            range(stream.asked)
        )


def test_in_the_order_of_closing_only_deadlines_change_the_order():
    rules = Admission(4, 2, group_size=2, num_answers=64, last_step=20, order="closed")
    first = Stream(rules, 0, mixed=1.0, train=1, longest=2).run()
    assert all(chosen == closed[:4] for chosen, closed in first.order), "nothing is urgent"


def test_in_the_order_of_questions_the_trained_ones_are_the_first_mixed_ones():
    rules = Admission(4, 1, group_size=2, num_answers=24, last_step=20, order="question")
    stream = Stream(rules, 1, mixed=0.5, train=3, longest=50).run()
    trained = [group for chosen, _ in stream.order for group in chosen]
    assert trained == sorted(trained)
    mixed_before_last = set(range(trained[-1])) - stream.dropped
    assert mixed_before_last == set(trained[:-1])


def test_a_group_larger_than_the_target_is_asked_alone():
    rules = Admission(4, 1, group_size=16, num_answers=8, last_step=20)
    common = {"step": 1, "version": 0, "num_waiting": 0, "mixed_rate": None}
    assert rules.may_ask(**common, num_in_flight=0, num_unfinished=0)
    assert not rules.may_ask(**common, num_in_flight=1, num_unfinished=1)


def test_nothing_is_asked_that_no_step_is_left_to_train():
    rules = Admission(4, 3, group_size=2, num_answers=1000, last_step=5)
    common = {"step": 5, "version": 4, "num_in_flight": 0, "num_unfinished": 0, "mixed_rate": 0.5}
    assert rules.may_ask(**common, num_waiting=3)
    assert not rules.may_ask(**common, num_waiting=4)


def test_the_share_of_mixed_questions_is_not_trusted_below_what_a_round_would_assume():
    rules = Admission(4, 1, group_size=2, num_answers=1000, last_step=9, least_mixed=0.5)
    common = {"step": 1, "version": 0, "num_waiting": 0, "num_unfinished": 0}
    assert rules.may_ask(**common, num_in_flight=15, mixed_rate=0.01)
    assert not rules.may_ask(**common, num_in_flight=16, mixed_rate=0.01)
    assert not rules.may_ask(**common, num_in_flight=8, mixed_rate=None), "before anything is known all may be mixed"


def test_a_step_trains_all_that_is_due_even_beyond_its_quota():
    rules = Admission(2, 1, group_size=2, num_answers=1000, last_step=9)
    assert rules.choose(3, {5: 4, 1: 3, 2: 3, 6: 4, 3: 3}, {}) == [1, 2, 3]
    assert Admission(2, 1, 2, 1000, 9, "question").choose(3, {5: 4, 3: 3, 1: 3, 6: 4, 2: 3}, {}) == [1, 2, 3]
