"""How full a fleet stays while a trainer trains, in rounds and in a stream; how stale and how long its answers are: simulated.

The servers, and the lengths of answers, are those of fleet_simulation.py. A step trains --questions mixed groups; that takes
--train times as long as full servers need to generate what it consumes before the filter. Then the weights are published, and
answers may be older than those they train by --staleness. The policies:

  rounds, finish    a round is as many questions as probably suffice, and all are waited for; answers in progress end before new
                    weights are loaded (`fleet.in_flight: finish`), and until then nothing is sent
  rounds, continue  the same, but new weights reach the answers in progress
  stream, closed    `rollout.stream`: `nft_megatron.collect.admission` says what is asked and what a step trains on
  stream, question  the same with `rollout.stream_order: question`

Running: answers that are being generated, averaged over time, as a share of the target, which is all slots and the stream's
`rollout.stream_answers`. Waiting: the trainer's share of time in which it does not train. Too old: answers that had to be
dropped. KS: the Kolmogorov-Smirnov distance between the lengths of all answers to questions asked and of those in groups that
closed, before the filter; samples of one distribution exceed the number behind it in one case of twenty. Trained: their mean
length, relative to all answers. Measured from the first publication on; nothing is timed, so the machine does not matter.
"""

from __future__ import annotations

import argparse
import heapq
import math
import re
from collections import deque
from dataclasses import dataclass

import numpy as np
from fleet_simulation import Server, round_size

from nft_megatron.collect.admission import Admission
from nft_megatron.rollout.fleet.dispatch import Dispatcher

POLICIES = ("rounds, finish", "rounds, continue", "stream, closed", "stream, question")


