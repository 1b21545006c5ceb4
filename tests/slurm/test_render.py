"""The batch script, and the steps under srun."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from nft_megatron.base.errors import UserError
from nft_megatron.cli.main import main
from nft_megatron.config.load import load_config
from nft_megatron.config.slurm import SlurmConfig
from nft_megatron.slurm.render import job_name, render, render_rollouts
from nft_megatron.slurm.steps import preflight_step, rollout_step, step_environment, trainer_step
from nft_megatron.slurm.submit import _absolute

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def config(run_config):
    def load(*overrides):
        path = run_config()
        nodes = ["cluster.trainer_nodes=2", "cluster.rollout_nodes=3"]
        return load_config(path, ["rollout.engine=vllm", *nodes, *overrides]), path

    return load


def options_of(script):
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_the_script_asks_for_what_the_configuration_says(config):
    settings, path = config(
        "slurm.account=me",
        "slurm.partition=batch",
        "slurm.time=2-12",
        "slurm.sbatch=[--qos=high, --nice=5]",
        "slurm.setup=[module load cuda]",
        "slurm.signal_seconds=900",
        "slurm.job_name=night",
        "slurm.python=/opt/python",
    )
    script = render(settings, path, ["a.b=c d"])
    options = options_of(script)
    for option in (
        "--job-name=night",
        "--nodes=5",
        "--gres=gpu:8",
        "--account=me",
        "--partition=batch",
        "--time=2-12",
        "--qos=high",
        "--nice=5",
        "--requeue",
        "--open-mode=append",
        "--signal=B:USR1@900",
        "--dependency=singleton",
        "--exclusive",
        f"--chdir={Path.cwd()}",
    ):
        assert option in options
    lines = script.splitlines()
    assert lines[0] == "#!/bin/bash"
    assert lines.index("module load cuda") > lines.index(f"#SBATCH {options[-1]}")
    assert lines[-1] == f"exec /opt/python -u -m nft_megatron slurm agent {path} 'a.b=c d'"
    assert "2 nodes train, 3 generate" in lines[1]


def words(line: str) -> list[str]:
    """A #SBATCH line as sbatch reads it, after _get_argument of its opt.c."""
    found, word, quote, i, is_word = [], "", "", 0, False
    while i < len(line):
        letter = line[i]
        if letter == "\\" and i + 1 < len(line):
            word, i, is_word = word + line[i + 1], i + 1, True
        elif quote:
            word, quote = (word, "") if letter == quote else (word + letter, quote)
        elif letter in "\"'":
            quote, is_word = letter, True
        elif letter == "#":
            break
        elif letter.isspace():
            if is_word:
                found.append(word)
            word, is_word = "", False
        else:
            word, is_word = word + letter, True
        i += 1
    assert not quote, "sbatch: unmatched quote"
    return [*found, word] if is_word else found


ODD = ("my runs", "run #3", "100%", "50%j", "it's", 'a "b"', "a=b", "Läufe", "a,b", "$HOME", "a;b", "~", "x%%j")


@pytest.mark.parametrize("name", ODD)
def test_any_folder_and_any_name_reach_sbatch_as_they_are(config, tmp_path, monkeypatch, name):
    here = tmp_path / f"here {name}"
    here.mkdir()
    monkeypatch.chdir(here)
    settings, path = config()
    settings = settings.model_copy(update={"run_dir": Path("runs") / name})
    for script in (render(settings, path), render_rollouts(settings, path, 2)):
        read = [word for line in options_of(script) for word in words(line)]
        assert len(read) == len(options_of(script)), "each line is one option"
        assert f"--chdir={here}" in read
        (output,) = (word.removeprefix("--output=") for word in read if word.startswith("--output="))
        folder = output.rpartition("/")[0]
        assert folder.replace("%%", "%") == str(here / "runs" / name / "slurm") and "%" not in folder.replace("%%", "")
        (job,) = (word.removeprefix("--job-name=") for word in read if word.startswith("--job-name="))
        assert re.fullmatch(r"[A-Za-z0-9_.+:@-]+", job), job
    step = trainer_step(settings, path, ["n1"], 8, here / "runs" / name / "log")
    assert f"--output={here}/runs/{name}/log".replace("%", "%%") in step
    assert f"--error={here}/runs/{name}/log".replace("%", "%%") in step


