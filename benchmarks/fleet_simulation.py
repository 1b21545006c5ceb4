"""How long a fleet takes to collect a step under five policies, how much of it idles and what it generates in vain: simulated.

A step needs --questions groups with both right and wrong answers, --answers each. A question is such with probability --mixed.
Answers of a question have log-normal lengths around a length of its own; or lengths come from recorded ledgers (--ledger).
A server generates up to --slots answers at once; with B of them a token of each takes --step-ms + B x --answer-us, the shape
of batched decoding of a 7B model on one H100. The policies, each with what the one before has:

  wait for all    whole groups dealt out in turn; a round is as many questions as probably suffice; all are waited for
  dispatch        `nft_megatron.rollout.fleet.dispatch`, without a hint: fewest outstanding tokens, the last groups spread
  longest first   with the mean length of the question's answers in an earlier epoch as a hint
  stop at quota   when enough groups are whole, the rest is aborted
  over-sampling   --oversample times as many questions in one go

Idle is server time without any answer to generate; capacity is the
share of the tokens that full servers had made in that time. Waste is tokens of aborted answers and of groups that the step does
not need. Length is the mean of the answers that are trained on, relative to all answers that could have been: whoever stops at
a quota favours short ones. Figures are means over --repeats steps; nothing here is timed, so the machine does not matter.
"""

from __future__ import annotations

import argparse
import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from nft_megatron.data.ledger import read_groups
from nft_megatron.rollout.fleet.dispatch import Dispatcher, SubRequest

POLICIES = ("wait for all", "dispatch", "longest first", "stop at quota", "over-sampling")
RESULTS = Path(__file__).parent / "results"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--questions", type=int, default=512, help="mixed groups of a step (%(default)s)")
    add("--answers", type=int, default=16, help="to each question (%(default)s)")
    add("--servers", type=int, nargs="+", default=[8, 16, 32, 64], help="(%(default)s)")
    add("--mixed", type=float, default=0.5, help="share of questions with right and wrong answers (%(default)s)")
    add("--median", type=float, default=3000, help="tokens of the median answer (%(default)s)")
    add("--question-sigma", type=float, default=0.5, help="of log-lengths between questions (%(default)s)")
    add("--answer-sigma", type=float, default=0.5, help="of log-lengths within a question (%(default)s)")
    add("--longest", type=int, default=16384, help="where answers are cut (%(default)s)")
    add("--ledger", type=Path, nargs="+", help="ledger files whose groups' lengths stand in for log-normal ones")
    add("--prompt-tokens", type=int, default=250, help="(%(default)s)")
    add("--slots", type=int, default=256, help="answers that a server generates at once (%(default)s)")
    add("--budget", type=int, default=2_000_000, help="outstanding tokens of a server; about half are there yet (%(default)s)")
    add("--step-ms", type=float, default=8.0, help="fixed time of a decoding step (%(default)s)")
    add("--answer-us", type=float, default=70.0, help="time that each answer adds to it (%(default)s)")
    add("--oversample", type=float, default=1.15, help="questions, relative to what probably suffices (%(default)s)")
    add("--repeats", type=int, default=10, help="steps to average over (%(default)s)")
    add("--plot", type=Path, default=RESULTS / "fleet_simulation.svg", help="(%(default)s)")
    return parser.parse_args()


@dataclass(frozen=True, eq=False)
class Questions:
    """An endless supply: ``lengths`` ``[question, answer]``, hints ``[question]``, which are mixed ``[question]``."""

    lengths: np.ndarray
    hints: np.ndarray
    mixed: np.ndarray


