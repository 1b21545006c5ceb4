"""The agent on a job's first node: checks the nodes, starts trainers and servers, and decides what follows their end.

    preflight on all nodes ──▶ servers on the last cluster.rollout_nodes nodes, each in a restart loop
                          └──▶ trainers on the others, until they end ──▶ finished: the job ends
                                                                     ├──▶ told to stop, or cannot continue: the job ends
                                                                     └──▶ else the job is requeued, without nodes to blame

Signals: USR1 (before the time limit, or `scancel --signal=USR1 --batch`) becomes the file RUN/stop, which the trainers watch
for: they save and exit, and the job is requeued. TERM (preemption, `scancel`) reaches the ranks directly.
"""

from __future__ import annotations

import logging
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from nft_megatron.base.atomic_io import atomic_file
from nft_megatron.base.deadline import Deadline
from nft_megatron.base.errors import EXIT_STALLED, EXIT_STOPPED_EARLY, EXIT_USER_ERROR, StoppedEarly, UserError
from nft_megatron.base.ports import free_port
from nft_megatron.base.run_folder import RunFolder
from nft_megatron.config.load import dump_config
from nft_megatron.config.schema import Config
from nft_megatron.lifecycle.exit_report import read_exit_reports
from nft_megatron.lifecycle.stop_requests import SIGNALS
from nft_megatron.slurm.cause import Cause, find_cause, read_tail
from nft_megatron.slurm.decide import Decision, decide
from nft_megatron.slurm.job import Job
from nft_megatron.slurm.job_folder import Attempt, JobFolder
from nft_megatron.slurm.preflight import read_preflight
from nft_megatron.slurm.rollout_nodes import RolloutNodes, end_step
from nft_megatron.slurm.steps import preflight_step, rollout_step, step_environment, trainer_step
from nft_megatron.slurm.tools import address

log = logging.getLogger(__name__)

_PAUSE = 0.5
_BY_SIGNAL = re.compile(r"by SIGTERM|: Terminated$")
_EARLY_SECONDS = 90.0
"""How much too early Slurm's signal may come, in seconds."""
_LONGEST_RESERVE, _RESERVE_SHARE = 180.0, 0.2
"""Reserve before the time limit, in seconds and as a share of the time left, for the agent to end steps and requeue the job."""
_FOLDER_SECONDS, _FOLDER_PAUSE = 600.0, 2.0


