"""What a broken or hostile server may send, by name, with what the client says about it. Tests and fuzzers start from these.

``fake_vllm.py`` sends ``ANSWERS`` and ``STREAMS``, ``fake_control.py`` ``REPLIES``.
"""

import functools
import gzip
import itertools
import json

DEEP = 100_000
FOREIGN = 10**6


def _with(**fields):
    return lambda choice: {**choice, **fields}


def _tokens(change):
    return lambda choice: {**choice, "token_ids": change(choice["token_ids"])}


def _logprobs(change):
    def changed(choice):
        values = change([entry["logprob"] for entry in choice["logprobs"]["content"]])
        return {**choice, "logprobs": {"content": [{"token_id": 1, "logprob": value} for value in values]}}

    return changed


def _answer(tokens, reason):
    """A whole answer of these tokens."""

    def changed(choice):
        spans = [{**choice["weight_versions"][0], "start": 0, "end": len(tokens)}]
        whole = {**choice, "token_ids": list(tokens), "finish_reason": reason, "weight_versions": spans}
        return _logprobs(lambda _: [-1.0] * len(tokens))(whole)

    return changed


def _spans(*spans):
    return _with(weight_versions=[{"version": version, "start": start, "end": end} for version, start, end in spans])


def _version(label):
    return lambda choice: {**choice, "weight_versions": [{**choice["weight_versions"][0], "version": label}]}


STOP = 49  # of fake_vllm.py
NOT_ONE, FOREIGN_WEIGHTS = "is not an answer", "which no step has published|unpublished or older"
ANSWERS = {
    # name: how one event with a whole answer is changed, and what is said about it
    "a token outside the vocabulary": (_tokens(lambda tokens: [50, *tokens[1:]]), "outside the vocabulary of 50"),
    "a token far outside": (_tokens(lambda tokens: [FOREIGN, *tokens[1:]]), "outside the vocabulary of 50"),
    "a negative token": (_tokens(lambda tokens: [-5, *tokens[1:]]), "outside the vocabulary of 50"),
    "a token of 41 bits": (_tokens(lambda tokens: [2**40, *tokens[1:]]), NOT_ONE),
    "fractional tokens": (_tokens(lambda tokens: [token + 0.5 for token in tokens]), NOT_ONE),
    "whole tokens as fractions": (_tokens(lambda tokens: [float(token) for token in tokens]), NOT_ONE),
    "nested tokens": (_tokens(lambda tokens: [[token] for token in tokens]), NOT_ONE),
    "tokens as text": (_tokens(lambda tokens: [str(token) for token in tokens]), NOT_ONE),
    "true for a token": (_tokens(lambda tokens: [True, *tokens[1:]]), NOT_ONE),
    "no list of tokens": (_with(token_ids=None), NOT_ONE),
    "a token too few": (_tokens(lambda tokens: tokens[1:]), "tokens, not of 1|a token without a log-prob"),
    "a positive log-prob": (_logprobs(lambda values: [0.5, *values[1:]]), "a token without a log-prob"),
    "a log-prob that is NaN": (_logprobs(lambda values: [float("nan"), *values[1:]]), NOT_ONE),
    "an infinite log-prob": (_logprobs(lambda values: [-1e39, *values[1:]]), "a token without a log-prob"),
    "vLLM's sign for no log-prob": (_logprobs(lambda values: [-9999.0, *values[1:]]), "a token without a log-prob"),
    "null for a log-prob": (_logprobs(lambda values: [None, *values[1:]]), NOT_ONE),
    "lists of log-probs": (_logprobs(lambda values: [[value, value] for value in values]), NOT_ONE),
    "log-probs as text": (_logprobs(lambda values: [str(value) for value in values]), NOT_ONE),
    "a log-prob too few": (_logprobs(lambda values: values[1:]), "a token without a log-prob"),
    "a log-prob too many": (_logprobs(lambda values: [-1.0, *values]), "a token without a log-prob"),
    "too many tokens": (_answer([1] * 5000, "length"), r"of more than \d+ tokens"),
    "no tokens": (_answer([], "stop"), "an answer of 0 tokens"),
    "no tokens and no end": (_answer([], None), "an event without tokens"),
    "a stop without a stop token": (_answer([1, 2, 3], "stop"), "no stop token or text ends"),
    "truncated after three tokens": (_answer([1, 2, 3], "length"), r"after 3 tokens, although \d+ were allowed"),
    "truncated at a stop token": (_answer([1, 2, STOP], "length"), "calls an answer truncated"),
    "tokens after a stop token": (_answer([1, STOP, 2, STOP], "stop"), "had ended with its token 2 of 4"),
    "another reason to end": (_with(finish_reason="repetition"), "ended an answer with 'repetition'"),
    "a list for a reason": (_with(finish_reason=["stop"]), NOT_ONE),
    "another answer's index": (_with(index=99), "sent answer 99"),
    "a negative index": (_with(index=-1), "sent answer -1"),
    "a list for an index": (_with(index=[0]), NOT_ONE),
    "an index as text": (_with(index="0"), NOT_ONE),
    "a fraction for an index": (_with(index=0.0), NOT_ONE),
    "false for an index": (_with(index=False), NOT_ONE),
    "no index": (_with(index=None), NOT_ONE),
    "a number for weight versions": (_with(weight_versions=5), NOT_ONE),
    "a text for weight versions": (_with(weight_versions="abc"), NOT_ONE),
    "fractional ends of versions": (_spans(("3", 0, 1.5)), NOT_ONE),
    "weights of too few tokens": (_spans(("3", 0, 0)), "version unknown"),
    "no weights": (_with(weight_versions=None), "version unknown"),
    "a version of 5,000 digits": (_version("9" * 5000), FOREIGN_WEIGHTS),
    "a version in other digits": (_version("٣"), FOREIGN_WEIGHTS),
    "a negative version": (_version("-1"), FOREIGN_WEIGHTS),
    "an unpublished version": (_version("77"), FOREIGN_WEIGHTS),
    "newer weights before older ones": (
        lambda choice: _spans(("3", 0, 0), ("2", 0, len(choice["token_ids"])))(choice),
        FOREIGN_WEIGHTS,
    ),
}