def draw(arguments: argparse.Namespace, rng: np.random.Generator) -> Questions:
    num = 4 * math.ceil(arguments.questions / arguments.mixed)
    shape = (num, arguments.answers)
    if arguments.ledger:
        groups = [group for path in arguments.ledger for group, _ in read_groups(path)]
        recorded = [[len(answer.completion.tokens) for answer in group.answers] for group in groups]
        chosen = rng.integers(len(recorded), size=num)
        lengths = np.stack([rng.choice(recorded[group], shape[1]) for group in chosen])
        hints = np.array([np.mean(recorded[group]) for group in chosen])
    else:
        question = rng.normal(math.log(arguments.median), arguments.question_sigma, (num, 1))
        # An earlier epoch is another draw of answers to the same question.
        lengths, earlier = (
            np.clip(np.exp(question + rng.normal(0, arguments.answer_sigma, shape)), 20, arguments.longest) for _ in range(2)
        )
        hints = earlier.mean(axis=1)
    return Questions(lengths.astype(np.int64), hints.astype(np.int64), rng.random(num) < arguments.mixed)


# ------------------------------------------------------------------------------------------------------------ one server


@dataclass
class Server:
    """Continuous batching. ``progress``: tokens that an answer in a slot since the start would have; all advance together."""

    slots: int
    step_seconds: Callable[[int], float]
    running: list[tuple[float, int, int, SubRequest]] = field(default_factory=list)  # heap: ends at progress, ticket, index
    queue: list[tuple[SubRequest, int, int]] = field(default_factory=list)  # and index, length
    progress: float = 0.0
    now: float = 0.0
    busy: float = 0.0
    tokens: float = 0.0

    def advance(self, now: float) -> None:
        if self.running:
            tokens = (now - self.now) / self.step_seconds(len(self.running))
            self.progress += tokens
            self.tokens += tokens * len(self.running)
            self.busy += now - self.now
        self.now = now

    def fill(self) -> None:
        while self.queue and len(self.running) < self.slots:
            sub, index, length = self.queue.pop(0)
            heapq.heappush(self.running, (self.progress + length, sub.ticket, index, sub))

    def next_end(self) -> float:
        """When its next answer is finished, if nothing changes."""
        if not self.running:
            return math.inf
        return self.now + (self.running[0][0] - self.progress) * self.step_seconds(len(self.running))


# ------------------------------------------------------------------------------------------------------------- one step


@dataclass(frozen=True)
class Outcome:
    """``seconds`` of the step; shares of server time, of the full servers' tokens, of all tokens; relative length."""

    seconds: float
    idle: float
    capacity: float
    waste: float
    length: float


def simulate(policy: str, questions: Questions, num_servers: int, arguments: argparse.Namespace) -> Outcome:
    def step_seconds(num_answers: int) -> float:
        return arguments.step_ms / 1e3 + num_answers * arguments.answer_us / 1e6

    servers = {f"{i:03}": Server(arguments.slots, step_seconds) for i in range(num_servers)}
    dealt = policy == "wait for all"
    dispatcher = Dispatcher(budget_tokens=arguments.budget, max_attempts=1)
    own = {name: Dispatcher(budget_tokens=2**62, max_attempts=1) for name in servers}  # for work that is dealt out
    hints, stops = policy in POLICIES[2:], policy in POLICIES[3:]
    asked, whole = 0, []  # questions so far; those whose answers are all there, in the order of finishing
    left = np.full(len(questions.lengths), arguments.answers)

    def ask(num: int) -> None:
        nonlocal asked
        for question in range(asked, asked + num):
            target = own[f"{question % num_servers:03}"] if dealt else dispatcher
            target.add(
                0,
                question,
                range(arguments.answers),
                prompt_tokens=arguments.prompt_tokens,
                hint=int(questions.hints[question]) if hints else None,
                max_tokens=arguments.longest,
            )
        asked += num

    def send() -> None:
        subs = dispatcher.assign(list(servers)) if not dealt else [p for n, d in own.items() for p in d.assign([n])]
        for sub in subs:
            lengths = questions.lengths[sub.request]
            servers[sub.server].queue += [(sub, index, int(lengths[index])) for index in sub.indices]
            changed.add(sub.server)

    def num_mixed() -> int:
        return int(questions.mixed[whole].sum())

    now, quota = 0.0, arguments.questions
    changed: set[str] = set()
    ask(round_size(quota, arguments.mixed, arguments.oversample if policy == "over-sampling" else 1.0))
    send()
    while True:
        for server in (servers[name] for name in changed):
            server.advance(now)
            server.fill()
        changed = set()
        if stops and num_mixed() >= quota:
            break
        ends = {name: server.next_end() for name, server in servers.items()}
        name = min(ends, key=ends.__getitem__)
        if math.isinf(ends[name]):  # the round is over
            if num_mixed() >= quota:
                break
            ask(round_size(quota - num_mixed(), arguments.mixed, 1.0))
        else:
            now = ends[name]
            servers[name].advance(now)
            _, _, index, sub = heapq.heappop(servers[name].running)
            (own[name] if dealt else dispatcher).answered(sub.ticket, index, int(questions.lengths[sub.request, index]))
            left[sub.request] -= 1
            if left[sub.request] == 0:
                whole.append(sub.request)
            changed.add(name)
        send()
    for server in servers.values():
        server.advance(now)
    trained = [question for question in whole if questions.mixed[question]][:quota]
    filtered = [question for question in whole if not questions.mixed[question]]
    tokens = sum(server.tokens for server in servers.values())
    full_rate = num_servers * arguments.slots / step_seconds(arguments.slots)
    return Outcome(
        seconds=now,
        idle=1 - sum(server.busy for server in servers.values()) / (num_servers * now),
        capacity=tokens / (full_rate * now),
        waste=1 - float(questions.lengths[trained + filtered].sum()) / tokens,
        length=float(questions.lengths[trained].mean() / questions.lengths[:asked][questions.mixed[:asked]].mean()),
    )


