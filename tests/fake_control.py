"""A server that speaks vLLM's control routes, holds fingerprints instead of weights, and fails on demand."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from fake_proof import proof

from nft_megatron.weights.fingerprint import weights_fingerprint
from nft_megatron.weights.hf_reader import HFReader


class FakeServer:
    """Runs in this process. ``status`` maps a route to the error it returns; ``calls`` lists the routes called.

    Calls of a route in ``silent`` wait for a reply until :meth:`speak`; ``num_waiting`` counts them. With a ``server_id`` it
    proves itself by it and takes no bare key; ``authorizations`` are all that it was shown. ``raw`` maps a route to a function
    that gives the pieces of a whole reply, perhaps without end (``server_faults.py``).
    """

    def __init__(self, key="secret", server_id=None):
        self.key, self.label, self.fingerprint = key, "default", "none"
        self.server_id, self.authorizations, self.raw = server_id, [], {}
        self.paused, self.cache_is_old = False, False
        self.status, self.calls = {}, []
        self.silent, self.num_waiting, self._changed = set(), 0, threading.Condition()
        self.tampered = self.misheld = self.broken = False
        self.logprob = -1.0
        self.prompt_logprobs = True
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                outer.answer(self)

            do_POST = do_GET

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self._http.shutdown()
        self._http.server_close()

    def restart(self):
        """Act like a process that died and was restarted: it has only its first weights."""
        self.label, self.fingerprint, self.paused = "default", "none", False

    def speak(self):
        with self._changed:
            self.silent = set()
            self._changed.notify_all()

    def _wait(self, name):
        with self._changed:
            self.num_waiting += 1
            self._changed.wait_for(lambda: name not in self.silent)
            self.num_waiting -= 1

    def answer(self, request):
        route = urlsplit(request.path).path
        body = json.loads(request.rfile.read(int(request.headers.get("content-length", 0))) or b"null")
        name = body["method"] if route == "/collective_rpc" else route
        self._wait(name)
        status = self.status.get(name, 200)
        authorization = request.headers.get("authorization", "")
        self.authorizations.append(authorization)
        proven = None if self.server_id is None else proof(self.key, self.server_id, authorization, request.command, route)
        if proven is None and (self.server_id is not None or authorization != f"Bearer {self.key}"):
            status = 401
        self.calls.append(name)
        try:
            if name in self.raw:
                request.close_connection = True
                for piece in self.raw[name]():
                    request.wfile.write(piece)
                return
            reply = self.act(name, body) if status == 200 else {"error": "on demand"}
            text = json.dumps(reply).encode()
            request.send_response(status)
            request.send_header("content-length", str(len(text)))
            if proven is not None:
                request.send_header("X-NFT-Proof", proven)
            request.end_headers()
            request.wfile.write(text)
        except OSError:
            pass  # the caller gave up

    def act(self, name, body):
        if name == "/pause":
            self.paused = True
        elif name == "/resume":
            assert not self.cache_is_old
            self.paused = False
        elif name == "/update_weights":
            assert self.paused
            folder = Path(body["update_info"]["folder"])
            with HFReader(folder) as reader:
                tensors = [(name, reader.read(name, 0, 0, reader.shape(name)[0])) for name in sorted(reader.names)]
            if self.tampered:
                tensors[0][1].view(-1)[0] += 1e-3
            self.fingerprint, self.cache_is_old = weights_fingerprint(tensors), True
        elif name == "/finish_weight_update":
            self.label = body["weight_version"]
        elif name == "/reset_prefix_cache":
            self.cache_is_old = False
            return {"success": True}
        elif name == "/weight_info":
            return {"weight_version": self.label}
        elif name == "nft_fingerprint":
            return {"results": [{"fingerprint": self.fingerprint}]}
        elif name == "nft_compare_model":
            return {"results": [{"wrong": ["lm_head.weight"] if self.misheld else []}]}
        elif name == "nft_abort_update":
            return {"results": [{}]}
        elif name == "/v1/completions":
            assert not self.paused
            entries = [{str(token): {"logprob": self.logprob}} for token in body["prompt"]]
            return {"choices": [{"prompt_logprobs": [None, *entries[1:]]} if self.prompt_logprobs else {}]}
        return {}
