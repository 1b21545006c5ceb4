"""An algorithm of one's own by its import path: the file that docs/new_algorithm.md shows, and what is refused."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from nft_megatron.algorithms import AnswerBatch, build_algorithm
from nft_megatron.base.errors import UserError
from nft_megatron.config.load import dump_config, load_config

PAGE = Path(__file__).resolve().parents[2] / "docs" / "new_algorithm.md"
MINIMAL = {"run_dir": "r", "model": {"path": "m"}, "data": {"train": "a"}, "train": {"num_steps": 1}}


@pytest.fixture
def losses(tmp_path, monkeypatch):
    """The page's module can be imported."""
    (code,) = re.findall(r"```python\n# my_losses.py\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "my_losses.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def minimal(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(MINIMAL))
    return tmp_path / "config.yaml"


def test_its_gradient_is_tapered(losses):
    """−1 for a right answer; for a wrong one half of its ratio, at most a half."""
    log_ratio_A = torch.tensor([0.5, -2.0, 0.7, -1.5], dtype=torch.float64, requires_grad=True)
    is_correct_A, ones_A = torch.tensor([True, True, False, False]), torch.ones(4)
    answers = AnswerBatch(ones_A.long(), is_correct_A, ones_A / 2, ones_A.long(), ones_A > 1, 16)
    algorithm = build_algorithm("my_losses:TOPR", negative_weight=0.5)
    (gradient,) = torch.autograd.grad(algorithm.sequence_loss(answers, log_ratio_A).sum(), log_ratio_A)
    expected = torch.tensor([-1, -1, 0.5, 0.5], dtype=torch.float64)
    expected[3] *= torch.tensor(-1.5, dtype=torch.float64).exp()
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("error")
def test_a_configuration_holds_it_and_reads_it_back(losses, minimal, tmp_path):
    config = load_config(minimal, ["algorithm.name=my_losses:TOPR", "algorithm.negative_weight=0.5"])
    assert config.algorithm.model_dump() == {"name": "my_losses:TOPR", "negative_weight": 0.5}
    assert (config.algorithm.coupling, config.filters_prompts) == ("sequence", True)
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "dumped.yaml") == config
    with pytest.raises(UserError, match=r"train\.importance_cap = 2\.0: weights single tokens, but the loss of my_losses:TOPR"):
        load_config(minimal, ["algorithm.name=my_losses:TOPR", "train.importance_cap=2"])


BAD = """
from typing import Literal
from nft_megatron.algorithms import Algorithm

class Named(Algorithm):
    name: Literal["named"] = "named"

class NoLoss(Algorithm):
    coupling = "group"

class Odd(Algorithm):
    coupling = "answer"

number = 5
"""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm.name=nowhere:X"], "algorithm.name = nowhere:X: cannot be imported: ModuleNotFoundError: No module named"),
        (["algorithm.name=bad_losses:Missing"], "bad_losses:Missing: the module bad_losses cannot give Missing: module 'bad_l"),
        (["algorithm.name=bad_losses:number"], "is no subclass of nft_megatron.algorithms.Algorithm; derive it from that"),
        (["algorithm.name=os:system"], "algorithm.name = os:system: is no subclass of"),
        (["algorithm.name=bad_losses:Named"], "is a class with a name of its own; leave `name` out of the class"),
        (["algorithm.name=bad_losses:NoLoss"], "has coupling 'group' but no sequence_loss; write that method"),
        (["algorithm.name=bad_losses:Odd"], "has coupling 'answer'; use token, sequence or group"),
        (["algorithm.name=broken_losses:X"], "cannot be imported: ZeroDivisionError: division by zero"),
        (["algorithm.name=my losses:X"], "algorithm.name = my losses:X: no such algorithm; one of cispo"),
        (["algorithm.name=my_losses:TOPR", "algorithm.beta=1"], "algorithm.beta = 1: no such key"),
        (
            ["algorithm.name=my_losses:TOPR", "algorithm.negative_weight=-1.0"],
            "algorithm.negative_weight = -1.0: Input should be greater than or equal to 0",
        ),
    ],
)
def test_what_is_no_algorithm_is_refused(losses, minimal, tmp_path, overrides, message):
    (tmp_path / "bad_losses.py").write_text(BAD)
    (tmp_path / "broken_losses.py").write_text("1 / 0")
    with pytest.raises(UserError) as refused:
        load_config(minimal, overrides)
    assert message in str(refused.value)
