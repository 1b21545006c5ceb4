"""Bubble and activations in flight, against a pipeline that is run step by step."""

import pytest

from nft_megatron.plan.time import bubble_share

FORWARD_SECONDS = 1.0  # of a whole stage; its backward pass takes twice as long


def passes_of(stage: int, stages: int, parts: int, micro_batches: int) -> list[tuple[str, int, int]]:
    """(kind, part, micro-batch) in the order in which a stage runs them: 1F1B, or interleaved (arXiv 2104.04473, figure 4)."""
    total = micro_batches * parts
    ahead = stages - stage - 1 if parts == 1 else 2 * (stages - stage - 1) + (parts - 1) * stages
    ahead = min(ahead, total)

    def place(number: int) -> tuple[int, int]:
        if parts == 1:
            return 0, number
        group, inside = divmod(number, stages * parts)
        return inside // stages, group * stages + inside % stages

    forward = [("forward", *place(number)) for number in range(total)]
    backward = [("backward", parts - 1 - part, micro) for part, micro in map(place, range(total))]
    order = forward[:ahead]
    for number in range(total - ahead):
        order += [forward[ahead + number], backward[number]]
    return order + backward[total - ahead :]


def run(stages: int, parts: int, micro_batches: int) -> tuple[float, list[float]]:
    """Seconds until all is done, and each stage's most micro-batches in flight (a part counts as its fraction)."""
    orders = [passes_of(stage, stages, parts, micro_batches) for stage in range(stages)]
    done: dict[tuple[str, int, int], float] = {}  # (kind, part of the model, micro-batch) → when
    clock, position = [0.0] * stages, [0] * stages
    last = stages * parts - 1
    while any(position[stage] < len(orders[stage]) for stage in range(stages)):
        before = list(position)
        for stage in range(stages):
            while position[stage] < len(orders[stage]):
                kind, part, micro = orders[stage][position[stage]]
                number = part * stages + stage
                if kind == "forward":
                    needs = ("forward", number - 1, micro) if number else None
                else:
                    needs = ("backward", number + 1, micro) if number < last else ("forward", number, micro)
                if needs and needs not in done:
                    break
                start = max(clock[stage], done[needs] if needs else 0.0)
                clock[stage] = start + FORWARD_SECONDS * (1 if kind == "forward" else 2) / parts
                done[kind, number, micro] = clock[stage]
                position[stage] += 1
        assert before != position, "the schedule is stuck"
    peaks = []
    for order in orders:
        alive, most = 0, 0
        for kind, _, _ in order:
            alive += 1 if kind == "forward" else -1
            most = max(most, alive)
        peaks.append(most / parts)
    return max(clock), peaks


@pytest.mark.parametrize(("stages", "parts"), [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 2), (4, 4), (8, 2)])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_bubble_and_activations_in_flight(make_layout, stages: int, parts: int, rounds: int):
    micro_batches = rounds * stages  # the interleaved schedule needs a multiple
    seconds, peaks = run(stages, parts, micro_batches)
    busy = micro_batches * 3 * FORWARD_SECONDS
    assert bubble_share(stages, parts, micro_batches) == pytest.approx((seconds - busy) / seconds)
    layout = make_layout(pipeline=stages, virtual_pipeline=parts)
    assert [layout.in_flight(stage, micro_batches) for stage in range(stages)] == peaks


def test_fewer_micro_batches_than_stages_keep_fewer_activations(make_layout):
    _, peaks = run(8, 1, 3)
    layout = make_layout(pipeline=8)
    assert [layout.in_flight(stage, 3) for stage in range(8)] == peaks
