"""The file that docs/new_algorithm.md shows is found by being there, and computes what the page says."""

import re
from pathlib import Path

import pytest
import torch

from nft_megatron import algorithms
from nft_megatron.algorithms import AnswerBatch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "new_algorithm.md"


@pytest.fixture
def gspo(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "gspo.py").write_text(code)
    monkeypatch.setattr(algorithms, "__path__", [*algorithms.__path__, str(tmp_path)])
    return algorithms._found()["gspo"]


def test_a_file_in_the_folder_is_enough(gspo):
    assert gspo().model_dump() == {"name": "gspo", "clip": 3e-4}
    assert gspo.coupling == "sequence" and gspo.uses_wrong_answers


def test_its_gradient_is_that_of_the_geometric_mean_ratio(gspo):
    """−A·s/|a| within the clip, s = exp(S/|a|), and nothing beyond it on the pushed side."""
    log_ratio_A = torch.tensor([0.02, 2.0, -0.04, -4.0], dtype=torch.float64, requires_grad=True)
    length_A, advantage_A = torch.tensor([4, 5, 8, 10]), torch.tensor([1.0, 1.0, -0.5, -0.5], dtype=torch.float64)
    ones_A = torch.ones(4)
    answers = AnswerBatch(ones_A.long(), advantage_A > 0, ones_A / 2, length_A, ones_A > 1, 16, advantage_A=advantage_A)
    (gradient,) = torch.autograd.grad(gspo(clip=0.1).sequence_loss(answers, log_ratio_A).sum(), log_ratio_A)
    s = (log_ratio_A.detach() / length_A).exp()
    expected = -advantage_A * s / length_A * torch.tensor([1.0, 0.0, 1.0, 0.0])
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)