def test_runs_of_like_names_are_different_jobs(config, tmp_path):
    names = [job_name(config(f"run_dir={tmp_path}/{name}")[0]) for name in ("a b", "a-b", "a,b", "a  b")]
    assert len(set(names)) == 4 and all(name.startswith("a-b-") for name in names)
    assert job_name(config("slurm.job_name='my night, run 1'")[0]) == "my-night-run-1"


def test_own_options_may_have_spaces_and_quotes_of_their_own(config):
    own = ["--comment=for tuesday", "--comment='a  b'", "--qos high", "--mail-type=END --nice=3", "-x n1", "--comment=a#b"]
    settings, path = config(f"slurm.sbatch={json.dumps(own)}")
    read = [words(line) for line in options_of(render(settings, path))][-len(own) :]
    assert read == [
        ["--comment=for tuesday"],
        ["--comment=a  b"],
        ["--qos", "high"],
        ["--mail-type=END", "--nice=3"],
        ["-x", "n1"],
        ["--comment=a#b"],
    ]


@pytest.mark.parametrize("path", ["a\\b", "a\nb", "a\tb"])
def test_paths_that_slurm_cannot_write_to_are_refused(config, path):
    settings = config()[0].model_copy(update={"run_dir": Path("runs") / path})
    with pytest.raises(UserError, match=r"run_dir = .*Slurm cannot write files to such a path; use no backslash"):
        render(settings, Path("config.yaml"))


LINE_BREAKS = {
    ("job_name", "account", "partition"): [r'"x\ntouch PWNED\n#"', r'"x\rid"', r'"x\x85id"'],
    ("gres", "sbatch", "python"): [r'"/a:1\nid"', r'"/a\eid"', r'"/a\x85id"'],
    ("container_image", "container_mounts"): [r'"/a:/b\nid"', r'"/a\tid"'],
}
HOSTILE = {
    **{f"slurm.{key}": values for keys, values in LINE_BREAKS.items() for key in keys},
    "run_dir": [r'"runs/a\nid\n/run"', r'"runs/a\tb"', r'"runs/a\x7f"'],
    "slurm.gres ": ["gpu:{gpu}", "'gpu:{'", "'gpu:}'", "'{}'", "'{0}'", "'{{gpus_per_node}}'"],
    "slurm.gres  ": ["gpu:{gpus_per_node.__class__.__mro__}", "'{gpus_per_node!r}'", "'{gpus_per_node:>9}'"],
    "slurm.time": ["-5", "'-5'", "'-1:00:00'", "1:-5", "0", "'0'", "0:00:00", "0-0", "99999999999-00", "99999-0"],
    "slurm.time ": [r"'1:00:00\nid'", r'"1:00:00\nid"', "1:2:3:4", "٣", "1e3", "true", "-0.5", "''"],
    **{f"slurm.{key}": [0, -5] for key in ("signal_seconds", "preflight_seconds", "chain_jobs", "max_failures")},
}
"""Values by key, as an override has them; white space tells several lines of a key apart."""


@pytest.mark.parametrize(("key", "value"), [(key.strip(), value) for key, values in HOSTILE.items() for value in values])
def test_what_would_add_to_the_script_is_refused_by_its_key(config, key, value):
    with pytest.raises(UserError) as refused:
        config(f"{key}={value}")
    assert str(refused.value).startswith(f"{key} = ") and "; " in str(refused.value) and str(refused.value).isprintable()


