"""The report page in a real Chromium: what a reader does with mouse and keyboard, and what the charts then show."""

import math

import numpy as np
import pytest
from chromium import chromium, needs_chromium

from nft_megatron.base.records import Answer, Completion, Group, Prompt, Verdict
from nft_megatron.data.ledger import write_ledger
from nft_megatron.observe.metrics import MetricsLog
from nft_megatron.observe.report import write_report

pytestmark = needs_chromium

NUM_STEPS = 40
HOSTILE = (
    "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\"> & <b>bold</b> {{ 7*7 }}"
)
ENTROPY = [None if step == 7 else 0.5 + 0.3 * math.sin(step) for step in range(1, NUM_STEPS + 1)]
LOSS = [0.0 if step == 3 else (-1) ** step * 10.0 ** (step % 4) for step in range(1, NUM_STEPS + 1)]
MISMATCH = [10.0 ** (-5 + step % 4) for step in range(1, NUM_STEPS + 1)]
EXACT = [0.25 + step / 100 for step in range(1, NUM_STEPS + 1)]


def row(step):
    return {
        "step": step,
        "entropy": math.nan if ENTROPY[step - 1] is None else ENTROPY[step - 1],
        "loss": LOSS[step - 1],
        "loss_positive": -1.0,
        "mismatch_mean": MISMATCH[step - 1],
        "verdict/exact": EXACT[step - 1],
        "verdict/not equal": 1 - EXACT[step - 1],
        "correct_rate_histogram": [step, 0, 0, 40],
    } | ({"eval_accuracy": step / 100} if step % 10 == 0 else {})


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    with MetricsLog(root, tensorboard=False, wandb_project=None, config={}) as log:
        for step in range(1, NUM_STEPS + 1):
            log.write(row(step) | ({"eval_accuracy_initial": 0.05} if step == 1 else {}))
    completion = Completion(0, 0, np.arange(2, dtype=np.int32), np.array([-1, -2], np.float32), "stop", 3, 0.1)
    answer = Answer(completion, HOSTILE, Verdict("wrong", reason="because", verifier="strict/1"))
    group = Group(0, 4, Prompt("q/0", HOSTILE, HOSTILE, np.arange(3, dtype=np.int32)), (answer,))
    write_ledger(root / "ledger" / "step_000004.parquet", [group], fates=["train"], meta={})
    return write_report(root)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium") / "profile") as tab:
        yield tab


def test_without_metrics_the_page_still_works(browser, tmp_path):
    (tmp_path / "config.yaml").write_text("{seed: 3}")
    answer = Answer(
        Completion(0, 0, np.arange(2, dtype=np.int32), np.array([-1, -2], np.float32), "stop", 0, 0.1),
        "I give up.",
        Verdict("wrong", reason="no closed box", verifier="strict/1"),
    )
    group = Group(0, 1, Prompt("q/0", "1+1?", "2", np.arange(3, dtype=np.int32)), (answer,))
    part = tmp_path / "ledger" / "rounds" / "step_000001_round_00_part_0000.parquet"
    write_ledger(part, [group], fates=["sampled"], meta={})
    seen = len(browser.events)
    browser.open(write_report(tmp_path))
    assert browser.evaluate("document.querySelector('.answer pre').textContent") == "I give up."
    assert browser.evaluate("document.querySelector('.notice').textContent").startswith("No rollout step has finished")
    assert [event for event in browser.events[seen:] if event[0] == "Runtime.exceptionThrown"] == []


@pytest.fixture
def tab(browser, page):
    browser.open(page)
    browser.evaluate("globalThis.chart = (title) => charts.find((chart) => chart.title === title)")
    yield browser
    logged = [params["entry"] for method, params in browser.events if method == "Log.entryAdded"]
    assert [entry for entry in logged if entry["level"] == "error"] == []  # such as what the content-security policy stopped
    assert [event for event in browser.events if event[0] == "Runtime.exceptionThrown"] == []


def ranges(tab):
    """The first and the last step of every chart's axis, without the half step around bars."""
    pairs = tab.evaluate("charts.map(({ plot }) => [plot.scales.x.min, plot.scales.x.max])")
    return {(math.ceil(low), math.floor(high)) for low, high in pairs}


def controls(tab):
    return tab.evaluate("[controls.from.value, controls.to.value, controls.reset.disabled]")


def place(tab, title, step):
    """Where a step lies in the window, in the middle of a chart that has been scrolled into sight."""
    tab.evaluate(f"chart({title!r}).card.scrollIntoView({{ block: 'center' }})")
    tab.settle()
    box = tab.evaluate(f"chart({title!r}).plot.over.getBoundingClientRect().toJSON()")
    return box["left"] + tab.evaluate(f"chart({title!r}).plot.valToPos({step}, 'x')"), box["top"] + box["height"] / 2


def drag(tab, title, start, end):
    (x, y), (to, _) = place(tab, title, start), place(tab, title, end)
    tab.mouse("Moved", x, y)
    tab.mouse("Pressed", x, y, 1)
    tab.mouse("Moved", (x + to) / 2, y, 1)
    tab.mouse("Moved", to, y, 1)
    tab.mouse("Released", to, y, 1)
    tab.settle()


