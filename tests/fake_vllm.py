"""A server that speaks vLLM's ``/inference/v1/generate`` without a model: fast, and faulty on demand.

``python fake_vllm.py`` prints its port and serves until it is killed. An answer depends only on its seed
(:func:`expected_answer`). ``POST /behave`` changes ``Behaviour``; ``GET /seen`` reports what happened.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import httpx
from fake_proof import proof
from server_faults import ANSWERS, DRIPS, STREAMS, head

from nft_megatron.base.records import Sampling
from nft_megatron.rollout.engine import EngineFault
from nft_megatron.rollout.fleet.health import Health
from nft_megatron.rollout.fleet.member import Member

VOCABULARY = 50  # tokens 0 … 48 and the stop token 49
STOP = VOCABULARY - 1
_POOL = 4099  # prime: an answer is a stretch of this circle, starting where its seed says
_TOKENS = [(i * i * 7 + i) % (VOCABULARY - 1) for i in range(_POOL)]
_LOGPROBS = [-((i * 37) % 1000) / 250 for i in range(_POOL)]


def _entry(token, logprob):
    top = f'{{"token_id":{token},"logprob":{logprob},"rank":1}}'
    return f'{{"token_id":{token},"logprob":{logprob},"rank":1,"top_logprobs":[{top}]}}'


_ENTRIES = [_entry(token, logprob) for token, logprob in zip(_TOKENS, _LOGPROBS, strict=True)] * 2


@dataclass
class Behaviour:
    """``fault`` strikes from the next event on: "drop" closes the connection, "stall" sends nothing more, "error" and
    "garbage" send what they say, "chunk" breaks HTTP and falls silent, "linger" never closes a complete stream, "abort" ends
    answers that way, "refuse" and "fail" reply 400 and 500, "hide" omits the weight versions, "nan" has no log-prob, "repeat"
    sends a finished answer again; those of ``server_faults.py`` replace the whole reply. ``only_seed``: only for sub-requests
    with this seed. ``hold``: after this many tokens a sub-request gets no more until this is raised; negative: no end. ``seen``
    counts those currently held. ``server_id``: by what the server proves itself, with the key "key"; empty: it does not.
    """

    version: str = "0"
    token_seconds: float = 0.0
    hold: int = -1
    fault: str = ""
    only_seed: int = -1
    reordered: bool = False  # the same JSON with different spacing and order
    server_id: str = ""


def sampling(max_tokens=256):
    """Sampling under which its answers are valid."""
    return Sampling(max_tokens=max_tokens, stop_token_ids=(STOP,))


def expected_length(seed, max_tokens):
    """The answer's number of tokens; one seed in eleven gives a truncated answer."""
    return max_tokens if seed % 11 == 0 else 1 + (seed * 2654435761 >> 7) % max_tokens


def expected_answer(seed, max_tokens):
    """Tokens, log-probs and finish reason of the answer with this seed."""
    length, start = expected_length(seed, max_tokens), seed % _POOL
    at = [(start + i) % _POOL for i in range(length)]
    tokens, logprobs = [_TOKENS[i] for i in at], [_LOGPROBS[i] for i in at]
    if seed % 11 == 0:
        return tokens, logprobs, "length"
    return [*tokens[:-1], STOP], logprobs, "stop"


def greedy_rest(token_ids, max_tokens):
    """What follows ``token_ids``: a prompt that ends with the stop token, then the answer so far, which the prompt gives."""
    begun = token_ids[::-1].index(STOP)
    tokens, logprobs, reason = expected_answer(token_ids[0], begun + max_tokens)
    assert tokens[:begun] == token_ids[len(token_ids) - begun :], "another answer's beginning"
    return tokens[begun:], logprobs[begun:], reason


