"""Real vLLM servers that are killed, stopped and cut off at random while they generate: is every answer there, once, and right?

Two servers of a tiny random model run behind proxies on this machine, supervised by the fleet and asked by its engine. In
each of --faults calls one of them is struck when a random share of the answers has come: `kill -9` of all its processes (a
successor starts in its place, with the model folder's weights, not those last published), SIGSTOP for --pause seconds, or a
network that delivers nothing for as long. A call asks --questions x 16 answers. After each call: every answer is there exactly
once, none was broken off, all carry the published version, and their log-probs are those of transformers' forward pass under
the published weights, which are not the folder's. Prints a line a call and fails at the first where that is not so. Needs vLLM
(`make vllm`).
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from nft_megatron.base.records import Completion, Request, Sampling
from nft_megatron.config.fleet import FleetConfig
from nft_megatron.rollout.fleet.engine import FleetEngine
from nft_megatron.rollout.fleet.fleet import Fleet
from nft_megatron.rollout.fleet.server import Server, ServerSettings

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from tcp_proxy import Proxy

START_SECONDS = 300.0
VERSION = 7


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--faults", type=int, default=20, help="(%(default)s)")
    add("--pause", type=float, default=30.0, help="seconds of a stop or a cut (%(default)s)")
    add("--silence", type=float, default=10.0, help="seconds after which a silent server has failed (%(default)s)")
    add("--questions", type=int, default=16, help="of a call, 16 answers each (%(default)s)")
    add("--tokens", type=int, default=300, help="of the longest answer (%(default)s)")
    add("--seed", type=int, default=0, help="of the faults and their moments (%(default)s)")
    return parser.parse_args()


class Place:
    """Where a server lives: behind one address, whoever serves there."""

    def __init__(self, settings: ServerSettings, name: str) -> None:
        self._settings, self._name = settings, name
        self.server = Server(settings, name, seed=1)
        self.proxy = Proxy(self._port)

    @property
    def _port(self) -> int:
        return int(self.server.url.rsplit(":", 1)[1])

    def strike(self, fault: str, pause: float) -> None:
        """Returns when the fault is over; a successor needs longer to be there."""
        if fault == "kill":
            os.killpg(self.server.process.pid, signal.SIGKILL)
            self.server.stop(0)
            self.server = Server(self._settings, self._name, seed=1)
            self.proxy.backend = self._port
            return
        if fault == "stop":
            os.killpg(self.server.process.pid, signal.SIGSTOP)
        else:
            self.proxy.pause()
        time.sleep(pause)
        if fault == "stop":
            os.killpg(self.server.process.pid, signal.SIGCONT)
        else:
            self.proxy.resume()


def make_model(folder: Path, seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    model = Qwen2ForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def check(completions: list[Completion], requests: list[Request], model: torch.nn.Module) -> float:
    """The largest difference of a log-prob; raises where an answer is missing, doubled, broken off or of other weights."""
    asked = Counter((request.request_id, k) for request in requests for k in range(len(request.seeds)))
    got = Counter((c.request_id, c.index) for c in completions)
    assert got == asked, f"lost {sum((asked - got).values())}, doubled {sum((got - asked).values())}"
    assert {c.weight_version for c in completions} == {VERSION} and "abort" not in {c.finish_reason for c in completions}
    worst = 0.0
    for c in completions:
        prompt = requests[c.request_id].prompt_tokens
        row = torch.tensor([[*prompt.tolist(), *c.tokens.tolist()]])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(row).logits[0, len(prompt) - 1 : -1].double(), dim=-1)
        taken = logprobs.gather(1, torch.from_numpy(c.tokens).long()[:, None])[:, 0].numpy()
        worst = max(worst, float(np.abs(c.logprobs - taken).max()))
    assert worst < 1e-3, f"a log-prob differs by {worst}"
    return worst


def main() -> None:
    arguments = parse_arguments()
    rng = random.Random(arguments.seed)
    folder = Path(tempfile.mkdtemp(prefix="fleet_faults_"))
    make_model(folder / "model", seed=0)
    model = make_model(folder / "published", seed=1)
    settings = ServerSettings(
        folder / "model",
        folder / "fleet",
        folder / "logs",
        "secret",
        dtype="float32",
        arguments=("--skip-tokenizer-init", "--no-enable-chunked-prefill"),
    )
    settings.folder.mkdir()
    (folder / "key").write_text("secret")
    places = [Place(settings, f"place-{index}") for index in range(2)]
    section = FleetConfig(
        urls=tuple(place.proxy.url for place in places),
        key_file=folder / "key",
        silence_seconds=arguments.silence / 2,
        sync_seconds=120.0,
        wait_seconds=START_SECONDS,
    )
    fleet = Fleet(section, settings, folder / "weights")
    fleet.start()
    engine = FleetEngine(
        fleet, folder / "model", silence_seconds=arguments.silence, max_attempts=10, servers_seconds=START_SECONDS
    )
    sampling = Sampling(max_tokens=arguments.tokens, stop_token_ids=(1,))
    prompts = np.random.default_rng(0).integers(0, 64, (arguments.questions, 12)).astype(np.int32)
    print(f"# python {' '.join(sys.argv)} · {os.cpu_count()} cores, two vLLM servers")
    try:
        wait_for_both(fleet, first=True)
        engine.load(((name, tensor) for name, tensor in model.state_dict().items() if name != "lm_head.weight"), VERSION)
        wait_for_both(fleet)
        for _ in range(2):  # the first call is slower than those that follow
            requests = make_requests(prompts, 0)
            started = time.monotonic()
            completions = list(engine.generate(requests, sampling))
            seconds = time.monotonic() - started
            check(completions, requests, model)
        print(f"without a fault: {seconds:.1f} s for {16 * len(requests)} answers", flush=True)
        print("| fault        |  after |   call | asked again | wasted tokens | log-prob differs by |")
        print("|--------------|-------:|-------:|------------:|--------------:|--------------------:|")
        faults = (["kill", "stop", "cut"] * arguments.faults)[: arguments.faults]
        rng.shuffle(faults)
        for number, fault in enumerate(faults, start=1):
            wait_for_both(fleet)
            engine.take_metrics()
            requests = make_requests(prompts, number)
            share, place = rng.uniform(0.02, 0.7), rng.choice(places)
            striker = threading.Thread(target=place.strike, args=(fault, arguments.pause))
            started = time.monotonic()
            completions = []
            for completion in engine.generate(requests, sampling):
                completions.append(completion)
                if striker.ident is None and len(completions) >= share * 16 * len(requests):
                    striker.start()
            seconds = time.monotonic() - started
            striker.join()
            usage = engine.take_metrics().total
            worst = check(completions, requests, model)
            print(
                f"| {number:2} {fault:4} at {places.index(place)} | {share:6.0%} | {seconds:4.1f} s | "
                f"{usage.num_retries:11} | {usage.wasted_tokens:13,} | {worst:19.1e} |",
                flush=True,
            )
        print(f"{arguments.faults} faults: 0 answers lost, doubled, broken off or with other weights")
    finally:
        engine.close()
        for place in places:
            place.server.stop(0)


def make_requests(prompts: np.ndarray, number: int) -> list[Request]:
    return [
        Request(i, prompt, tuple(range(10**6 * number + 1000 * i, 10**6 * number + 1000 * i + 16)))
        for i, prompt in enumerate(prompts)
    ]


def wait_for_both(fleet: Fleet, first: bool = False) -> None:
    """Until both serve; before the first weights, until both answer."""
    deadline = time.monotonic() + START_SECONDS
    while (sum(stats.state == "stale" for stats in fleet.stats()) if first else len(fleet.serving())) < 2:
        if time.monotonic() > deadline:
            raise TimeoutError(str(fleet.stats()))
        time.sleep(0.2)


if __name__ == "__main__":
    main()
