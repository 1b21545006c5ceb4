"""What the progress display prints where there is no terminal, on one, and on other ranks."""

import io

from rich.console import Console

from nft_megatron.observe.progress import LineProgress, LiveProgress, Progress, open_progress

METRICS = {"step": 3, "accuracy": 0.4567, "entropy": 0.31, "loss": -0.012, "time/step": 8.0}


class FakeClock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def lines_of(console):
    return console.file.getvalue().splitlines()


def test_one_line_a_step_with_the_time_left():
    clock, console = FakeClock(), Console(file=io.StringIO(), width=40)
    progress = LineProgress(console, num_steps=10, first_step=2, clock=clock)
    clock.now = 8.0
    progress.step_done({**METRICS, "eval_accuracy_initial": 0.25})
    clock.now = 20.0
    progress.step_done({**METRICS, "step": 4, "eval_accuracy": 0.625, "loss": float("nan"), "time/step": 12.0})
    assert lines_of(console) == [
        "step 3/10  accuracy 45.7%  entropy 0.310  loss -0.0120  held-out (initial) 25.0%  8.0 s  56.0 s left",
        "step 4/10  accuracy 45.7%  entropy 0.310  held-out 62.5%  12.0 s  1 min 0 s left",  # 20 s for 2 steps, 6 to go
    ]


def test_a_long_phase_speaks_every_thirty_seconds_only():
    clock, console = FakeClock(), Console(file=io.StringIO())
    progress = LineProgress(console, num_steps=5, first_step=0, clock=clock)
    progress.phase("generate", total=70)
    for _ in range(70):
        clock.now += 1
        progress.advance()
    assert lines_of(console) == ["step 1/5  generate 30 of 70", "step 1/5  generate 60 of 70"]
    progress.phase("save")
    clock.now += 29
    progress.advance(2)
    assert lines_of(console)[2:] == ["step 1/5  save 2"]


def test_other_ranks_are_silent(capsys):
    with Progress() as progress:
        progress.phase("generate", total=3)
        progress.advance()
        progress.step_done(METRICS)
    assert capsys.readouterr() == ("", "")


def test_the_place_decides_the_kind():
    assert isinstance(open_progress(5, console=Console(file=io.StringIO())), LineProgress)
    assert isinstance(open_progress(5, console=Console(file=io.StringIO(), force_terminal=True)), LiveProgress)


def test_a_terminal_shows_run_phase_and_last_numbers():
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    with open_progress(10, 2, console=console) as progress:
        progress.step_done({**METRICS, "eval_accuracy": 0.625})
        progress.step_done({**METRICS, "step": 4, "accuracy": 0.5})
        progress.phase("update", total=8)
        progress.advance(3)
    shown = "".join(lines_of(console)[-4:])
    assert "4/10" in shown
    assert "update" in shown
    assert "3/8" in shown
    assert "accuracy 50.0%" in shown
    assert "held-out 62.5%" in shown  # stays until the next evaluation


def test_the_time_left_is_reckoned_from_the_step_that_a_run_goes_on_from():
    now = [0.0]
    console = Console(file=io.StringIO(), width=120)
    progress = LineProgress(console, 10, 0, clock=lambda: now[0])
    now[0] = 100.0  # of set-up
    progress.begin(6)
    now[0] = 120.0
    progress.step_done({**METRICS, "step": 7})
    assert "step 7/10" in lines_of(console)[-1] and lines_of(console)[-1].endswith("1 min 0 s left")
