"""The report page: its numbers are the run's, it needs nothing from outside, and no answer can break out of it."""

import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from nft_megatron.base.errors import UserError
from nft_megatron.base.records import Answer, Completion, Group, Prompt, Verdict
from nft_megatron.cli.main import main
from nft_megatron.data.ledger import write_ledger
from nft_megatron.observe import answers, report
from nft_megatron.observe.metrics import METRICS, MetricsLog
from nft_megatron.observe.plots import write_overview_png
from nft_megatron.observe.report import write_report
from nft_megatron.rollout.fleet.metrics import fleet_metrics
from nft_megatron.rollout.fleet.supervisor import ServerStats
from nft_megatron.rollout.fleet.usage import FleetUsage, ServerUsage

HOSTILE = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> & \u2028 &lt; {{ 7*7 }} \x00 ]]>"
SECONDS = {
    "generate": 3.0,
    "verify": 0.5,
    "prepare": 1.0,
    "update": 4.5,
    "publish": 0.125,
    "ledger": 0.125,
    "evaluate": 0.5,
    "save": 0.0,
    "other": 0.25,
}
CONFIG = {"seed": 3, "model": {"path": "models/<tiny>"}, "algorithm": {"name": "nft"}, "train": {"num_steps": 5}}


def row(step):
    timings = {f"time/{phase}": seconds for phase, seconds in SECONDS.items()} | {"time/step": sum(SECONDS.values())}
    return {
        "step": step,
        "updates": 4 * step,
        "loss": -0.0123456789 * step,
        "entropy": 0.3 + step / 7,
        "accuracy": 0.4 + step / 10,
        "entropy_sampled": 0.4 + step / 7,
        "mismatch_mean": 1e-7 * step,
        "mismatch_max": 1e-5 * step,
        "skipped_updates": step % 2,
        "correct_rate_histogram": [step, 2, 3],
        "eval_accuracy": 0.5 + step / 10,
        **timings,
    }


def group(step, group_id, labels, text="The answer is \\boxed{4}.", question="What is 2+2?"):
    judged = tuple(
        Answer(
            Completion(
                group_id, k, np.arange(4, dtype=np.int32), np.array([-1, -2, -3, -0.5], np.float32), "stop", step - 1, 0.1
            ),
            text,
            Verdict(label, reason="because", verifier="strict/1"),
        )
        for k, label in enumerate(labels)
    )
    return Group(group_id, step, Prompt(f"q/{group_id}", question, "4", np.arange(3, dtype=np.int32)), judged)


