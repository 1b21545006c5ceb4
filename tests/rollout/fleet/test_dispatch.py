"""The scheduler: random sequences of events checked against a plain count, then its rules one at a time."""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from nft_megatron.rollout.fleet.dispatch import Dispatcher

SERVERS = ["a", "b", "c"]
BUDGET, ATTEMPTS = 500, 3


class Fleet(RuleBasedStateMachine):
    """Servers that answer, fail, are late and repeat themselves. The reference counts how often each answer was settled."""

    def __init__(self):
        super().__init__()
        self.dispatcher = Dispatcher(budget_tokens=BUDGET, max_attempts=ATTEMPTS)
        self.asked: dict[tuple[int, int], set[int]] = {}
        self.settled: Counter[tuple[int, int, int]] = Counter()
        self.given_up: set[tuple[int, int]] = set()
        self.sent = {}  # all that were ever sent, by ticket: even those that have ended may still send something
        self.costs = {}  # prompt tokens and tokens per answer, for requests with a hint
        self.live: dict[int, set[int]] = {}  # by ticket, what a client would still be waiting for

    @rule(call=st.integers(0, 1), num=st.integers(1, 6), prompt=st.integers(1, 50), hint=st.none() | st.integers(1, 200))
    def ask(self, call, num, prompt, hint):
        request = len(self.asked)
        self.asked[call, request] = set(range(num))
        self.dispatcher.add(call, request, range(num), prompt_tokens=prompt, hint=hint, max_tokens=150)

    @rule(servers=st.sets(st.sampled_from(SERVERS)), held=st.sets(st.integers(0, 1)))
    def send(self, servers, held):
        for sub in self.dispatcher.assign(sorted(servers), held):
            assert sub.server in servers and sub.call not in held and sub.ticket not in self.sent
            assert (sub.call, sub.request) not in self.given_up
            self.sent[sub.ticket] = sub
            self.live[sub.ticket] = set(sub.indices)

    @rule(data=st.data(), num_tokens=st.integers(1, 300))
    def answer(self, data, num_tokens):
        """Any server sends anything, even twice or after its sub-request has ended."""
        if not self.sent:
            return
        sub = self.sent[data.draw(st.sampled_from(sorted(self.sent)))]
        index = data.draw(st.integers(0, 5))
        counts = self.dispatcher.answered(sub.ticket, index, num_tokens)
        assert counts == (index in self.live.get(sub.ticket, ()))
        if counts:
            self.live[sub.ticket].remove(index)
            self.settled[sub.call, sub.request, index] += 1

    @rule(data=st.data())
    def fail(self, data):
        if not self.sent:
            return
        sub = self.sent[data.draw(st.sampled_from(sorted(self.sent)))]
        left = self.live.pop(sub.ticket, set())
        lost = self.dispatcher.failed(sub.ticket)
        assert set(lost) == (left if sub.num_faults + 1 == ATTEMPTS else set())
        for index in lost:
            self.settled[sub.call, sub.request, index] += 1

    @rule(data=st.data(), whole_call=st.booleans())
    def give_up(self, data, whole_call):
        if not self.asked:
            return
        call, request = data.draw(st.sampled_from(sorted(self.asked)))
        gone = {key for key in self.asked if key[0] == call and (whole_call or key[1] == request)}
        expected = {t for t, left in self.live.items() if left and (self.sent[t].call, self.sent[t].request) in gone}
        assert set(self.dispatcher.give_up(call, None if whole_call else request)) == expected
        for ticket in [t for t, sub in self.sent.items() if (sub.call, sub.request) in gone]:
            self.live.pop(ticket, None)
        self.given_up |= gone

    @invariant()
    def every_answer_is_in_one_place(self):
        under_way = Counter((self.sent[t].call, self.sent[t].request, index) for t, left in self.live.items() for index in left)
        assert all(count == 1 for count in (*under_way.values(), *self.settled.values()))
        assert not under_way.keys() & self.settled.keys()
        waiting = sum(len(indices) for key, indices in self.asked.items() if key not in self.given_up)
        gone = sum(key[:2] not in self.given_up for key in [*under_way, *self.settled])
        assert self.dispatcher.num_waiting == waiting - gone

    def teardown(self):
        """Whatever has happened: if servers answer from now on, every answer arrives exactly once."""
        for ticket in list(self.live):
            self.fail_all(ticket)
        while subs := self.dispatcher.assign(SERVERS):
            for sub in subs:
                for index in sub.indices:
                    assert self.dispatcher.answered(sub.ticket, index, 10)
                    self.settled[sub.call, sub.request, index] += 1
        wanted = {(*key, i) for key, indices in self.asked.items() if key not in self.given_up for i in indices}
        assert {key for key in self.settled if key[:2] not in self.given_up} == wanted
        assert set(self.settled.values()) <= {1}
        assert [self.dispatcher.outstanding(server) for server in SERVERS] == [0, 0, 0]

    def fail_all(self, ticket):
        sub = self.sent[ticket]
        for index in self.dispatcher.failed(ticket):
            self.settled[sub.call, sub.request, index] += 1


TestRandomEvents = Fleet.TestCase
TestRandomEvents.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def make(budget=10_000, attempts=3):
    return Dispatcher(budget_tokens=budget, max_attempts=attempts)