HEAD = (
    "| train | staleness | policy           | running | waiting | steps/h | stale mean, max | too old | KS              "
    "| trained |"
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--questions", type=int, default=512, help="mixed groups of a step (%(default)s)")
    add("--answers", type=int, default=16, help="to each question (%(default)s)")
    add("--servers", type=int, default=8, help="(%(default)s)")
    add("--staleness", type=int, nargs="+", default=[1, 2], help="(%(default)s)")
    add("--train", type=float, nargs="+", default=[0.5, 0.9], help="training time / generation time of a step (%(default)s)")
    add("--mixed", type=float, default=0.5, help="share of questions with right and wrong answers (%(default)s)")
    add("--median", type=float, default=3000, help="tokens of the median answer (%(default)s)")
    add("--question-sigma", type=float, default=0.5, help="of log-lengths between questions (%(default)s)")
    add("--answer-sigma", type=float, default=0.5, help="of log-lengths within a question (%(default)s)")
    add("--longest", type=int, default=16384, help="where answers are cut (%(default)s)")
    add("--prompt-tokens", type=int, default=250, help="(%(default)s)")
    add("--slots", type=int, default=256, help="answers that a server generates at once (%(default)s)")
    add("--budget", type=int, default=2_000_000, help="outstanding tokens of a server (%(default)s)")
    add("--step-ms", type=float, default=8.0, help="fixed time of a decoding step (%(default)s)")
    add("--answer-us", type=float, default=70.0, help="time that each answer adds to it (%(default)s)")
    add("--steps", type=int, default=10, help="steps to simulate (%(default)s)")
    return parser.parse_args()


@dataclass
class Group:
    lengths: np.ndarray
    is_mixed: bool
    left: int
    version: int = -1
    """The oldest weights of its answers so far; -1 before the first has begun."""


class World:
    """Servers, a trainer, and the groups that a policy asks for."""

    def __init__(self, policy: str, staleness: int, train: float, arguments: argparse.Namespace) -> None:
        self.arguments, self.staleness = arguments, staleness
        self.rng = np.random.default_rng(0)
        self.finishes = policy == "rounds, finish"
        self.servers = {f"{i:03}": Server(arguments.slots, self._step_seconds) for i in range(arguments.servers)}
        self.dispatcher = Dispatcher(budget_tokens=arguments.budget, max_attempts=1)
        self.groups: list[Group] = []
        self.now, self.version, self.step, self.num_unfinished = 0.0, 0, 1, 0
        self.ledgers: deque[list[int]] = deque()
        self.training_until = math.inf
        self.is_publishing = False
        self.too_old, self.staleness_seen = 0, []
        self.trained: list[int] = []
        self.answer_seconds, self.waited, self.since = 0.0, 0.0, math.inf
        tokens = arguments.questions / arguments.mixed * arguments.answers * self._lengths(2000).mean()
        rate = arguments.servers * arguments.slots / self._step_seconds(arguments.slots)
        self.train_seconds = train * tokens / rate
        self.collector: Rounds | Stream = (Rounds if policy.startswith("rounds") else Stream)(self, policy.split(", ")[1])

    def _step_seconds(self, num_answers: int) -> float:
        return self.arguments.step_ms / 1e3 + num_answers * self.arguments.answer_us / 1e6

    def _lengths(self, num: int) -> np.ndarray:
        a = self.arguments
        question = self.rng.normal(math.log(a.median), a.question_sigma, (num, 1))
        lengths = np.exp(question + self.rng.normal(0, a.answer_sigma, (num, a.answers)))
        return np.clip(lengths, 20, a.longest).astype(np.int64)

    def ask(self) -> int:
        """Ask the next question; return its group."""
        group, a = len(self.groups), self.arguments
        self.groups.append(Group(self._lengths(1)[0], bool(self.rng.random() < a.mixed), a.answers))
        self.num_unfinished += a.answers
        self.dispatcher.add(0, group, range(a.answers), prompt_tokens=a.prompt_tokens, hint=None, max_tokens=a.longest)
        return group

    def run(self) -> None:
        while self.version < self.arguments.steps:
            self._trainer()
            self.collector.advance()
            self._trainer()
            if not self.is_publishing:
                for sub in self.dispatcher.assign(list(self.servers)):
                    lengths = self.groups[sub.request].lengths
                    server = self.servers[sub.server]
                    self._note_version(self.groups[sub.request])
                    server.queue += [(sub, index, int(lengths[index])) for index in sub.indices]
                    server.advance(self.now)
                    server.fill()
            self._next_event()

    def _note_version(self, group: Group) -> None:
        if group.version < 0:
            group.version = self.version

    def _next_event(self) -> None:
        ends = {name: server.next_end() for name, server in self.servers.items()}
        name = min(ends, key=ends.__getitem__)
        then = min(ends[name], self.training_until)
        assert then < math.inf, "nothing will happen"
        if self.now >= self.since:
            self.answer_seconds += (then - self.now) * sum(len(server.running) for server in self.servers.values())
            self.waited += (then - self.now) * math.isinf(self.training_until)
        self.now = then
        if self.training_until <= ends[name]:
            return
        server = self.servers[name]
        server.advance(self.now)
        _, _, index, sub = heapq.heappop(server.running)
        server.fill()
        group = self.groups[sub.request]
        self.dispatcher.answered(sub.ticket, index, int(group.lengths[index]))
        self.num_unfinished -= 1
        group.left -= 1
        if group.left == 0:
            self.collector.closed(sub.request)

    def _trainer(self) -> None:
        if self.now >= self.training_until:
            self.training_until, self.is_publishing = math.inf, True
        if self.is_publishing and not (self.finishes and any(s.running or s.queue for s in self.servers.values())):
            self.is_publishing = False
            self.version += 1
            if math.isinf(self.since):
                self.since = self.now
        if math.isinf(self.training_until) and not self.is_publishing and self.ledgers:
            trained = self.ledgers.popleft()
            self.staleness_seen += [self.version - self.groups[group].version for group in trained]
            self.trained += trained
            self.training_until = self.now + self.train_seconds * len(trained) / self.arguments.questions


class Rounds:
    """As `nft_megatron.collect.collector` has it, on the thread of `nft_megatron.collect.async_collector`."""

    def __init__(self, world: World, _: str) -> None:
        self.world, self.mixed, self.num_open = world, [], 0

    def closed(self, group: int) -> None:
        self.num_open -= 1
        if self.world.groups[group].is_mixed:
            self.mixed.append(group)

    def advance(self) -> None:
        world, a = self.world, self.world.arguments
        oldest = world.step - 1 - world.staleness
        while not self.num_open and world.version >= oldest:
            recent = [group for group in self.mixed if world.groups[group].version >= oldest]
            world.too_old += a.answers * (len(self.mixed) - len(recent))
            self.mixed = sorted(recent)
            if len(self.mixed) >= a.questions:
                world.ledgers.append(self.mixed[: a.questions])
                self.mixed = self.mixed[a.questions :]
                world.step += 1
                oldest += 1
                continue
            for _ in range(round_size(a.questions - len(self.mixed), a.mixed, 1.0)):
                world.ask()
                self.num_open += 1


class Stream:
    """As `nft_megatron.collect.stream` has it."""

    def __init__(self, world: World, order: str) -> None:
        a = world.arguments
        self.world, self.in_flight, self.waiting = world, {}, {}
        target = a.servers * a.slots
        self.rules = Admission(a.questions, world.staleness, a.answers, target, 10**9, order)
        self.rate: float | None = None
        self.has_closed = False

    def closed(self, group: int) -> None:
        deadline = self.in_flight.pop(group)
        if self.world.groups[group].is_mixed:
            self.waiting[group] = deadline
        self.has_closed = True

    def advance(self) -> None:
        world, rules = self.world, self.rules
        while self.has_closed and world.step - 1 - world.staleness <= world.version:
            if (chosen := rules.choose(world.step, self.waiting, self.in_flight, self.rate)) is None:
                break
            for group in chosen:
                del self.waiting[group]
            world.ledgers.append(chosen)
            world.step += 1
            self.rate = world.arguments.mixed
        self.has_closed = self.has_closed and world.step - 1 - world.staleness > world.version
        while rules.may_ask(
            step=world.step,
            version=world.version,
            num_waiting=len(self.waiting),
            num_in_flight=len(self.in_flight),
            num_unfinished=world.num_unfinished,
            mixed_rate=self.rate,
        ):
            self.in_flight[world.ask()] = rules.deadline(world.version)


def distance(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """The Kolmogorov-Smirnov distance, and what it exceeds in one case of twenty if both are samples of one distribution."""
    at = np.sort(np.concatenate([one, other]))
    below = [np.searchsorted(np.sort(sample), at, side="right") / len(sample) for sample in (one, other)]
    return float(np.abs(below[0] - below[1]).max()), 1.358 * math.sqrt(1 / len(one) + 1 / len(other))


def main() -> None:
    a = parse_arguments()
    print(f"# python benchmarks/stream_simulation.py · a simulation of {a.steps} steps each")
    print(f"{a.questions} x {a.answers} answers a step, {a.mixed:.0%} of the questions mixed · {a.servers} x {a.slots} slots")
    print(HEAD)
    print(re.sub(r"[^|]", "-", HEAD))
    for train in a.train:
        for staleness in a.staleness:
            for policy in POLICIES:
                world = World(policy, staleness, train, a)
                world.run()
                print(row(world, f"| {train:5} | {staleness:9} | {policy:16} |"), flush=True)


def row(world: World, head: str) -> str:
    a, seconds = world.arguments, world.now - world.since
    finished = np.concatenate([group.lengths for group in world.groups if not group.left])
    started = np.concatenate([group.lengths for group in world.groups])
    found, chance = distance(started, finished)
    stale = np.array(world.staleness_seen)
    trained = np.concatenate([world.groups[group].lengths for group in world.trained])
    return (
        f"{head} {world.answer_seconds / seconds / (a.servers * a.slots):7.1%} | {world.waited / seconds:7.1%} | "
        f"{3600 * (world.version - 1) / seconds:7.2f} | {stale.mean():11.2f}, {stale.max():2} | {world.too_old:7} | "
        f"{found:.4f} ({chance:.4f}) | {trained.mean() / started.mean():7.3f} |"
    )


if __name__ == "__main__":
    main()