def smoothed(values, weight):
    """Σ w^(n-i) x_i / Σ w^(n-i) over the numbers up to each one: the definition, without recursion."""
    means = []
    for end, value in enumerate(values):
        known = [(end_value, k) for k, end_value in enumerate(x for x in values[: end + 1] if x is not None)]
        weights = [weight ** (len(known) - 1 - k) for _, k in known]
        means.append(None if value is None else sum(w * x for w, (x, _) in zip(weights, known, strict=True)) / sum(weights))
    return means


def test_drag_zooms_every_chart_and_a_double_click_resets(tab):
    assert ranges(tab) == {(0, 40)}
    assert controls(tab) == ["0", "40", True]
    drag(tab, "Entropy", 10, 20)
    assert ranges(tab) == {(10, 20)}
    assert controls(tab) == ["10", "20", False]
    low, high = tab.evaluate("[chart('Accuracy').plot.scales.y.min, chart('Accuracy').plot.scales.y.max]")
    assert low == 0 and 0.2 <= high < 0.4  # the axis follows what is visible: 10 % and 20 %
    drag(tab, "Reasons for verdicts", 18, 12)  # backwards, in bars
    assert ranges(tab) == {(12, 18)}
    tab.click(*place(tab, "Loss", 15), clicks=2)
    assert ranges(tab) == {(0, 40)}
    assert controls(tab) == ["0", "40", True]


def test_steps_can_be_typed(tab):
    tab.evaluate("controls.from.value = 30; controls.to.value = 90; controls.to.dispatchEvent(new Event('change'))")
    tab.settle()
    assert ranges(tab) == {(30, 40)}
    assert controls(tab) == ["30", "40", False]
    tab.evaluate("controls.reset.click()")
    tab.settle()
    assert ranges(tab) == {(0, 40)}


def test_a_logarithmic_axis_spaces_decades_evenly_and_leaves_out_what_is_not_positive(tab):
    height = "(value) => chart('Loss').plot.valToPos(value, 'y')"
    linear = tab.evaluate(f"[1, 10, 100].map({height})")
    assert linear[0] - linear[1] < (linear[1] - linear[2]) / 5
    tab.evaluate("chart('Loss').card.querySelector('.log').click()")
    tab.settle()
    one, ten, hundred = tab.evaluate(f"[1, 10, 100].map({height})")
    assert one - ten == pytest.approx(ten - hundred) and one - ten > 20
    assert tab.evaluate("chart('Loss').plot.data[1].slice(1)") == [value if value > 0 else None for value in LOSS]
    num_omitted = sum(value <= 0 for value in LOSS) + NUM_STEPS  # loss_positive is negative throughout
    assert f"Not shown: {num_omitted} values ≤ 0." in tab.evaluate("chart('Loss').card.textContent")
    assert tab.evaluate("chart('Loss').card.querySelector('.log').getAttribute('aria-pressed')") == "true"
    assert tab.evaluate("chart('Entropy').plot.scales.y.distr") == 1  # a chart at a time
    tab.evaluate("chart('Loss').card.querySelector('.log').click()")
    tab.settle()
    assert tab.evaluate(f"[1, 10, 100].map({height})") == pytest.approx(linear)
    assert tab.evaluate("chart('Loss').plot.data[1].slice(1)") == LOSS


def test_a_chart_without_a_positive_value_has_no_logarithm(tab, page, tmp_path):
    with MetricsLog(tmp_path, tensorboard=False, wandb_project=None, config={}) as log:
        log.write({"step": 1, "loss": -1.0, "entropy": 0.5})
    tab.open(write_report(tmp_path))
    disabled = "Object.fromEntries(charts.map((chart) => [chart.title, chart.card.querySelector('.log')?.disabled ?? 'none']))"
    assert tab.evaluate(disabled) == {"Loss": True, "Entropy": False, "Time per rollout step": "none"}


def test_smoothing_draws_the_debiased_average_over_the_faint_measurement(tab):
    def drawn():
        return tab.evaluate(
            "(({ series, data }) => series.slice(1).map((one, k) => [one.alpha, data[k + 1]]))(chart('Entropy').plot)"
        )

    (alpha, raw), (_, smooth) = drawn()
    measured = [None, *(None if value is None else pytest.approx(value, rel=1e-5) for value in ENTROPY)]  # none at step 0
    assert (alpha, raw) == (1, measured)
    assert set(smooth) == {None}
    tab.evaluate("controls.smoothing.value = 0.9; controls.smoothing.dispatchEvent(new Event('input'))")
    tab.settle()
    (alpha, raw), (smooth_alpha, smooth) = drawn()
    assert raw == measured
    assert 0 < alpha < 0.5 and smooth_alpha == 1
    assert smooth == [None, *(None if value is None else pytest.approx(value, rel=1e-4) for value in smoothed(ENTROPY, 0.9))]
    held_out = [value for value in tab.evaluate("chart('Accuracy').plot.data[2]") if value is not None]
    assert held_out == pytest.approx(smoothed([0.05, 0.1, 0.2, 0.3, 0.4], 0.9))  # over evaluations, not over steps
    tab.evaluate("chart('Loss').card.querySelector('.log').click()")  # the average of all values, then of it what is positive
    tab.settle()
    average = tab.evaluate("chart('Loss').plot.data[3].slice(1)")
    assert average == [pytest.approx(value, rel=1e-4) if value > 0 else None for value in smoothed(LOSS, 0.9)]