def round_size(missing: int, rate: float, oversample: float) -> int:
    """As `nft_megatron.collect.collector` has it: one standard deviation more than the mean needs."""
    return math.ceil(oversample * (missing + math.sqrt(missing * (1 - rate))) / rate)


# ------------------------------------------------------------------------------------------------------------- the table


def main() -> None:
    arguments = parse_arguments()
    print(f"# python benchmarks/fleet_simulation.py · a simulation: {arguments.repeats} steps each")
    lengths = draw(arguments, np.random.default_rng(0)).lengths
    print(
        f"{arguments.questions} x {arguments.answers} answers, "
        f"{'recorded' if arguments.ledger else 'log-normal'} lengths: median {np.median(lengths):,.0f}, "
        f"mean {lengths.mean():,.0f}, 99th percentile {np.percentile(lengths, 99):,.0f}, "
        f"{np.mean(lengths == arguments.longest):.1%} cut · {arguments.mixed:.0%} of the questions mixed"
    )
    print("| servers | policy        | time s | / wait for all |  idle | capacity | waste | length |")
    print("|--------:|---------------|-------:|---------------:|------:|---------:|------:|-------:|")
    table: dict[tuple[str, int], Outcome] = {}
    for num_servers in arguments.servers:
        for policy in POLICIES:
            outcomes = [
                simulate(policy, draw(arguments, np.random.default_rng(seed)), num_servers, arguments)
                for seed in range(arguments.repeats)
            ]
            mean = Outcome(*np.mean([list(vars(outcome).values()) for outcome in outcomes], axis=0).tolist())
            table[policy, num_servers] = mean
            print(
                f"| {num_servers:7} | {policy:13} | {mean.seconds:6.0f} | "
                f"{mean.seconds / table[POLICIES[0], num_servers].seconds:14.2f} | {mean.idle:5.1%} | {mean.capacity:8.1%} | "
                f"{mean.waste:5.1%} | {mean.length:6.3f} |",
                flush=True,
            )
    plot(table, arguments.servers, arguments.plot)
    print(f"plot: {arguments.plot.name}")


def plot(table: dict[tuple[str, int], Outcome], servers: Sequence[int], path: Path) -> None:
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (name, title) in zip(
        figure.subplots(1, 3),
        {"seconds": "time of a step, s", "idle": "idle share", "waste": "wasted tokens"}.items(),
        strict=True,
    ):
        for policy in POLICIES:
            axes.plot(servers, [getattr(table[policy, num], name) for num in servers], marker="o", label=policy)
        axes.set_xscale("log", base=2)
        axes.set_xticks(servers, [str(num) for num in servers])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("servers")
        axes.set_title(title, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