def head(status="200 OK", length=None, **fields):
    """The head of a reply; ``Content_Encoding="gzip"`` becomes a header."""
    lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items()]
    size = "" if length is None else f"Content-Length: {length}\r\n"
    return f"HTTP/1.1 {status}\r\n{size}{''.join(lines)}\r\n".encode()


def reply(body, status="200 OK", **fields):
    return [head(status, len(body), **fields) + body]


def events(*parts):
    return reply(b"".join(b"data: " + part + b"\n\n" for part in parts) + b"data: [DONE]\n\n")


def _progress():
    choice = {"index": 0, "finish_reason": None, "weight_versions": None, "token_ids": [1] * 64}
    choice["logprobs"] = {"content": [{"logprob": -1.0}] * 64}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


@functools.cache
def _bomb():
    return gzip.compress(bytes(1 << 24), 9)


BROKEN = "ClientResponseError|ClientPayloadError|ClientConnectionError|ServerDisconnectedError|ClientOSError"
STREAMS = {
    # name: the pieces of a reply, perhaps endless, and what is said about it
    "an endless line": (lambda: itertools.chain([head()], itertools.repeat(b"x" * 65536)), "sent more than .* bytes"),
    "endless progress": (lambda: itertools.chain([head()], itertools.repeat(_progress())), r"of more than \d+ tokens"),
    "an endless head": (lambda: itertools.chain([b"HTTP/1.1 200 OK\r\n"], itertools.repeat(b"A: b\r\n" * 5000)), BROKEN),
    "an endless header": (lambda: itertools.chain([b"HTTP/1.1 200 OK\r\nA: "], itertools.repeat(b"b" * 65536)), BROKEN),
    "an endless error": (lambda: itertools.chain([head("500 Error")], itertools.repeat(b"x" * 65536)), "500:? xxx"),
    "an empty event": (lambda: events(b""), NOT_ONE),
    "a number": (lambda: events(b"5"), NOT_ONE),
    "null": (lambda: events(b"null"), NOT_ONE),
    "no choices": (lambda: events(b'{"choices":[]}'), NOT_ONE),
    "null for a choice": (lambda: events(b'{"choices":[null]}'), NOT_ONE),
    "an object for choices": (lambda: events(b'{"choices":{"a":1}}'), NOT_ONE),
    "deep JSON": (lambda: events(b"[" * DEEP), NOT_ONE),
    "deep JSON in an event": (lambda: events(b'{"other":' + b"[" * DEEP + b"]" * DEEP + b"}"), NOT_ONE),
    "a deep error": (lambda: events(b'{"error":' + b"[" * DEEP + b"]" * DEEP + b"}"), NOT_ONE),
    "an integer of 6,000 digits": (lambda: events(b'{"choices":[{"index":' + b"9" * 6000 + b"}]}"), NOT_ONE),
    "no UTF-8": (lambda: events(b"\xff\xfe\x00"), NOT_ONE),
    "no event at all": (lambda: events(), "closed the connection with"),
    "another page": (lambda: reply(b"<html>log in</html>", Content_Type="text/html"), "closed the connection with"),
    "nothing": (lambda: [head("204 No Content")], "204"),
    "a redirect": (lambda: reply(b"", "307 Moved", Location="http://127.0.0.1:9/stolen"), "307"),
    "another protocol": (lambda: [b"SSH-2.0-OpenSSH_9.2\r\n"], BROKEN),
    "a negative length": (lambda: [b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n{}"], BROKEN),
    "a broken chunk": (lambda: [head(Transfer_Encoding="chunked") + b"ZZZ\r\n"], BROKEN),
    "a gzip bomb": (lambda: reply(_bomb(), Content_Encoding="gzip"), "compressed its reply"),
    "a gzip bomb as an error": (lambda: reply(_bomb(), "500 Error", Content_Encoding="gzip"), "compressed its reply"),
    "another compression": (lambda: reply(b"xx", Content_Encoding="br"), "compressed its reply"),
    "401": (lambda: reply(b"no", "401 Unauthorized"), "401 no"),
    "400": (lambda: reply(b"no", "400 Bad Request"), "refuses a request: 400 no"),
    "404": (lambda: reply(b"no", "404 Not Found"), "refuses a request: 404 no"),
}


def _json(text):
    return lambda: reply(text.encode())


UNEXPECTED = "sent an unexpected reply"
REPLIES = {
    # name: the pieces of a reply to GET /weight_info, and what is said about it
    "an endless reply": (lambda: itertools.chain([head() + b'{"a":"'], itertools.repeat(b"x" * 65536)), "a reply of more than"),
    "an endless head": STREAMS["an endless head"],
    "an endless error": STREAMS["an endless error"],
    "a redirect": STREAMS["a redirect"],
    "a gzip bomb": STREAMS["a gzip bomb"],
    "a gzip bomb as an error": STREAMS["a gzip bomb as an error"],
    "another protocol": STREAMS["another protocol"],
    "a negative length": STREAMS["a negative length"],
    "a null byte in a header": (lambda: [b"HTTP/1.1 200 OK\r\nX: \x00\x01\r\nContent-Length: 2\r\n\r\n{}"], BROKEN),
    "half a reply": (lambda: [head(length=100) + b'{"weight'], BROKEN),
    "another page": (lambda: reply(b"<html>log in</html>", Content_Type="text/html"), UNEXPECTED),
    "another character set": (lambda: reply(b"{}", Content_Type="application/json; charset=xyz"), UNEXPECTED),
    "deep JSON": (_json("[" * DEEP), UNEXPECTED),
    "deep JSON in an object": (_json('{"weight_version":"1","other":' + "[" * DEEP + "]" * DEEP + "}"), UNEXPECTED),
    "an array": (_json("[]"), UNEXPECTED),
    "null": (_json("null"), UNEXPECTED),
    "an object for a version": (_json('{"weight_version":{"a":1}}'), UNEXPECTED),
    "a number for a version": (_json('{"weight_version":3}'), UNEXPECTED),
    "no UTF-8": (lambda: reply(b'{"weight_version":"\xff"}'), UNEXPECTED),
}
DRIPS = {
    # name: how a reply begins, and what then follows without end, a piece at a time
    "a dripping body": (head(length=100_000), b" "),
    "a dripping head": (b"HTTP/1.1 200 OK\r\n", b"A: b\r\n"),
    "endless interim replies": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
}