def test_render_says_so_with_exit_code_2(config, monkeypatch, capsys):
    monkeypatch.setattr(os, "_exit", sys.exit)
    _, path = config()
    for override in ('slurm.account="a\\nrm -rf $HOME"', "slurm.sbatch=--uid=0"):
        with pytest.raises(SystemExit) as end:
            main(["slurm", "render", str(path), override])
        said = capsys.readouterr()
        assert (end.value.code, said.out) == (2, "")
        assert said.err.startswith(f"nft-megatron: {override.partition('=')[0]} = ") and said.err.count("\n") == 1


ODD_TEXT = ("my job", "$(touch PWNED)`id`", "a --uid=root", "p\"'; id", "a #b", "100%j", "a\\", "ü", "-x", "--wrap=id", "'")


@pytest.mark.parametrize("text", ODD_TEXT)
def test_odd_text_of_one_line_stays_within_its_option(config, text):
    settings, path = config()
    fields = {"job_name": text, "account": text, "partition": text, "gres": text, "python": Path(text)}
    settings = settings.model_copy(update={"slurm": SlurmConfig(**fields)})
    plain = render(config()[0], path)
    for script in (render(settings, path), render_rollouts(settings, path, 2)):
        read = [words(line) for line in options_of(script)]
        assert all(len(line) == 1 for line in read), "each line is one option"
        found = dict(line[0].split("=", 1) for line in read if "=" in line[0])
        assert (found["--account"], found["--partition"], found["--gres"]) == (text, text, text)
        body = [line for line in script.splitlines() if line and not line.startswith("#")]
        assert body[:-1] == [line for line in plain.splitlines() if line and not line.startswith("#")][:-1]
        assert shlex.split(body[-1])[:2] == ["exec", text]


def test_a_current_folder_that_no_line_can_hold_is_refused(config, tmp_path, monkeypatch):
    settings, path = config()
    (tmp_path / "a\nb").mkdir()
    monkeypatch.chdir(tmp_path / "a\nb")
    with pytest.raises(UserError, match=r"^the current folder = .*a\\nb: the batch script cannot name it; start from"):
        render(settings, path)


def test_placeholders_of_gres_are_filled_in(config):
    for gres, filled in (("gpu:h100:{gpus_per_node}", "gpu:h100:8"), ("gpu:{gpus_per_node},nvme:1", "gpu:8,nvme:1")):
        settings, path = config(f"slurm.gres={json.dumps(gres)}")
        assert f"--gres={filled}" in options_of(render(settings, path))


def test_a_real_sbatch_reads_it(lab, config, tmp_path, monkeypatch):
    """And writes the job's log where the script says."""
    here, out = tmp_path / "my folder #1", tmp_path / "my folder #1" / "100% 'runs'" / "slurm"
    here.mkdir()
    monkeypatch.chdir(here)
    own = 'slurm.sbatch=["--comment=for tuesday"]'
    settings, path = config("cluster.trainer_nodes=1", "cluster.rollout_nodes=0", "slurm.gres=''", "slurm.time=5", own)
    settings = settings.model_copy(update={"run_dir": here / "100% 'runs'"})
    out.mkdir(parents=True)
    script = render(settings, path).rpartition("exec ")[0] + "pwd\n"
    (here / "job.sh").write_text(script)
    job = lab.run("sbatch", "--parsable", here / "job.sh").stdout.strip()
    state = lab.wait_state(job, "COMPLETED")
    assert (state["JobName"], state["Comment"]) == (job_name(settings), "for tuesday")
    assert (out / f"job_{job}.log").read_text() == f"{here}\n"


def test_a_site_that_forbids_requeueing_gets_no_request_for_it(config):
    settings, path = config("slurm.restart=chain", "slurm.gres=''")
    options = options_of(render(settings, path))
    assert "--no-requeue" in options and "--requeue" not in options
    assert not [option for option in options if option.startswith("--gres")]