class FakeServer:
    def __init__(self):
        self.behaviour, self.seen, self.proof = Behaviour(), Counter(), None

    async def serve(self, reader, writer):
        """One connection, kept alive."""
        try:
            while asked := await reader.readuntil(b"\r\n\r\n"):
                lines = asked.decode().lower().split("\r\n")
                size = next((int(line.split(":")[1]) for line in lines if line.startswith("content-length:")), 0)
                body = await reader.readexactly(size)
                first, *others = asked.decode().split("\r\n")
                given = next((line.partition(": ")[2] for line in others if line.startswith("Authorization:")), "")
                self.seen["shown the key"] += "key" in given.split()
                self.proof = proof("key", self.behaviour.server_id, given, *first.split()[:2])
                await self.respond(lines[0].split()[1], body, reader, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def respond(self, path, body, reader, writer):
        if path == "/behave":
            self.behaviour = Behaviour(**json.loads(body))
            return self.reply(writer, "200 OK", b"{}")
        if path == "/seen":
            return self.reply(writer, "200 OK", json.dumps(self.seen).encode())
        asked = json.loads(body)
        self.seen["requests"] += 1
        self.seen["answers"] += asked["sampling_params"]["n"]
        self.seen[f"of {asked['sampling_params']['max_tokens']} tokens"] += 1
        self.seen["open"] += 1
        self.seen["most_open"] = max(self.seen["most_open"], self.seen["open"])
        try:
            if self.fault(asked) == "refuse":
                return self.reply(writer, "400 Bad Request", b'{"error":"too long"}')
            if self.fault(asked) in STREAMS:
                return await self.pour(STREAMS[self.fault(asked)][0](), writer)
            if self.fault(asked) in DRIPS:
                return await self.drip(*DRIPS[self.fault(asked)], writer)
            if self.fault(asked) in ANSWERS:
                return await self.pour(self.changed_answers(asked), writer)
            if self.fault(asked) == "fail":
                return self.reply(writer, "500 Internal Server Error", b'{"error":"dead"}')
            if self.fault(asked) == "paused":
                return self.reply(writer, "503 Service Unavailable", b'{"error":"paused"}')
            return await self.stream(asked, reader, writer)
        except ConnectionError:
            self.seen["broken_off"] += 1
            raise
        finally:
            self.seen["open"] -= 1

    def reply(self, writer, status, body):
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)

    async def pour(self, pieces, writer):
        """Send the pieces of a reply, and end the connection after the last."""
        for piece in pieces:
            if writer.is_closing():
                break
            writer.write(piece)
            await writer.drain()
        raise ConnectionError

    async def drip(self, beginning, piece, writer):
        """Send a piece at a time without end."""
        writer.write(beginning)
        while not writer.is_closing():
            self.seen["drips"] += 1
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.01)
        raise ConnectionError

    def changed_answers(self, asked):
        """Whole answers, each as one event changed by a fault of ``ANSWERS``."""
        parameters = asked["sampling_params"]
        yield head(Content_Type="text/event-stream", Connection="close")
        for index in range(parameters["n"]):
            tokens, logprobs, reason = expected_answer(parameters["seed"] + index, parameters["max_tokens"])
            choice = {
                "index": index,
                "finish_reason": reason,
                "token_ids": tokens,
                "weight_versions": self.spans(self.behaviour.version, len(tokens)),
                "logprobs": {"content": [{"logprob": value} for value in logprobs]},
            }
            choice = ANSWERS[self.fault(asked)][0](choice)
            yield b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"

    def fault(self, asked):
        concerned = self.behaviour.only_seed in (-1, asked["sampling_params"]["seed"])
        return self.behaviour.fault if concerned else ""

    async def held(self, num_tokens, reader):
        """Wait while no more than ``num_tokens`` may be sent; raises once the client is gone."""
        self.seen["held"] += 1
        try:
            while 0 <= self.behaviour.hold <= num_tokens:
                if reader.at_eof() or reader.exception() is not None:  # the client closed it, perhaps with data unread
                    raise ConnectionError
                await asyncio.sleep(0.02)
        finally:
            self.seen["held"] -= 1

    async def stream(self, asked, reader, writer):
        """All answers advance together: first one token, then ``stream_interval`` at a time."""
        parameters = asked["sampling_params"]
        answers = [expected_answer(parameters["seed"] + i, parameters["max_tokens"]) for i in range(parameters["n"])]
        if parameters["temperature"] == 0:
            answers = [greedy_rest(asked["token_ids"], parameters["max_tokens"])]
        proven = {"X_NFT_Proof": self.proof} if self.proof else {}
        writer.write(head(Content_Type="text/event-stream", Transfer_Encoding="chunked", **proven))
        begin, end = 0, 1
        first_version = self.behaviour.version
        while any(begin < len(tokens) for tokens, *_ in answers):
            if 0 <= self.behaviour.hold <= begin:
                await self.held(begin, reader)
            await asyncio.sleep((end - begin) * self.behaviour.token_seconds)
            for index, (tokens, logprobs, reason) in enumerate(answers):
                if begin >= len(tokens):
                    continue
                fault = self.fault(asked)
                if fault in ("stall", "chunk"):
                    writer.write(b"ZZ\r\n" if fault == "chunk" else b"")
                    await asyncio.sleep(3600)
                if fault in ("drop", "error", "garbage"):
                    if fault != "drop":
                        send(writer, '{"error":{"message":"dead"}}' if fault == "error" else '{"choices":[{"ind')
                    raise ConnectionError
                is_last = end >= len(tokens)
                start = (parameters["seed"] + index) % _POOL + begin
                entries = _ENTRIES[start % _POOL : start % _POOL + min(end, len(tokens)) - begin]
                if is_last and reason == "stop":
                    entries[-1] = entries[-1].replace(
                        f'"token_id":{_TOKENS[(start + len(entries) - 1) % _POOL]},', f'"token_id":{STOP},'
                    )
                if parameters["temperature"] == 0:
                    entries = [_entry(*each) for each in zip(tokens[begin:end], logprobs[begin:end], strict=True)]
                if fault == "nan":
                    entries[-1] = _entry(tokens[-1], -9999.0)
                ending = ("abort" if fault == "abort" else reason) if is_last else None
                spans = self.spans(first_version, len(tokens)) if is_last and fault != "hide" else None
                event = (
                    f'{{"request_id":"r","usage":null,"choices":[{{"index":{index},"finish_reason":{json.dumps(ending)},'
                    f'"stop_reason":null,"token_ids":{json.dumps(tokens[begin:end])},"weight_versions":{json.dumps(spans)},'
                    f'"logprobs":{{"content":[{",".join(entries)}]}}}}]}}'
                )
                if self.behaviour.reordered:
                    event = json.dumps(dict(reversed(json.loads(event).items())))
                send(writer, event)
                if fault == "repeat" and is_last:
                    send(writer, event)
            await writer.drain()
            begin, end = end, end + parameters["stream_interval"]
        if self.fault(asked) == "linger":
            await asyncio.sleep(3600)
        send(writer, "[DONE]")
        writer.write(b"0\r\n\r\n")

    def spans(self, first_version, num_tokens):
        """If the version changes while an answer is generated, the new one counts from its last token on."""
        last = self.behaviour.version
        if last == first_version or num_tokens < 2:
            return [{"version": last, "start": 0, "end": num_tokens}]
        return [
            {"version": first_version, "start": 0, "end": num_tokens - 1},
            {"version": last, "start": num_tokens - 1, "end": num_tokens},
        ]