@pytest.fixture
def run_dir(tmp_path):
    root = tmp_path / "my-run"
    with MetricsLog(root, tensorboard=False, wandb_project=None, config=CONFIG) as log:
        log.write({**row(1), "eval_accuracy_initial": 0.25})
        log.write(row(2))
        log.write(row(3))
        log.write({**row(4), "loss": float("nan")})
    (root / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    groups = [group(4, 7, ["correct", "wrong", "unknown"], HOSTILE, HOSTILE), group(4, 9, ["wrong", "correct", "correct"])]
    write_ledger(root / "ledger" / "step_000004.parquet", groups, fates=["train", "surplus"], meta={})
    return root


class Page(HTMLParser):
    """Tags, attributes and texts as a browser tokenizes them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.scripts, self.open_script, self.text = [], [], {}, "", text
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "script":
            self.open_script = dict(attributes).get("id", "program")

    def handle_endtag(self, tag):
        if tag == "script":
            self.open_script = ""

    def handle_data(self, data):
        if self.open_script:
            self.scripts[self.open_script] = self.scripts.get(self.open_script, "") + data
        elif data.strip():
            self.texts.append(" ".join(data.split()))

    @property
    def data(self):
        return json.loads(self.scripts["run-data"])


def read_page(path):
    return Page(path.read_text(encoding="utf-8"))


def test_embedded_data_are_the_metrics(run_dir):
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    data = read_page(path).data
    assert data["steps"] == [1, 2, 3, 4]
    columns = data["columns"]
    assert columns["entropy"] == [pytest.approx(0.3 + step / 7, rel=1e-5) for step in (1, 2, 3, 4)]
    assert columns["loss"] == [*(pytest.approx(-0.0123456789 * step, rel=1e-5) for step in (1, 2, 3)), None]  # NaN is a gap
    assert columns["eval_accuracy_initial"] == [0.25, None, None, None]
    assert data["held_out"] == [[0, 0.25], [1, 0.6], [2, 0.7], [3, 0.8], [4, 0.9]]
    assert columns["correct_rate_histogram"] == [[1, 2, 3], [2, 2, 3], [3, 2, 3], [4, 2, 3]]
    assert columns["time/rest"] == [0.5, 0.5, 0.5, 0.5]  # publish, ledger, save, other


def test_charts_draw_metrics_that_exist(run_dir):
    program = read_page(write_report(run_dir)).scripts["program"]
    drawn = re.findall(r'column\("([^"]+)"', program)
    assert set(drawn) <= METRICS.keys() | {"time/rest"}
    assert {"entropy", "entropy_sampled", "mismatch_mean", "mismatch_max"} <= set(drawn)
    assert len(drawn) == len(set(drawn))


def test_a_fleet_has_its_page(run_dir):
    """Each server's columns and the charts that read them; a run without a fleet draws none of them."""
    with MetricsLog(run_dir, tensorboard=False, wandb_project=None, config=CONFIG) as log:
        log.write(
            row(5) | {"fleet/healthy": 2, "server/local-0/tokens_per_second": 10.0, "server/node-7/tokens_per_second": 20.0}
        )
    page = read_page(write_report(run_dir))
    assert page.data["columns"]["server/node-7/tokens_per_second"] == [None, None, None, None, 20.0]
    assert ("section", {"data-section": "fleet"}) in page.tags
    fields = re.findall(r'ofServers\("([^"]+)"\)', page.scripts["program"])
    usage = FleetUsage(1.0, {"a": ServerUsage()})
    written = fleet_metrics(usage, [ServerStats("a", "healthy", 1, 0, 0.0, 0, "")])
    assert {f"server/a/{field}" for field in fields} == {name for name in written if name.startswith("server/")} - {
        "server/a/restarts"  # drawn for the whole fleet alone
    }
    assert {name for name in written if name.startswith("fleet/")} <= METRICS.keys()


def test_header_and_table_of_time(run_dir):
    texts = read_page(write_report(run_dir)).texts
    assert "25.0 % → 90.0 %" in texts  # held-out, before step 1 to after step 4
    assert "+65.0 points, step 0 to 4" in texts
    assert "50.0 % → 80.0 %" in texts  # sampled
    assert "4 of 5" in texts
    assert "16 updates, 2 skipped" in texts
    assert "40.0 s" in texts  # four steps of 10 s
    table = texts[texts.index("Generating") :]
    assert table[:4] == ["Generating", "30.0 %", "3.000", "12.0 s"]
    assert table[4:8] == ["Verifying", "5.0 %", "0.500", "2.0 s"]
    assert table[8:12] == ["Updating", "55.0 %", "5.500", "22.0 s"]
    assert texts[texts.index("Everything else") + 1] == "10.0 %"
    outside = texts[texts.index("Where the time of a rollout step goes") + 1 :][:2]
    assert outside == [
        "10.0 %",
        "of it is spent outside generating, verifying and updating: 5.0 % on held-out evaluation, 5.0 % on everything else.",
    ]


def test_answers_of_the_ledger(run_dir):
    groups = {one["question_id"]: one for one in read_page(write_report(run_dir)).data["groups"]}
    assert groups.keys() == {"q/7", "q/9"}
    plain = groups["q/9"]
    assert (plain["step"], plain["question"], plain["gold"], plain["fate"]) == (4, "What is 2+2?", "4", "surplus")
    assert plain["correct_rate"] == pytest.approx(2 / 3)
    assert groups["q/7"]["correct_rate"] == 0.5  # the unknown one does not count
    assert [answer["label"] for answer in groups["q/7"]["answers"]] == ["correct", "wrong", "unknown"]
    assert plain["answers"][0] == {
        "text": "The answer is \\boxed{4}.",
        "cut": 0,
        "label": "wrong",
        "reason": "because",
        "finish_reason": "stop",
        "num_tokens": 4,
        "mean_logprob": -1.625,
        "weight_version": 3,
    }


def test_hostile_text_stays_text(run_dir):
    page = read_page(write_report(run_dir))
    assert sum(tag == "script" for tag, _ in page.tags) == 5  # the data, uPlot and three programs
    assert not any(tag == "img" for tag, _ in page.tags)
    hostile = next(one for one in page.data["groups"] if one["question_id"] == "q/7")
    assert hostile["question"] == hostile["answers"][0]["text"] == HOSTILE
    assert not set("<>&") & set(page.scripts["run-data"])
    assert "models/<tiny>" in page.texts  # the configuration is escaped too
    assert "innerHTML" not in page.scripts["program"].replace("never innerHTML", "")


def test_page_needs_nothing_from_outside(run_dir):
    page = read_page(write_report(run_dir))
    ours = page.text.replace("/*! https://github.com/leeoniya/uPlot (v1.6.32) */", "")  # a comment
    assert len(ours) < len(page.text)
    assert not re.search(r"https?:|//cdn|@import|url\(", ours)
    assert not [tag for tag in page.tags if {"src", "href"} & tag[1].keys() or tag[0] in ("link", "iframe", "object", "base")]
    policy = next(attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes)
    assert "default-src 'none'" in policy


def test_the_page_holds_uplot_unmodified_with_its_license(run_dir):
    page = read_page(write_report(run_dir))
    uplot = Path(report.__file__).parent / "page" / "uplot"
    program = (uplot / "uPlot.iife.min.js").read_text()
    assert hashlib.sha256(program.encode()).hexdigest() == "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"
    assert program in page.text
    assert (uplot / "LICENSE").read_text() in page.text
    assert "Copyright (c) 2022 Leon Sorokin" in page.scripts["program"]


def test_size_cap_holds_and_every_step_keeps_its_share(tmp_path):
    text = "<" * 5000  # six bytes each on the page
    for step in range(1, 7):
        groups = [group(step, k, ["correct", "wrong"], text) for k in range(20)]
        write_ledger(tmp_path / "ledger" / f"step_{step:06d}.parquet", groups, fates=["train"] * 20, meta={})
    sample = answers.sample_answers(tmp_path, max_bytes=1_000_000)
    size = len(json.dumps(sample.groups).replace("<", "\\u003c"))
    assert 900_000 < size <= 1_010_000  # 60 kB a group; 10 kB for what json.dumps pads
    counts = [sum(one["step"] == step for one in sample.groups) for step in range(1, 7)]
    assert sum(counts) == 16
    assert max(counts) - min(counts) <= 1
    assert "16 questions with 32 answers from 6 of 6 rollout steps" in sample.note
    assert "1 MB" in sample.note


def test_long_runs_show_spread_steps_and_few_groups_of_each(tmp_path):
    for step in range(1, 101):
        groups = [group(step, k, ["correct", "wrong"]) for k in range(15)]
        write_ledger(tmp_path / "ledger" / f"step_{step:06d}.parquet", groups, fates=["train"] * 15, meta={})
    sample = answers.sample_answers(tmp_path)
    steps = sorted({one["step"] for one in sample.groups})
    assert len(steps) == answers.MAX_STEPS
    assert (steps[0], steps[-1]) == (1, 100)
    assert set(np.diff(steps)) == {2, 3}  # 99 / 39 = 2.5 apart
    assert len(sample.groups) == answers.MAX_STEPS * answers.MAX_GROUPS_PER_STEP
    assert sample == answers.sample_answers(tmp_path)


def test_long_texts_lose_their_middle(tmp_path):
    text = "a" * 10_000 + "b" * 10_000
    write_ledger(tmp_path / "ledger" / "step_000001.parquet", [group(1, 0, ["wrong"], text)], fates=["train"], meta={})
    (answer,) = answers.sample_answers(tmp_path).groups[0]["answers"]
    assert answer["cut"] == 8_000
    assert answer["text"] == "a" * 6_000 + "\n[…]\n" + "b" * 6_000


def test_a_run_that_just_began(tmp_path):
    with MetricsLog(tmp_path, tensorboard=False, wandb_project=None, config={}) as log:
        log.write({"step": 1, "accuracy": 0.25})
    page = read_page(write_report(tmp_path, tmp_path / "elsewhere" / "page.html"))
    assert "This run folder has no recorded answers." in page.texts
    assert page.data["groups"] == []
    assert not (tmp_path / "report.html").exists()


def test_a_run_without_metrics_shows_what_it_has(tmp_path, capsys):
    """Such as one in which no answer was right: its configuration, its last words, and the answers of its rounds."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    for rank, seconds, message in ((0, 12.0, "none had <right> answers"), (1, 13.0, "rank 0 is gone")):
        report = {"code": 2 + rank, "message": message, "time": seconds}
        (tmp_path / "logs" / f"end_rank{rank}.json").write_text(json.dumps(report))
    (tmp_path / "logs" / "end_rank2.json").write_text("{")
    for number in range(2):
        part = tmp_path / "ledger" / "rounds" / f"step_000001_round_0{number}_part_0000.parquet"
        write_ledger(part, [group(1, number, ["wrong"])], fates=["sampled"], meta={})
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path), "--png", str(tmp_path / "overview.png")])
    assert ended.value.code == 0
    assert capsys.readouterr().out.splitlines() == [
        str(tmp_path / "report.html"),
        f"{tmp_path / 'overview.png'}: not drawn, because no rollout step has finished yet",
    ]
    page = read_page(tmp_path / "report.html")
    said = "No rollout step has finished in this run, so it has no curves. It ended with exit code 2: none had <right> answers"
    assert said in page.texts and "model models/<tiny>" in page.texts
    assert [(one["step"], one["question_id"], one["fate"]) for one in page.data["groups"]] == [
        (1, "q/0", "sampled"),
        (1, "q/1", "sampled"),
    ]
    assert any(text.startswith("A random sample of the ledger: 2 questions with 2 answers from 1 of 1 ") for text in page.texts)
    assert not any("data-section" in attributes for _, attributes in page.tags)
    assert not (tmp_path / "overview.png").exists()


def test_a_folder_without_a_run_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no run"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="holds no run"):
        write_overview_png(tmp_path, tmp_path / "overview.png")
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_user_errors_and_leave_the_old_page(run_dir):
    old = write_report(run_dir).read_bytes()
    ledger = run_dir / "ledger" / "step_000004.parquet"
    whole = ledger.read_bytes()
    ledger.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="step_000004"):
        write_report(run_dir)
    ledger.write_bytes(whole)
    (run_dir / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"config\.yaml"):
        write_report(run_dir)
    assert (run_dir / "report.html").read_bytes() == old


def test_overview_is_a_png_of_the_stated_size(run_dir):
    data = write_overview_png(run_dir, run_dir / "overview.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")) == (1800, 1050)
