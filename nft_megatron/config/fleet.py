"""Section ``fleet`` of the configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from nft_megatron.base.config_model import ConfigModel, LoosePath, PositiveFloat, TextList


class FleetConfig(ConfigModel):
    """The vLLM servers that generate answers (``rollout.engine: vllm``): started here, named here, or found in RUN/fleet."""

    servers: Annotated[int, Field(ge=0)] = 0
    """vLLM servers that the trainer starts on its own machine."""
    urls: TextList = ()
    """Servers that somebody else runs, with the flags that docs/fleet.md lists."""
    key_file: LoosePath | None = None
    """File with the key that the servers of ``urls`` ask for. null: RUN/fleet/key, which the run makes itself."""
    min_servers: PositiveInt = 1
    """With fewer healthy servers on the current weights the run waits, and after wait_seconds it stops with exit code 75."""
    python: LoosePath | None = None
    """Python that has vLLM, where it is in an environment of its own. null: the trainer's."""
    host: str = "127.0.0.1"
    """Address on which servers listen. Every route of every server asks for the key."""
    devices: TextList = ()
    """CUDA_VISIBLE_DEVICES of each server that the trainer starts, such as "4,5". Empty: all see the trainer's."""
    tensor_parallel: PositiveInt = 1
    """GPUs of one server."""
    threads: PositiveInt = 1
    """CPU threads of a server that runs without a GPU."""
    kv_cache_gib: PositiveInt = 1
    """Memory for keys and values of a server that runs without a GPU."""
    arguments: TextList = ()
    """Further flags of vLLM, such as "--gpu-memory-utilization=0.9"."""
    weights: Literal["folder", "transfer"] = "folder"
    """How weights reach the servers. ``folder``: as files in weights_dir, which all machines see. ``transfer``: a broadcast
    over the network (NCCL between GPUs, gloo otherwise), straight from the trainer's shards."""
    weights_dir: LoosePath | None = None
    """null: RUN/weights. With all servers on the trainer's machine, a folder in /dev/shm is faster."""
    keep_copy: bool = True
    """With ``transfer``: write the files too, for servers that join or restart later. false: they wait for the next weights."""
    bucket_bytes: PositiveInt = 1 << 30
    """Weights on their way at a time."""
    in_flight: Literal["finish", "continue"] = "finish"
    """What happens to answers under way when new weights arrive. ``continue``: their next tokens come from the new ones, and
    every token carries its version."""
    start_seconds: PositiveFloat = 900.0
    """Longest start of a server."""
    sync_seconds: PositiveFloat = 600.0
    """Longest taking over of new weights by one server, with the answers that it finishes first."""
    silence_seconds: PositiveFloat = 10.0
    """A server that does not answer a health check for so long gets no new work; after three it is written off and replaced."""
    wait_seconds: PositiveFloat = 1800.0
    """Longest wait for min_servers; the deadlines of collect, publish and evaluate are longer by it."""
    answer_seconds: PositiveFloat = 300.0
    """A server that has answers to generate and sends no token for so long has failed at them; another is asked."""
    outstanding_tokens: PositiveInt = 1_000_000
    """Tokens of prompts and expected answers that one server is given at a time; the rest waits for the next free one."""
