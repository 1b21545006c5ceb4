"""``nft-megatron doctor``: what is installed, which fast paths a run would take, and how to get the missing ones."""

from __future__ import annotations

import argparse
import platform
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from nft_megatron.base.errors import UserError
from nft_megatron.cli.arguments import add_config, describe
from nft_megatron.config.load import load_config
from nft_megatron.config.schema import Config
from nft_megatron.rollout.fleet.nccl import nccl_problem, nccl_version, servers_python
from nft_megatron.run.environment import overruled, trainer_environment

if TYPE_CHECKING:
    from packaging.requirements import Requirement

FOR_DEVELOPERS = "dev"


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``remedy`` is empty if nothing is missing."""

    name: str
    state: str
    remedy: str = ""
    is_fault: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Help and arguments of this command."""
    describe(
        parser,
        _run,
        "Check the packages, the GPUs and the fast paths of this environment, and with CONFIG also whether its vLLM servers "
        "can receive weights from here. Exits with 2 if something required is missing.",
    )
    add_config(parser, optional=True)


def _run(options: argparse.Namespace) -> None:
    config = load_config(Path(options.config), options.overrides) if options.config else None
    found = findings(config)
    names, states = max(len(finding.name) for finding in found), max(len(finding.state) for finding in found)
    for finding in found:
        mark = "✗" if finding.is_fault else "·" if finding.remedy else "✓"
        print(f"{mark} {finding.name:<{names}}  {finding.state:<{states}}  {finding.remedy}".rstrip())
    faults = [finding for finding in found if finding.is_fault]
    if faults:
        raise UserError("environment", faults[0].name, faults[0].state, faults[0].remedy)


def findings(config: Config | None = None) -> list[Finding]:
    """All findings of ``nft-megatron doctor``, packages first. ``is_fault`` marks what training cannot do without."""
    return [*_packages(), *_devices(), *_tested(), *_fast_paths(config), *_variables(config), *_broadcasts(config)]


def _packages() -> Iterator[Finding]:
    """The requirements in the project's metadata against what is installed."""
    from packaging.requirements import Requirement

    yield Finding("python", platform.python_version())
    for text in requires("nft_megatron") or ():
        package = Requirement(text)
        extra = _extra(package)
        if extra == FOR_DEVELOPERS:
            continue
        found, wanted = installed(package.name), f"{package.name}{package.specifier}"
        options = "--no-build-isolation " if extra == "te" else ""  # compiled against the torch that is there
        install = f"pip install {options}'nft_megatron[{extra}]'" if extra else f"pip install '{wanted}'"
        if found is None:
            yield Finding(package.name, "not installed" if extra else "missing", install, is_fault=not extra)
        elif not package.specifier.contains(found, prereleases=True):
            yield Finding(package.name, f"{found}, tested with {package.specifier}", install, is_fault=True)
        else:
            yield Finding(package.name, found)


def _extra(package: Requirement) -> str | None:
    """The extra that requires a package; None for one that is always required."""
    if package.marker is None:
        return None
    _, _, name = str(package.marker).partition('extra == "')
    return name.split('"')[0] or None


def _devices() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        yield Finding("GPU", "none: training runs on the CPU over gloo", "for CUDA, install a torch built for it")
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield Finding(f"GPU {index}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB")


def _tested() -> Iterator[Finding]:
    """Whether a machine with a GPU has the versions that belong together, those of the container."""
    import torch

    if not torch.cuda.is_available():
        return
    if differences := version_differences(torch.version.cuda):
        yield Finding("versions", ", ".join(differences), "container/README.md has a set that belongs together")
    else:
        yield Finding("versions", "those of container/")


def version_differences(cuda: str | None) -> list[str]:
    """What this environment and its torch's ``cuda`` have in other versions than the table, of what is installed."""
    table = tomllib.loads(resources.files("nft_megatron.cli").joinpath("versions.toml").read_text())
    wanted = {package.partition("[")[0]: number for package, number in table["trainer"].items()}
    pairs = [(package, installed(package), number) for package, number in wanted.items()]
    pairs += [(name, found, table["image"][name]) for name, found in (("python", platform.python_version()), ("cuda", cuda))]
    return [
        f"{name} {found} ({number})"
        for name, found, number in pairs
        if found is not None and not f"{found}.".replace("+", ".").startswith(f"{number}.")
    ]