def add(dispatcher, request, num=1, prompt=1, hint=None, call=0, max_tokens=100):
    dispatcher.add(call, request, range(num), prompt_tokens=prompt, hint=hint, max_tokens=max_tokens)


def test_longest_first_and_to_the_server_with_the_fewest_outstanding_tokens():
    dispatcher = make()
    for request, hint in enumerate([10, 40, 20, 30]):
        add(dispatcher, request, hint=hint, prompt=5)
    sent = [(sub.request, sub.server) for sub in dispatcher.assign(["a", "b"])]
    assert sent == [(1, "a"), (3, "b"), (2, "b"), (0, "a")]  # 45 | 35, then 35 + 25 = 60, then 45 + 15 = 60
    assert (dispatcher.outstanding("a"), dispatcher.outstanding("b")) == (60, 60)


def test_a_hint_is_capped_at_the_longest_answer():
    dispatcher = make()
    add(dispatcher, 0, hint=1000, prompt=0)
    dispatcher.assign(["a"])
    assert dispatcher.outstanding("a") == 100


def test_the_budget_holds_but_an_idle_server_always_gets_one_sub_request():
    dispatcher = make(budget=100)
    for request in range(5):
        add(dispatcher, request, hint=40, prompt=0)
    add(dispatcher, 5, hint=90, prompt=30)  # 120: more than the budget, and the longest
    assert [sub.request for sub in dispatcher.assign(["a"])] == [5]
    dispatcher.answered(0, 0, 90)
    assert [sub.request for sub in dispatcher.assign(["a"])] == [0, 1]
    assert dispatcher.assign(["a"]) == []
    dispatcher.answered(1, 0, 40)
    assert [sub.request for sub in dispatcher.assign(["a"])] == [2]


def test_without_a_hint_a_quarter_of_the_longest_then_the_observed_share():
    dispatcher = make(budget=10**9)
    add(dispatcher, 0, prompt=0, num=8000, max_tokens=1000)
    (sub,) = dispatcher.assign(["a"])
    assert dispatcher.outstanding("a") == 8000 * 250
    for index in sub.indices:
        dispatcher.answered(sub.ticket, index, 600)
    add(dispatcher, 1, prompt=0, max_tokens=2000)
    dispatcher.assign(["a"])
    assert 1195 <= dispatcher.outstanding("a") <= 1200


def test_many_groups_stay_whole_and_the_last_is_spread():
    dispatcher = make()
    for request in range(8):
        add(dispatcher, request, num=16)
    assert [len(sub.indices) for sub in dispatcher.assign(SERVERS)] == [16] * 8
    add(dispatcher, 8, num=16)
    assert [(sub.indices, sub.server) for sub in dispatcher.assign(["x", "y", "z"])] == [
        (range(0, 6), "x"),
        (range(6, 12), "y"),
        (range(12, 16), "z"),
    ]


def test_failed_answers_go_first_and_elsewhere_in_consecutive_runs():
    dispatcher = make()
    add(dispatcher, 0, num=6, hint=10)
    (sub,) = dispatcher.assign(["a"])
    add(dispatcher, 1, num=6, hint=99)
    for index in (0, 3):
        dispatcher.answered(sub.ticket, index, 10)
    assert dispatcher.failed(sub.ticket) == []
    sent = [(p.request, p.indices, p.server, p.num_faults) for p in dispatcher.assign(["a", "b"])]
    assert sent[:2] == [(0, range(1, 3), "b", 1), (0, range(4, 6), "b", 1)]
    assert sent[2][0] == 1


def test_the_only_server_is_retried_until_attempts_run_out():
    dispatcher = make(attempts=3)
    add(dispatcher, 0, num=2)
    for attempt in range(3):
        (sub,) = dispatcher.assign(["a"])
        assert dispatcher.failed(sub.ticket) == ([0, 1] if attempt == 2 else [])
    assert dispatcher.assign(["a"]) == [] and dispatcher.outstanding("a") == 0


def test_a_held_call_does_not_delay_another():
    dispatcher = make()
    add(dispatcher, 0, hint=90, call=0)
    add(dispatcher, 0, hint=10, call=1)
    assert [sub.call for sub in dispatcher.assign(["a"], held={0})] == [1]
    assert [sub.call for sub in dispatcher.assign(["a"])] == [0]


def test_a_recovered_server_gets_new_work_while_its_failures_wait_for_others():
    dispatcher = Dispatcher(budget_tokens=1000, max_attempts=3)
    for request in range(30):
        dispatcher.add(0, request, range(1), prompt_tokens=0, hint=100, max_tokens=100)
    first = dispatcher.assign(["a", "b"])
    failed = [sub for sub in first if sub.server == "a"]
    for sub in failed:
        dispatcher.failed(sub.ticket)
    again = dispatcher.assign(["a", "b"])
    assert len(failed) == len(again) == 10
    assert {sub.server for sub in again} == {"a"}
    assert not {sub.request for sub in again} & {sub.request for sub in first}
    (done,) = [sub for sub in first if sub.server == "b"][:1]
    assert dispatcher.answered(done.ticket, 0, 100)
    (retried,) = dispatcher.assign(["a", "b"])
    assert (retried.server, retried.num_faults) == ("b", 1)
