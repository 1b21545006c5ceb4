"""Guest nodes while the run's folder comes and goes."""

import errno
import signal
import threading

from waiting import until

from nft_megatron.config.load import load_config
from nft_megatron.slurm import guests
from nft_megatron.slurm.job import Job
from nft_megatron.slurm.job_folder import JobFolder


def test_a_folder_that_is_away_ends_no_guests_and_their_time_limit_requeues_them(run_config, monkeypatch):
    """It is away, there, and away again when the time limit comes."""
    handlers, happened, disk = {}, [], {"away": True, "asked": 0}

    class Nodes:
        def __init__(self, *_):
            happened.append("start")

        def close(self):
            happened.append("close")

    def end(_):
        disk["asked"] += 1
        if disk["away"]:
            raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(guests, "RolloutNodes", Nodes)
    monkeypatch.setattr(guests, "_PAUSE", 0.01)
    monkeypatch.setattr(JobFolder, "end", end)
    monkeypatch.setattr(Job, "requeue", lambda *_: happened.append("requeue"))
    path = run_config()
    config = load_config(path, ["slurm.restart=requeue"])
    (config.run_dir / "slurm").mkdir(parents=True)
    job = Job("1", ("n1",), 1, float("inf"))
    thread = threading.Thread(target=guests.serve_guests, args=(config, path, job), daemon=True)
    thread.start()
    for is_away in (True, False, True):
        disk.update(away=is_away, asked=0)
        until(lambda: disk["asked"] >= 3)
    assert happened == ["start"]
    handlers[signal.SIGUSR1]()
    thread.join(120)
    assert happened == ["start", "close", "requeue"]
