"""How a server proves itself, written down a second time: HMAC-SHA256 over lines."""

import hashlib
import hmac


def mac(key, *lines):
    return hmac.new(key.encode(), "\n".join(lines).encode(), hashlib.sha256).hexdigest()


def proof(key, server_id, authorization, method, path):
    """What the start ``server_id`` of a server owes to a request; None if the request shows no knowledge of ``key``."""
    scheme, *words = authorization.split(" ")
    if scheme != "NFT" or len(words) != 2 or words[1] != mac(key, server_id, "request", words[0], method, path):
        return None
    return mac(key, server_id, "reply", words[0])
