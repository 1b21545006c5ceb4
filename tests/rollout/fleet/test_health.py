"""The state machine alone: a table of every transition, and what no sequence of events can do."""

import pytest

from nft_megatron.rollout.fleet.health import Health, State

EVENTS = {
    "started": lambda health: health.started(),
    "answered none": lambda health: health.answered(None),
    "answered 1": lambda health: health.answered(1),
    "answered 2": lambda health: health.answered(2),
    "failed": lambda health: health.failed("reset"),
    "silent": lambda health: health.silent(10.0),
    "doubted": lambda health: health.doubted("stream broke off"),
    "worked": lambda health: health.worked(),
    "exited": lambda health: health.exited("signal 9"),
    "loaded 1": lambda health: health.weights_loaded(1, "fingerprint 1"),
    "loaded 2": lambda health: health.weights_loaded(2, "fingerprint 2"),
    "refused": lambda health: health.weights_refused("wrong fingerprint"),
    "behind 2": lambda health: health.weights_behind(2, "fingerprint 2"),
    "behind 1": lambda health: health.weights_behind(1, "fingerprint 1"),
    "behind another 1": lambda health: health.weights_behind(1, "fingerprint 1b"),
}
EXAMPLES = {
    State.STARTING: Health(),
    State.STALE: Health().answered(None),
    State.HEALTHY: Health().answered(None).weights_loaded(1, "fingerprint 1"),
    State.SUSPECT: Health().answered(None).weights_loaded(1, "fingerprint 1").failed("reset"),
    State.DEAD: Health().exited("signal 9"),
}
TABLE = {
    # event: state afterwards, from STARTING, STALE, HEALTHY on 1, SUSPECT on 1, DEAD
    "started": "starting starting starting starting starting",
    "answered none": "stale stale stale stale stale",
    "answered 1": "stale stale healthy healthy stale",
    "answered 2": "stale stale stale stale stale",
    "failed": "starting stale suspect suspect dead",
    "silent": "starting stale suspect suspect dead",
    "doubted": "starting stale suspect suspect dead",
    "worked": "starting stale healthy suspect dead",
    "exited": "dead dead dead dead dead",
    "loaded 1": "starting healthy healthy healthy dead",
    "loaded 2": "starting healthy healthy healthy dead",
    "refused": "starting stale stale stale dead",
    "behind 2": "starting stale stale stale dead",
    "behind 1": "starting stale healthy suspect dead",
    "behind another 1": "starting stale stale stale dead",
}


@pytest.mark.parametrize("event", EVENTS)
def test_every_transition(event):
    assert [health.state.value for health in map(EVENTS[event], EXAMPLES.values())] == TABLE[event].split()
    assert [health.state for health in EXAMPLES.values()] == list(EXAMPLES)


def reachable() -> dict[Health, list[tuple[str, Health]]]:
    """Every ``Health`` that events can reach, and the result of each event. Reasons are left out: they affect no transition."""
    graph, todo = {}, [Health()]
    while todo:
        health = todo.pop()
        if health not in graph:
            graph[health] = [(name, strip(event(health))) for name, event in EVENTS.items()]
            todo += [after for _, after in graph[health]]
    return graph


def strip(health: Health) -> Health:
    """``health`` without its reason, and with only the failures that still count."""
    return Health(health.state, health.version, health.fingerprint, health.num_failures, health.num_refusals, health.num_doubts)


GRAPH = reachable()


def test_no_path_from_dead_or_starting_to_healthy_without_a_refresh():
    seen = {health for health in GRAPH if health.state in (State.DEAD, State.STARTING)}
    assert len(seen) > 2
    todo = list(seen)
    while todo:
        for name, after in GRAPH[todo.pop()]:
            if not name.startswith("loaded") and after not in seen:
                assert after.state is not State.HEALTHY
                assert not after.serves(1) and not after.serves(2)
                seen.add(after)
                todo.append(after)


def test_it_serves_only_while_healthy_on_its_proven_version():
    assert len(GRAPH) > 20
    for health in GRAPH:
        for version in (1, 2):
            assert health.serves(version) == (health.state is State.HEALTHY and health.fingerprint == f"fingerprint {version}")


def test_its_weights_are_forgotten_with_the_process():
    for health in GRAPH:
        if health.state in (State.STARTING, State.DEAD):
            assert health.version is None and health.fingerprint is None


def test_dead_after_three_consecutive_failures_and_not_before():
    health = EXAMPLES[State.HEALTHY]
    for state in (State.SUSPECT, State.SUSPECT, State.DEAD):
        health = health.failed("reset")
        assert health.state is state
    health = EXAMPLES[State.HEALTHY].failed("a").failed("b").answered(1).failed("c").failed("d")
    assert health.state is State.SUSPECT and health.reason == "d"


def test_repeated_failed_requests_end_it_despite_good_checks_and_simultaneous_ones_count_once():
    health = EXAMPLES[State.HEALTHY]
    for _ in range(50):
        health = health.doubted("one cause")
    assert health.state is State.SUSPECT and health.num_doubts == 1
    for _ in range(4):
        assert health.state is State.SUSPECT
        health = health.answered(1).doubted("again")
    assert health.state is State.DEAD
    assert EXAMPLES[State.SUSPECT].answered(1).doubted("x").answered(1).worked().num_doubts == 0


def test_dead_after_two_refusals_with_no_load_in_between():
    stale = EXAMPLES[State.STALE]
    assert stale.weights_refused("x").weights_refused("y").state is State.DEAD
    assert stale.weights_refused("x").weights_loaded(1, "r").weights_behind(2, "s").weights_refused("y").state is State.STALE