def _variables(config: Config | None) -> Iterator[Finding]:
    """Variables that the run would set on its GPUs, and those that the environment sets otherwise."""
    import torch

    if config is None or not torch.cuda.is_available():
        return
    others = overruled(config)
    for name, wanted in trainer_environment(config).items():
        if name in others:
            yield Finding(name, f"{others[name]} in the environment", f"unset it; section kernels asks for {wanted}")
        else:
            yield Finding(name, wanted)


def _fast_paths(config: Config | None) -> Iterator[Finding]:
    import torch

    has_engine, has_apex = _imports("transformer_engine"), _imports("fused_weight_gradient_mlp_cuda")
    fuses = config is None or config.kernels.gradient_accumulation_fusion
    fuses_head = config is None or config.kernels.fused_lm_head
    apex = "apex from github.com/NVIDIA/apex with its CUDA extensions (the registry's apex is a different project)"
    paths = [
        (
            "layers",
            "Transformer Engine" if has_engine else "",
            "Megatron-Core's local layers, torch's attention",
            "pip install --no-build-isolation 'nft_megatron[te]'; NVIDIA's PyTorch containers have it",
        ),
        (
            "Adam",
            "fused, Transformer Engine" if has_engine else "fused, apex" if _imports("amp_C") else "",
            "torch's",
            f"install Transformer Engine or {apex}",
        ),
        (
            "LM head",
            "Triton's kernels" if fuses_head and _imports("triton") else "",
            "torch's operators, a pass over memory each",
            "pip install triton" if fuses_head else "set kernels.fused_lm_head=true",
        ),
        (
            "weight gradients",
            f"added to main_grad by {'Transformer Engine' if has_engine else 'apex'}'s kernel"
            if fuses and (has_engine or has_apex)
            else "",
            "added to main_grad after the matrix product",
            f"install Transformer Engine or {apex}" if fuses else "set kernels.gradient_accumulation_fusion=true",
        ),
    ]
    for name, fast, slow, remedy in paths:
        is_fast = bool(fast) and torch.cuda.is_available()
        yield Finding(name, fast if is_fast else slow, remedy if torch.cuda.is_available() and not is_fast else "")
    if config is not None:
        yield from _needing_engine(config, has_engine and torch.cuda.is_available())


def _needing_engine(config: Config, has_engine: bool) -> Iterator[Finding]:
    """Switches without which the configured run would not start, and with which Transformer Engine is required."""
    moments, overlap = config.optimizer, config.kernels.overlap_tensor_communication
    for field, is_on, value in (
        ("kernels.overlap_tensor_communication", overlap, "true"),
        ("optimizer.first_moment", moments.first_moment == "bfloat16", "bfloat16"),
        ("optimizer.second_moment", moments.second_moment == "bfloat16", "bfloat16"),
    ):
        if is_on and not has_engine:
            off = "false" if value == "true" else "float32"
            remedy = f"set it to {off}, or train on GPUs: pip install --no-build-isolation 'nft_megatron[te]'"
            yield Finding(field, f"{value}, needs a GPU and Transformer Engine", remedy, is_fault=True)
        elif is_on:
            yield Finding(field, value)


def _broadcasts(config: Config | None) -> Iterator[Finding]:
    """Whether trainer and servers have the same NCCL, where weights go from one to the other over it."""
    own = nccl_version()
    if own is None:
        return
    python = servers_python(config) if config else None
    theirs = nccl_version(python) if python else None
    if problem := nccl_problem(own, theirs):
        yield Finding("NCCL", problem, "install the same version of torch in both environments", is_fault=True)
    else:
        yield Finding("NCCL", f"{own}, {theirs} in {python}" if theirs else own)


def installed(package: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _imports(module: str) -> bool:
    return find_spec(module) is not None