def send(writer, data):
    event = f"data: {data}\n\n".encode()
    if writer.is_closing():
        raise ConnectionError
    writer.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")


async def main():
    server = await asyncio.start_server(FakeServer().serve, "127.0.0.1", 0, limit=1 << 24, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


class Process:
    """The server as a separate process, which tests stop and kill."""

    def __init__(self, **behaviour):
        self.process = subprocess.Popen([sys.executable, str(Path(__file__))], stdout=subprocess.PIPE, text=True)
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}"
        self.api_key, self.headers = "key", {}
        self.behaviour = Behaviour()
        self.behave(**behaviour)

    def behave(self, **changes):
        for name, value in changes.items():
            assert name in {field.name for field in fields(Behaviour)}
            setattr(self.behaviour, name, value)
        httpx.post(f"{self.url}/behave", json=asdict(self.behaviour), timeout=60, trust_env=False, verify=False)

    def label(self, version):
        self.behave(version=str(version))

    @property
    def seen(self):
        return Counter(httpx.get(f"{self.url}/seen", timeout=60, trust_env=False, verify=False).json())

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


class StaticFleet:
    """The fleet's interface for given servers, which have ``url``, ``api_key`` and ``label(version)``.

    Publishing changes only the label. A reported server gets no work for ``rest_seconds``.
    """

    def __init__(self, servers, rest_seconds=0.3):
        self.servers = {f"s{index}": server for index, server in enumerate(servers)}
        self.reports, self.version, self.rest_seconds = [], -1, rest_seconds
        self._rests_until = Counter()

    def serving(self):
        now = time.monotonic()
        return [
            Member(name, server.url, server.api_key, Health(), self.version, 1)
            for name, server in self.servers.items()
            if now >= self._rests_until[name]
        ]

    def report(self, member, ok, error=None):
        if not ok:
            self.reports.append((member.name, error))
            self._rests_until[member.name] = time.monotonic() + self.rest_seconds

    def publish(self, tensors, version):
        for _ in tensors:
            pass
        for server in self.servers.values():
            server.label(version)
        self.version = version
        return f"fingerprint {version}"

    def wait_for_servers(self, seconds, is_over=lambda: False):
        end = time.monotonic() + seconds
        while not self.serving() and not is_over():
            if time.monotonic() > end:
                raise EngineFault("no servers")
            time.sleep(0.01)

    def close(self):
        self.servers = {}


if __name__ == "__main__":
    asyncio.run(main())
