"""Accelerators as their vendors describe them, and the share of those figures that a training run is assumed to reach.

Bandwidths are bytes per second in one direction, so half of a vendor's bidirectional figure. Memory is what CUDA reports as
total: the "80 GB" of an H100 are 80 GiB, of which the driver keeps about one.
"""

from __future__ import annotations

from dataclasses import dataclass

from nft_megatron.base.errors import UserError

GB, GiB = 1e9, 2**30
TB = 1e12
TFLOPS = 1e12


@dataclass(frozen=True)
class Accelerator:
    """One GPU of a node.

    flops, flops_float32: dense matrix products per second in bfloat16 and in float32.
    memory: bytes. memory_bandwidth: of that memory. node_bandwidth: to all other GPUs of the node together (NVLink).
    network_bandwidth: this GPU's share of the node's network. host_bandwidth: to host memory (PCIe).
    source: where the figures are published.
    """

    name: str
    flops: float
    flops_float32: float
    memory: float
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float
    host_bandwidth: float
    source: str

    @property
    def is_gpu(self) -> bool:
        """False for this machine's CPU."""
        return self.name != "cpu"

    def flops_of(self, dtype: str) -> float:
        """Peak FLOP/s of matrix products in ``dtype`` ("bfloat16" or "float32")."""
        return self.flops if dtype == "bfloat16" else self.flops_float32


ACCELERATORS = {
    accelerator.name: accelerator
    for accelerator in (
        Accelerator(
            "a100-80gb",
            312 * TFLOPS,
            19.5 * TFLOPS,
            79.1 * GiB,
            2.039 * TB,
            300 * GB,
            25 * GB,
            32 * GB,
            "https://www.nvidia.com/en-us/data-center/a100/ (SXM; network: DGX A100, 8 x 200 Gb/s)",
        ),
        Accelerator(
            "h100",
            989.4 * TFLOPS,
            67 * TFLOPS,
            79.1 * GiB,
            3.35 * TB,
            450 * GB,
            50 * GB,
            64 * GB,
            "https://www.nvidia.com/en-us/data-center/h100/ (SXM, without sparsity; network: DGX H100, 8 x 400 Gb/s)",
        ),
        Accelerator(
            "h200",
            989.4 * TFLOPS,
            67 * TFLOPS,
            139.8 * GiB,
            4.8 * TB,
            450 * GB,
            50 * GB,
            64 * GB,
            "https://www.nvidia.com/en-us/data-center/h200/ (SXM, without sparsity; network: DGX H200, 8 x 400 Gb/s)",
        ),
        Accelerator(
            "b200",
            2250 * TFLOPS,
            75 * TFLOPS,
            178.3 * GiB,
            8 * TB,
            900 * GB,
            50 * GB,
            64 * GB,
            "https://www.nvidia.com/en-us/data-center/dgx-b200/ (without sparsity; network: 8 x 400 Gb/s)",
        ),
        Accelerator(
            "cpu",
            0.1 * TFLOPS,
            0.1 * TFLOPS,
            16 * GB,
            10 * GB,
            2 * GB,
            1 * GB,
            10 * GB,
            "one server core, order of magnitude; for experiments",
        ),
    )
}


@dataclass(frozen=True)
class Achievable:
    """Assumed share of a vendor's figure that long runs reach. Not measured on a GPU by this project yet; with them, plans of
    published training runs are within 8 %, and of published RL steps within 15 % (benchmarks/plan_published.py).

    matmul: matrix products of a layer. attention: its fused kernel. memory: streaming kernels. node, network: large
    collectives. host: copies to and from host memory. decoding_weights, decoding_attention: of the memory's bandwidth, while a
    server generates, reading the weights and reading keys and values.
    """

    matmul: float
    attention: float
    memory: float
    node: float
    network: float
    host: float
    decoding_weights: float
    decoding_attention: float


ACHIEVABLE = Achievable(
    matmul=0.65, attention=0.45, memory=0.8, node=0.7, network=0.7, host=0.7, decoding_weights=0.55, decoding_attention=0.33
)


def accelerator(name: str, field: str = "cluster.gpu") -> Accelerator:
    """The accelerator of that name.

    Raises:
        UserError: naming ``field`` if there is none.
    """
    if name.lower() not in ACCELERATORS:
        raise UserError(field, name, "unknown kind of GPU", f"use one of {', '.join(ACCELERATORS)}")
    return ACCELERATORS[name.lower()]