class Agent:
    """One attempt of a run. Trainers and servers read the copy of ``config`` in RUN/slurm."""

    def __init__(self, config: Config, job: Job) -> None:
        self._config, self._job = config, job
        self._run = RunFolder(config.run_dir.resolve())
        self._folder = JobFolder(self._run)
        self._asked: str | None = None
        self._out_of_time = False
        self._reserve = min(_LONGEST_RESERVE, _RESERVE_SHARE * (job.end - time.time()))
        self._terminated = threading.Event()
        self._excluded: dict[str, str] = {}
        self._attempt: Attempt
        self._logs: Path

    def conduct(self) -> None:
        """Run until the trainers have ended, then finish, requeue the job or give up.

        Raises:
            StoppedEarly: the run continues in the next job of the chain.
            UserError: it cannot continue.
        """
        # A script submitted by hand with sbatch has no folder yet at its first start.
        if not self._can_write(self._folder.root, make_folder=not self._job.num_restarts):
            self._continue()
            return
        self._close_lost_attempts()
        if (end := self._folder.end()) is not None:
            log.warning("the run is already %s: %s", *end)
            return
        self._run.stop.unlink(missing_ok=True)  # left by an attempt that ended before reading it; only later requests count
        signal.signal(signal.SIGUSR1, self._on_signal)
        signal.signal(signal.SIGTERM, self._on_signal)
        if self._folder.stopping.exists():
            self._folder.set_end("stopped", "nft-megatron slurm stop")
            return
        self._begin()
        try:
            kind, cause = self._try()
        except Exception as error:  # agent bugs must not kill the run
            log.exception("fault in the agent")
            kind, cause = "failed", Cause(1, f"the agent: {type(error).__name__}: {error}")
        if not self._can_write(self._logs):
            self._continue()  # the next attempt closes this one
            return
        self._keep_logs()
        self._attempt = replace(
            self._attempt,
            ended=time.time(),
            kind=kind,
            cause=cause.text,
            blamed=cause.blamed,
            progress=self._folder.progress(),
        )
        self._folder.save_attempt(self._attempt)
        self._act(
            decide(
                self._folder.attempts_since_submit(),
                self._config.slurm,
                stopped=self._folder.stopping.exists(),
                excluded=self._excluded,
            )
        )

    def _read_excluded(self) -> dict[str, str]:
        try:
            return self._folder.excluded()
        except UserError as error:  # people may edit it, and nobody is there to repair it now
            log.warning("using all nodes: %s", error)
            return {}

    # ------------------------------------------------------------------------------------------------------ the attempt

    def _close_lost_attempts(self) -> None:
        """Close the attempts that never recorded their end."""
        for earlier in self._folder.attempts():
            if earlier.kind is None:
                self._folder.save_attempt(
                    replace(
                        earlier,
                        ended=time.time(),
                        kind="lost",
                        progress=self._folder.progress(),
                        cause=f"the agent on {earlier.nodes[0]} disappeared: node lost, job killed or preempted",
                    )
                )
                self._keep_logs(self._folder.logs(earlier.number))

    def _begin(self) -> None:
        number = 1 + max((attempt.number for attempt in self._folder.attempts()), default=0)
        self._excluded = self._read_excluded()
        self._attempt = Attempt(number, self._job.id, self._job.nodes, time.time(), progress_before=self._folder.progress())
        self._logs = self._folder.logs(number)
        self._logs.mkdir(parents=True, exist_ok=True)
        with atomic_file(self._folder.config) as temporary:  # the script may have been submitted by hand
            temporary.write_text(dump_config(self._config))
        self._folder.set_job_id(self._job.id)
        self._folder.save_attempt(self._attempt)
        log.warning("attempt %d on %s", self._attempt.number, " ".join(self._job.nodes))

    def _try(self) -> tuple[str, Cause]:
        """The kind of the :class:`Attempt` and the cause of its end."""
        environment = step_environment(
            {
                "MASTER_ADDR": address(self._job.nodes[0]),
                "NFT_MEGATRON_ATTEMPT": str(self._attempt.number),
                "NFT_MEGATRON_END_TIME": str(self._job.end - self._reserve),
            }
        )
        if self._config.slurm.preflight and (found := self._preflight(environment)) is not None:
            return found
        trainers = self._job.nodes[: self._config.cluster.trainer_nodes]
        others = self._job.nodes[len(trainers) :]
        rollouts = RolloutNodes(
            others,
            lambda node: rollout_step(
                self._config, self._folder.config, node, self._job.cpus_per_node, self._logs / f"rollout_{node}.log"
            ),
            environment,
        )
        try:
            return self._train(trainers, environment)
        finally:
            rollouts.close()

    def _preflight(self, environment: dict[str, str]) -> tuple[str, Cause] | None:
        """None if all nodes are good."""
        folder = self._logs / "preflight"
        folder.mkdir()
        command = preflight_step(self._config, self._job.nodes, self._job.cpus_per_node, folder)
        step = subprocess.Popen(command, env=environment | {"MASTER_PORT": str(free_port())}, stdin=subprocess.DEVNULL)
        with suppress(subprocess.TimeoutExpired):
            step.wait(self._config.slurm.preflight_seconds + 30)
        # A preemption reaches the tasks first, and their silence says nothing about the nodes; after a segfault it does.
        by_signal = step.poll() in [128 + number for number in SIGNALS]
        end_step(step, 10)
        if by_signal or self._asked or self._terminated.is_set():
            kind = "short" if self._out_of_time else "left"
            return kind, Cause(EXIT_STOPPED_EARLY, f"{self._asked or 'ended by a signal'} during the preflight")
        found = read_preflight(folder, self._job.nodes)
        if found.bad:
            text = "; ".join(f"{node}: {reason}" for node, reason in found.bad.items())
            return "bad nodes", Cause(1, text, tuple(found.bad))
        return ("failed", Cause(1, f"preflight: {found.problem}")) if found.problem else None

    def _train(self, nodes: Sequence[str], environment: dict[str, str]) -> tuple[str, Cause]:
        output = self._logs / "trainer.log"
        command = trainer_step(self._config, self._folder.config, nodes, self._job.cpus_per_node, output)
        srun_log = self._logs / "srun.log"
        with srun_log.open("w") as errors:
            step = subprocess.Popen(
                command, env=environment | {"MASTER_PORT": str(free_port())}, stdin=subprocess.DEVNULL, stderr=errors
            )
            late, silent = self._wait(step)
        per_node = self._config.cluster.gpus_per_node
        node_of_rank = [node for node in nodes for _ in range(per_node)]
        text = read_tail(output) + "\n" + read_tail(srun_log)
        reports = read_exit_reports(self._run.root)
        cause = find_cause(step.returncode, reports, text, node_of_rank)
        if silent and not reports:
            text = f"rank 0 on {nodes[0]} gave no sign of life for {self._config.deadlines.heartbeat_seconds:g} s"
            return "failed", Cause(EXIT_STALLED, text, (nodes[0],))
        if cause.code == 0:
            return "finished", cause
        if cause.code == EXIT_USER_ERROR:
            return "wrong", cause
        terminated = self._terminated.is_set() or _BY_SIGNAL.search(cause.text)  # a preemption reaches the ranks first
        asked = self._asked or ("Slurm ended it (preemption, a lost node, scancel)" if terminated else None)
        if late or self._out_of_time:
            return "short", Cause(cause.code, f"{late or asked}: {cause.text}")
        if asked:
            return "left", Cause(cause.code, f"{asked}: {cause.text}")
        return ("short" if cause.code == EXIT_STOPPED_EARLY else "failed"), cause

    def _wait(self, step: subprocess.Popen) -> tuple[str | None, bool]:
        """Wait until the trainers have ended, or had to be ended: too close to the time limit, or with a silent rank 0."""
        while step.poll() is None:
            if time.time() > self._job.end - self._reserve / 2:
                end_step(step, 10)
                return "the time limit came before they had saved", False
            if self._is_silent():
                end_step(step, 10)
                return None, True
            time.sleep(_PAUSE)
        return None, False

    def _is_silent(self) -> bool:
        """Whether rank 0 of this attempt has touched its file, but not for too long."""
        try:
            touched = self._run.heartbeat.stat().st_mtime
        except OSError:
            return False
        return self._attempt.began < touched < time.time() - self._config.deadlines.heartbeat_seconds

    def _on_signal(self, number: int, frame: object) -> None:
        if number == signal.SIGTERM:
            self._terminated.set()
            return
        self._asked = "a person's USR1"
        if self._job.end - time.time() < self._config.slurm.signal_seconds + _EARLY_SECONDS:
            self._asked, self._out_of_time = "the time limit is near", True
        with suppress(OSError):
            self._run.stop.write_text(f"{self._asked}\n")

    # ------------------------------------------------------------------------------------------------------ what follows

    def _can_write(self, folder: Path, *, make_folder: bool = False) -> bool:
        """Wait for the shared ``folder``, which may be unreachable or full: until then nothing can be decided."""
        deadline = Deadline.of(_FOLDER_SECONDS)
        while True:
            try:
                with atomic_file(folder / "probe", make_folder=make_folder) as probe:
                    probe.write_bytes(bytes(1 << 16))
                (folder / "probe").unlink()
                return True
            except OSError as error:
                if deadline.has_passed:
                    return False
                log.warning("waiting for %s: %s", folder, error)
                time.sleep(_FOLDER_PAUSE)

    def _keep_logs(self, folder: Path | None = None) -> None:
        """Move the ranks' reports to the attempt's own folder, where the next attempt does not overwrite them."""
        for pattern in ("end_rank*.json", "fault_rank*.txt", "stall_rank*.txt", "phase_rank*.txt"):
            for path in (self._run.root / "logs").glob(pattern):
                with suppress(OSError):
                    shutil.move(path, (folder or self._logs) / path.name)
        if self._asked:
            self._run.stop.unlink(missing_ok=True)  # unused if the trainers ended before seeing it

    def _act(self, decision: Decision) -> None:
        log.warning("attempt %d: %s. %s", self._attempt.number, decision.action, decision.reason)
        if decision.action == "fatal":
            self._folder.set_end("fatal", decision.reason)
            raise UserError(
                "run",
                self._run.root,
                decision.reason,
                f"read {self._logs}, fix the cause, and submit again (it resumes from the last checkpoint)",
            )
        if decision.action != "continue":
            self._folder.set_end(decision.action, decision.reason)
            return
        if decision.exclude:
            self._excluded |= decision.exclude
            self._folder.set_excluded(self._excluded)
        self._continue(decision.reason)

    def _continue(self, reason: str = "the run folder is unreachable or full") -> None:
        if self._config.slurm.restart == "requeue":
            self._job.requeue(self._excluded)
            return
        self._job.exclude_from_those_that_wait(self._excluded)
        raise StoppedEarly(f"{reason}; the next job of the chain resumes it")