def test_the_pointer_and_the_arrow_keys_read_every_chart_at_one_step(tab):
    def at():
        return set(tab.evaluate("charts.map(({ at }) => at.textContent)"))

    assert at() == {"step 40"}
    tab.mouse("Moved", *place(tab, "Entropy", 12))
    tab.settle()
    assert {text.partition(",")[0] for text in at()} == {"step 12"}
    values = """Object.fromEntries([...chart("Loss").legend.querySelectorAll(".u-series:not(.smoothed)")].slice(1).map(
        (one) => [one.querySelector(".u-label").textContent, one.querySelector(".u-value").textContent]))"""
    assert tab.evaluate(values) == {"loss": "1", "right answers": "−1"}  # 10^(12 mod 4)
    assert "10.0 %" in tab.evaluate("chart('Accuracy').legend.textContent")  # of the evaluation before
    tab.mouse("Moved", 2, 2)
    tab.settle()
    assert at() == {"step 40"}
    tab.evaluate("chart('Loss').card.focus()")
    for _ in range(3):
        tab.press("ArrowLeft")
    assert at() == {"step 37"}
    tab.press("ArrowRight")
    assert at() == {"step 38"}


def test_bars_pile_up_to_a_hundred_percent_and_a_hidden_part_is_taken_out(tab):
    axis = "[chart('Reasons for verdicts').plot.scales.y.max, chart('Reasons for verdicts').plot.axes[1]._values.at(-1)]"
    assert tab.evaluate(axis) == [pytest.approx(1), "100 %"]
    bars = "[0, 1].map((k) => chart('Reasons for verdicts').tops(chart('Reasons for verdicts').plot, k + 1).slice(1))"
    exact, both = tab.evaluate(bars)
    assert exact == pytest.approx(EXACT, rel=1e-5)
    assert both == pytest.approx([1] * NUM_STEPS)
    tab.evaluate("chart('Reasons for verdicts').legend.querySelectorAll('.u-series th')[1].click()")
    tab.settle()
    assert tab.evaluate(bars)[1] == pytest.approx([1 - value for value in EXACT], rel=1e-5)


def test_the_heat_map_paints_a_step_s_questions_where_their_rate_is(tab):
    """Opacity 0.05 + 0.95 √(share / largest share), as the scale beside it says; nothing where no question is."""
    alpha = """((step, rate) => {
        const { plot } = chart("Distribution of r̂");
        const [x, y] = [plot.valToPos(step, "x", true), plot.valToPos(rate, "y", true)];
        return plot.ctx.getImageData(Math.round(x), Math.round(y) + 3, 1, 1).data[3] / 255;
    })"""
    largest = 40 / 41  # of step 1
    assert tab.evaluate(f"{alpha}(20, 0)") == pytest.approx(0.05 + 0.95 * math.sqrt(20 / 60 / largest), abs=0.02)
    assert tab.evaluate(f"{alpha}(20, 1)") == pytest.approx(0.05 + 0.95 * math.sqrt(40 / 60 / largest), abs=0.02)
    assert tab.evaluate(f"{alpha}(20, 1 / 3)") < 0.1
    tab.mouse("Moved", *place(tab, "Distribution of r̂", 20))
    tab.settle()
    assert "step 20, r̂ = " in tab.evaluate("chart('Distribution of r̂').at.textContent")


def test_hostile_answers_stay_text(tab):
    assert tab.evaluate("document.title") != "owned"
    assert tab.evaluate("document.querySelectorAll('img, .viewer script, .viewer b').length") == 0
    assert tab.evaluate("[...document.querySelectorAll('.viewer pre')].map((one) => one.textContent)") == [HOSTILE, HOSTILE]
    assert HOSTILE in tab.evaluate("document.querySelector('.question .meta').textContent")


@pytest.mark.parametrize(("width", "dark"), [(1300, False), (390, False), (390, True)])
def test_the_page_fits_its_window_draws_in_its_colors_and_loads_nothing(browser, page, width, dark):
    browser.open(page, width=width, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    blue = (0x4A, 0x94, 0xEA) if dark else (0x2A, 0x78, 0xD6)
    pixels = """(({ ctx }) => ctx.getImageData(0, 0, ctx.canvas.width, ctx.canvas.height).data)(
        charts.find(({ title }) => title === "Entropy").plot)"""
    count = f"{pixels}.reduce((n, _, i, data) => n + (i % 4 === 0 && {list(blue)}.every((part, k) => data[i + k] === part)), 0)"
    assert browser.evaluate(count) > 20
    asked = [params["request"]["url"] for method, params in browser.events if method == "Network.requestWillBeSent"]
    assert asked == [page.resolve().as_uri()]
