"""Metrics on the disk, in TensorBoard and in Weights & Biases; the clock of the phases."""

import json
import math
import os
import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nft_megatron.base.errors import UserError
from nft_megatron.observe.metrics import METRICS, PHASES, MetricsLog, PhaseTimer, is_known, read_metrics

ROWS = [
    {"step": 1, "eval_accuracy": 0.25},
    {"step": 2, "loss": 0.1 + 0.2, "updates": 4, "correct_rate_histogram": [3, 2, 1], "time/step": 1.5},
    {"step": 3, "loss": -1e-300, "updates": 8, "correct_rate_histogram": [0, 0, 6], "time/step": 2.5},
    {"step": 4, "loss": 5e22, "updates": 12, "correct_rate_histogram": [1, 4, 1], "eval_accuracy": 0.5},
]


def open_log(run_dir, *, tensorboard=False, wandb_project=None):
    return MetricsLog(run_dir, tensorboard=tensorboard, wandb_project=wandb_project, config={"seed": 7})


def write_rows(run_dir, rows):
    with open_log(run_dir) as log:
        for row in rows:
            log.write(row)


def test_round_trip_to_the_bit(tmp_path):
    write_rows(tmp_path, ROWS)
    assert read_metrics(tmp_path) == ROWS
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == ROWS


def test_row_is_on_the_disk_when_write_returns(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    log = open_log(tmp_path)
    log.write(ROWS[0])
    log.write(ROWS[1])
    sizes = [len(json.dumps(row)) + 1 for row in ROWS[:2]]
    assert synced == [sizes[0], sizes[0] + sizes[1]]  # each fsync came after its row was flushed


def test_not_finite_is_null_on_disk_and_nan_when_read(tmp_path):
    write_rows(tmp_path, [{"step": 1, "loss": math.nan, "grad_norm": math.inf}])
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "grad_norm": null}\n'
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["loss"])
    assert math.isnan(row["grad_norm"])


def test_no_file_reads_as_no_rows(tmp_path):
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("torn", ['{"step": 5, "lo', '{"step": 5}'])
def test_torn_last_line_is_left_out(tmp_path, torn):
    write_rows(tmp_path, ROWS)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    assert read_metrics(tmp_path) == ROWS


@pytest.mark.parametrize(
    "damage",
    [
        "{torn\n",
        "[1]\n",
        '{"loss": 1}\n',
        "\n",
        "[" * 100_000 + "\n",
        '{"step": ' + "9" * 5000 + "}\n",
        '{"step": true}\n',
        '{"step": 2.0}\n',
        '{"step": "\\ud800"}\n',
        '{"step": 2, "loss": "\\ud800"}\n',
        '{"step": 2, "loss": {"a": 1}}\n',
        '{"step": 2, "correct_rate_histogram": [1, "a"]}\n',
        '{"step": 2, "correct_rate_histogram": [1.5]}\n',
        "\x00\n",
    ],
    ids=lambda damage: damage[:30],
)
def test_damage_anywhere_else_is_an_error_that_names_the_line(tmp_path, damage):
    write_rows(tmp_path, ROWS[:2])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + damage + '{"step": 9}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:3"):
        read_metrics(tmp_path)


