"""Section ``fleet`` of the configuration."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from nft_megatron.base.config_model import ConfigModel, LoosePath, PositiveFloat, PositiveInt, ProcessCount, TextList
from nft_megatron.base.errors import UserError


def _private(urls: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse an address at which the key, which these servers get as it is, could be read on the way."""
    for url in urls:
        try:
            parts = urlsplit(url)
            is_address = bool(parts.hostname) and parts.port != 0 and url.isprintable() and " " not in url
        except ValueError:
            is_address = False
        if not is_address or parts.scheme not in ("http", "https") or "@" in parts.netloc or parts.query or parts.fragment:
            raise UserError("fleet.urls", url, "is not the address of a server", "write http://127.0.0.1:PORT or https://HOST")
        if parts.scheme == "http" and not _is_loopback(parts.hostname or ""):
            raise UserError(
                "fleet.urls",
                url,
                "would send the servers' key unencrypted over the network",
                "use https://, or a tunnel that ends at 127.0.0.1, or run `nft-megatron serve` there: it needs no url",
            )
    return urls


def _is_loopback(host: str) -> bool:
    """
    >>> _is_loopback("localhost"), _is_loopback("127.0.0.2"), _is_loopback("::1"), _is_loopback("node7")
    (True, True, True, False)
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class FleetConfig(ConfigModel):
    """The vLLM servers that generate answers (``rollout.engine: vllm``): started or named here, or found in RUN/fleet."""

    servers: Annotated[int, Field(ge=0, le=4096)] = 0
    """vLLM servers that the trainer starts on its own machine."""
    urls: Annotated[TextList, AfterValidator(_private)] = ()
    """URLs of servers that somebody else runs, with the flags listed in docs/fleet.md: https://…, or http:// on this machine's
    loopback device, since they get their key in every request."""
    key_file: LoosePath | None = None
    """File with the key that the servers of ``urls`` require, one word. null: RUN/fleet/key, which the run creates."""
    min_servers: PositiveInt = 1
    """With fewer healthy servers on the current weights the run waits; after wait_seconds it stops with exit code 75."""
    python: LoosePath | None = None
    """Python of the environment that has vLLM. null: the trainer's."""
    host: str = "127.0.0.1"
    """Address on which servers listen. Every route of every server requires the key."""
    devices: TextList = ()
    """CUDA_VISIBLE_DEVICES of each server that the trainer starts, such as "4,5". Empty: every server sees the trainer's."""
    tensor_parallel: PositiveInt = 1
    """GPUs per server."""
    threads: ProcessCount = 1
    """CPU threads per server that runs without a GPU."""
    kv_cache_gib: PositiveInt = 1
    """Memory for the key-value cache of a server that runs without a GPU."""
    arguments: TextList = ()
    """Further flags of vLLM, such as "--gpu-memory-utilization=0.9"."""
    weights: Literal["folder", "transfer"] = "folder"
    """How weights reach the servers. ``folder``: as files in weights_dir, which all machines must see. ``transfer``: a
    broadcast over the network (NCCL between GPUs, gloo otherwise), straight from the trainer's shards."""
    weights_dir: LoosePath | None = None
    """null: RUN/weights. A folder in /dev/shm is faster when all servers run on the trainer's machine. Runs may share it: each
    has a folder of its own in it."""
    keep_copy: bool = True
    """With ``transfer``: also write files, for servers that join or restart later. false: they wait for the next weights."""
    bucket_bytes: Annotated[int, Field(gt=0, le=2**40)] = 1 << 30
    """Size of one bucket of a ``transfer``."""
    in_flight: Literal["finish", "continue"] = "finish"
    """What happens to answers in progress when new weights arrive. ``finish``: they end first. ``continue``: their next tokens
    come from the new weights, and every token carries its version."""
    keep_partial: bool | None = None
    """What becomes of the tokens of an answer whose server died, fell silent or aborted it. true: the answer continues after
    them on another server, as another sample of the same distribution. false: it begins again and, by its seed, comes out the
    same. null: true where rollout.max_staleness is 1 or more. Without effect where rollout.stop has texts."""
    start_seconds: PositiveFloat = 900.0
    """Longest start-up of a server."""
    sync_seconds: PositiveFloat = 600.0
    """Longest weight update of one server, including the answers that it finishes first."""
    silence_seconds: PositiveFloat = 10.0
    """A server that does not answer a health check within this time gets no new work; after three failures it is replaced."""
    wait_seconds: PositiveFloat = 1800.0
    """Longest wait for min_servers; extends the deadlines of collect, publish and evaluate."""
    answer_seconds: PositiveFloat = 300.0
    """A server with answers to generate that sends no token for this long has failed; its requests go to another server."""
    outstanding_tokens: PositiveInt | None = None
    """Prompt and expected answer tokens that one server holds at a time; further requests wait for a free server. null: as many
    as its memory has room for keys and values, if its GPUs have as much memory as the trainer's."""