def test_guests_are_an_array_of_single_nodes(config):
    settings, path = config()
    options = options_of(render_rollouts(settings, path, 4))
    assert {"--array=1-4", "--nodes=1", "--requeue"} <= set(options)
    assert "--dependency=singleton" not in options


def test_rollout_nodes_need_an_engine_that_asks_them(config):
    settings, path = config("rollout.engine=embedded")
    with pytest.raises(UserError, match=r"rollout.engine = embedded: uses no servers"):
        render(settings, path)


@pytest.mark.parametrize(
    ("value", "kept"), [("24:00:00", "24:00:00"), (86400, "24:00:00"), (5400, "1:30:00"), ("2-12", "2-12"), ("90", "90")]
)
def test_time_limits_survive_yaml(value, kept):
    assert SlurmConfig(time=value).time == kept


def test_steps_put_every_process_where_it_belongs(config, tmp_path):
    settings, path = config("fleet.tensor_parallel=4")
    train = trainer_step(settings, path, ["n1", "n2"], 96, tmp_path / "log")
    assert {"--nodes=2", "--nodelist=n1,n2", "--ntasks=16", "--ntasks-per-node=8", "--cpus-per-task=12", "--gres=gpu:8"} <= set(
        train
    )
    assert train[-3:] == ["nft_megatron", "train", str(path)]
    serve = rollout_step(settings, path, "n4", 96, tmp_path / "log")
    assert {"--nodes=1", "--nodelist=n4", "--ntasks=2", "--cpus-per-task=48"} <= set(serve)
    assert serve[serve.index("serve") :] == ["serve", str(path), "--devices=auto", "fleet.host=0.0.0.0"]
    look = preflight_step(settings, ["n1", "n2", "n3"], 96, tmp_path)
    assert {"--ntasks=24", "--gpus=8"} <= set(look)
    assert not [option for option in look if "servers-python" in option]


def test_the_preflight_compares_nccl_where_weights_go_by_broadcast_to_another_environment(config, tmp_path):
    settings, _ = config("fleet.weights=transfer", "fleet.python=/vllm/bin/python", "rollout.engine=vllm")
    assert "--servers-python=/vllm/bin/python" in preflight_step(settings, ["n1"], 96, tmp_path)


def test_containers_are_for_the_steps_and_not_for_the_agent(config, tmp_path):
    settings, path = config("slurm.container_image=/images/nft.sqsh", "slurm.container_mounts=[/shared:/shared, /data]")
    train = trainer_step(settings, path, ["n1"], 96, tmp_path / "log")
    assert {"--container-image=/images/nft.sqsh", "--container-mounts=/shared:/shared,/data", "python3"} <= set(train)
    assert not [option for option in options_of(render(settings, path)) if "container-" in option]


def test_what_is_submitted_has_paths_that_hold_anywhere(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings, _ = config(
        "fleet.python=env/python", "slurm.python=python3", "data.train=[a.parquet, b.parquet]", "run_dir=runs/a"
    )
    absolute = _absolute(settings)
    assert absolute.fleet.python == tmp_path / "env/python"
    assert absolute.slurm.python == Path("python3"), "is looked up where it runs"
    assert absolute.data.train == (tmp_path / "a.parquet", tmp_path / "b.parquet")
    assert absolute.run_dir == tmp_path / "runs/a"
    assert absolute.model_copy(update={name: getattr(settings, name) for name in ("fleet", "data", "run_dir")}) == settings


def test_a_step_does_not_inherit_the_numbers_of_another(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for name in ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_ID", "SLURM_CPU_BIND"):
        monkeypatch.setenv(name, "3")
    environment = step_environment({"MASTER_PORT": "1"})
    assert {name: value for name, value in environment.items() if name.startswith("SLURM")} == {"SLURM_JOB_ID": "7"}
    assert environment["MASTER_PORT"] == "1"