def test_truncate_drops_later_rows_and_a_torn_line_and_the_log_goes_on(tmp_path):
    write_rows(tmp_path, ROWS)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    with open_log(tmp_path) as log:
        log.truncate_from(3)
        assert read_metrics(tmp_path) == ROWS[:2]
        log.write({"step": 3, "loss": 7.0})
    assert read_metrics(tmp_path) == [*ROWS[:2], {"step": 3, "loss": 7.0}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncate_of_a_new_run(tmp_path):
    open_log(tmp_path / "new").truncate_from(1)
    assert read_metrics(tmp_path / "new") == []


def test_a_name_outside_the_table_is_a_bug(tmp_path):
    with pytest.raises(AssertionError, match="entrophy"):
        open_log(tmp_path).write({"step": 1, "entrophy": 0.1})
    with pytest.raises(AssertionError, match="step"):
        open_log(tmp_path).write({"loss": 0.1})


def test_table_has_every_phase_and_a_meaning_for_each_name():
    assert all(f"time/{phase}" in METRICS and is_known(f"time/{phase}") for phase in PHASES)
    assert all(name == metric.name and metric.meaning and metric.unit for name, metric in METRICS.items())
    on_the_clock = {"time", "tokens_per_second", "ahead", "fleet"}
    wall_clock = {name for name, metric in METRICS.items() if metric.is_wall_clock}
    assert wall_clock == {name for name in METRICS if name.split("/")[0] in on_the_clock}
    assert len([name for name in wall_clock if name.startswith("time/")]) == len(PHASES) + 1  # their sum


def read_events(run_dir):
    events = EventAccumulator(str(run_dir / "logs" / "tensorboard"), size_guidance={"histograms": 0, "scalars": 0})
    return events.Reload()


def test_tensorboard_reads_back_scalars_and_histogram(tmp_path):
    with open_log(tmp_path, tensorboard=True) as log:
        for row in ROWS:
            log.write(row)
    events = read_events(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("eval_accuracy")] == [(1, 0.25), (4, 0.5)]
    assert [event.step for event in events.Scalars("updates")] == [2, 3, 4]
    assert [event.value for event in events.Scalars("time/step")] == [1.5, 2.5]
    histograms = events.Histograms("correct_rate_histogram")
    assert [list(event.histogram_value.bucket) for event in histograms] == [[3, 2, 1], [0, 0, 6], [1, 4, 1]]
    first = histograms[0].histogram_value
    assert list(first.bucket_limit) == [0.25, 0.75, 1.25]  # around 0, 1/2 and 1
    assert (first.num, first.sum, first.sum_squares) == (6, 2 * 0.5 + 1, 2 * 0.25 + 1)


def test_tensorboard_forgets_what_a_killed_run_logged(tmp_path):
    with open_log(tmp_path, tensorboard=True) as log:
        for row in ROWS:
            log.write(row)
    with open_log(tmp_path, tensorboard=True) as log:
        log.truncate_from(3)
        log.write({"step": 3, "loss": 7.0})
    assert [(event.step, event.value) for event in read_events(tmp_path).Scalars("loss")] == [(2, pytest.approx(0.3)), (3, 7.0)]


def test_missing_wandb_names_the_field_and_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes `import wandb` fail
    with pytest.raises(UserError, match=r"observe\.wandb_project = maths.*nft_megatron\[wandb\]"):
        open_log(tmp_path, wandb_project="maths")


def test_wandb_gets_rows_on_our_own_step_axis_and_goes_on_in_the_same_run(tmp_path, monkeypatch):
    logged, started, axes = [], [], []
    run = types.SimpleNamespace(
        log=logged.append, define_metric=lambda name, step_metric: axes.append((name, step_metric)), finish=lambda: None
    )

    def init(**options):
        started.append(options)
        return run

    fake = types.SimpleNamespace(init=init, Histogram=lambda np_histogram: np_histogram)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        with open_log(tmp_path, wandb_project="maths") as log:
            log.write(ROWS[1])
    assert started[0]["project"] == "maths"
    assert started[0]["config"] == {"seed": 7}
    assert started[0]["id"] == started[1]["id"] != ""
    assert axes[0] == ("*", "step")
    assert logged[0] == {**ROWS[1], "correct_rate_histogram": ([3, 2, 1], [-0.25, 0.25, 0.75, 1.25])}


class FakeClock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_phases_add_up_and_nested_time_is_counted_once():
    clock = FakeClock()
    timer = PhaseTimer(clock)
    clock.now += 1  # nobody's
    with timer.phase("generate"):
        clock.now += 4
        with timer.phase("ledger"):
            clock.now += 2
        clock.now += 8
    with timer.phase("update"):
        clock.now += 16
    with timer.phase("generate"):
        clock.now += 32
    timings = timer.finish_step(generated_tokens=88, trained_tokens=32)
    expected = dict.fromkeys(PHASES, 0.0) | {"generate": 44.0, "ledger": 2.0, "update": 16.0, "other": 1.0}
    assert {name: timings[f"time/{name}"] for name in PHASES} == expected
    assert timings["time/step"] == 63.0 == sum(expected.values())
    assert timings["tokens_per_second/generate"] == 2.0
    assert timings["tokens_per_second/update"] == 2.0


def test_an_exception_closes_its_phase_and_steps_dont_share_time():
    clock = FakeClock()
    timer = PhaseTimer(clock)

    def fail_after_three_seconds():
        with timer.phase("verify"):
            clock.now += 3
            raise KeyError

    with pytest.raises(KeyError):
        fail_after_three_seconds()
    assert timer.finish_step(generated_tokens=0, trained_tokens=0)["time/verify"] == 3.0
    clock.now += 5
    timings = timer.finish_step(generated_tokens=10, trained_tokens=0)
    assert (timings["time/verify"], timings["time/other"], timings["time/step"]) == (0.0, 5.0, 5.0)
    assert not any(name.startswith("tokens_per_second/") for name in timings)  # no time under generate: no rate


def test_an_unknown_phase_is_a_bug():
    with pytest.raises(AssertionError, match="lunch"), PhaseTimer().phase("lunch"):
        pass
