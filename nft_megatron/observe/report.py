"""One self-contained HTML page about a run: its curves, where its time went, its recorded answers.

The page loads nothing: style, scripts and data are inside, and its content-security policy forbids the network. What a model
wrote is untrusted: it travels as JSON in which no character can end the script element, and the page sets it as text only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from nft_megatron.base.atomic_io import atomic_file
from nft_megatron.config.load import flatten
from nft_megatron.config.yaml import read_sections
from nft_megatron.observe.answers import AnswerSample, sample_answers
from nft_megatron.observe.embed import json_for_script
from nft_megatron.observe.metrics import METRICS, MetricsRow
from nft_megatron.observe.progress import format_duration
from nft_megatron.observe.summary import TIME_GROUPS, finite_points, held_out_points, last_words, load_rows, phase_seconds

_PAGE = Path(__file__).parent / "page"

# Fields of RUN/config.yaml that the header names, with their unit.
_SUMMARY = (
    ("algorithm.name", "{}"),
    ("model.path", "model {}"),
    ("rollout.questions_per_step", "{} questions per step"),
    ("rollout.group_size", "{} answers per question"),
    ("train.updates_per_step", "{} updates per step"),
    ("optimizer.learning_rate", "learning rate {}"),
    ("seed", "seed {}"),
)


def write_report(run_dir: Path | str, out: Path | str | None = None) -> Path:
    """Write the page to ``out`` (RUN/report.html), whole or not at all, and return its path.

    Raises:
        UserError: the folder is missing, no run has left anything in it, or it holds an unreadable file.
    """
    run_dir = Path(run_dir)
    rows = load_rows(run_dir)
    out = run_dir / "report.html" if out is None else Path(out)
    page = _render(run_dir, rows)
    with atomic_file(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return out


def _read_config(run_dir: Path) -> dict[str, Any]:
    """RUN/config.yaml as {"section.key": value}; empty where there is none."""
    path = run_dir / "config.yaml"
    return flatten(read_sections(path)) if path.exists() else {}


def _render(run_dir: Path, rows: list[MetricsRow]) -> str:
    config, answers = _read_config(run_dir), sample_answers(run_dir)
    environment = Environment(loader=FileSystemLoader(_PAGE), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("report.html").render(
        name=run_dir.resolve().name,
        summary=[form.format(config[key]) for key, form in _SUMMARY if key in config],
        tiles=_tiles(rows, config) if rows else [],
        time=_time_table(rows) if rows else None,
        last_words="" if rows else last_words(run_dir),
        answers_note=answers.note,
        config=list(config.items()),
        metrics=list(METRICS.values()),
        data=Markup(json_for_script(page_data(rows, answers))),
        uplot_css=_read("uplot/uPlot.min.css"),
        css=_read("report.css"),
        uplot_js=_comment(_read("uplot/LICENSE")) + _read("uplot/uPlot.iife.min.js"),
        charts_js=_read("charts.js"),
        panels_js=_read("panels.js"),
        answers_js=_read("answers.js"),
    )


def _read(name: str) -> Markup:
    """A file of the page, which is ours and so goes into it as it is."""
    return Markup((_PAGE / name).read_text(encoding="utf-8"))


def _comment(text: Markup) -> Markup:
    return Markup("/*\n") + text + Markup("\n*/\n")


def page_data(rows: Sequence[Mapping[str, Any]], answers: AnswerSample) -> dict[str, Any]:
    """What the scripts read: ``steps``, ``columns`` {name: one value per step, None where absent}, ``held_out``
    [[rollout steps done, accuracy]], ``groups``.

    The column ``time/rest`` is what the stacked chart shows as one: publish, ledger, save and other.
    """
    names = dict.fromkeys(name for row in rows for name in row if name != "step")
    columns = {name: [_compact(row.get(name)) for row in rows] for name in names}
    rest = [f"time/{phase}" for phase in TIME_GROUPS["Everything else"] if phase != "evaluate"]
    columns["time/rest"] = [_compact(math.fsum(row.get(name, 0.0) for name in rest)) for row in rows]
    return {
        "steps": [row["step"] for row in rows],
        "columns": columns,
        "held_out": [[step, _compact(accuracy)] for step, accuracy in held_out_points(rows)],
        "groups": answers.groups,
    }


def _compact(value: Any) -> Any:
    """Floats at six significant digits, half the size on the page; what is not finite is a gap."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if math.isfinite(share) else "–"


def _tiles(rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> list[dict[str, str]]:
    """The header's key numbers, starting with accuracy before and after."""
    tiles = []
    for label, points in (
        ("Held-out accuracy", held_out_points(rows)),
        ("Accuracy of sampled answers", finite_points(rows, "accuracy")),
    ):
        if points:
            (first_step, before), (last_step, after) = points[0], points[-1]
            note = f"{100 * (after - before):+.1f} points, step {first_step} to {last_step}"
            tiles.append(_tile(label, f"{_percent(before)} → {_percent(after)}", note))
    planned = f" of {config['train.num_steps']}" if "train.num_steps" in config else ""
    num_skipped = sum(row.get("skipped_updates", 0) for row in rows)
    tiles.append(
        _tile("Rollout steps", f"{rows[-1]['step']}{planned}", f"{rows[-1].get('updates', '–')} updates, {num_skipped} skipped")
    )
    seconds = math.fsum(phase_seconds(rows).values())
    tiles.append(_tile("Time", format_duration(seconds), f"{format_duration(seconds / len(rows))} per step"))
    return tiles


def _tile(label: str, value: str, note: str) -> dict[str, str]:
    return {"label": label, "value": value, "note": note}


def _time_table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Shares of the time: ``lines`` (each group and, where it has several, its phases) and the part outside the work itself."""
    seconds = phase_seconds(rows)
    total = math.fsum(seconds.values()) or math.nan

    def line(label: str, phases: Sequence[str], is_group: bool) -> dict[str, Any]:
        spent = math.fsum(seconds[phase] for phase in phases)
        return {
            "label": label,
            "is_group": is_group,
            "share": spent / total,
            "percent": _percent(spent / total),
            "mean": f"{spent / len(rows):.3f}",
            "total": format_duration(spent),
        }

    lines = []
    for label, phases in TIME_GROUPS.items():
        lines.append(line(label, phases, is_group=True))
        if len(phases) > 1:
            lines += [line(METRICS[f"time/{phase}"].meaning, [phase], is_group=False) for phase in phases]
    outside = math.fsum(seconds[phase] for phase in TIME_GROUPS["Everything else"])
    return {
        "lines": lines,
        "outside": _percent(outside / total),
        "evaluate": _percent(seconds["evaluate"] / total) if seconds["evaluate"] else "",
        "rest": _percent((outside - seconds["evaluate"]) / total),
    }
