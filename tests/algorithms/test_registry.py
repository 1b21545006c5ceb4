"""Algorithms by name, and what each declares of itself."""

import pytest
from pydantic import ValidationError

from nft_megatron.algorithms import ALGORITHMS, build_algorithm
from nft_megatron.base.errors import UserError


def test_the_papers_algorithms_are_there_under_their_own_names():
    assert set(ALGORITHMS) == {"nft", "rft", "grpo", "dr_grpo", "dapo", "infonca", "gspo", "cispo"}
    assert {name: build_algorithm(name).name for name in ALGORITHMS} == {name: name for name in ALGORITHMS}


def test_what_the_rooms_around_them_must_keep_to():
    assert {name for name in ALGORITHMS if build_algorithm(name).coupling != "token"} == {"infonca", "gspo"}
    assert build_algorithm("nft", ratio_type="sequence").coupling == "sequence"
    assert {name for name, each in ALGORITHMS.items() if not each.uses_wrong_answers} == {"rft"}
    assert {name for name, each in ALGORITHMS.items() if not each.needs_mixed_groups} == {"grpo", "dr_grpo", "gspo"}


def test_an_unknown_name_is_a_user_error():
    with pytest.raises(UserError, match=r"algorithm\.name = ntf: no such algorithm; one of .*nft, rft"):
        build_algorithm("ntf")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nft", {"epsilom": 1.0}),
        ("rft", {"epsilon": 1.0}),
        ("nft", {"prompt_weight": "one_minus_rat"}),
        ("nft", {"epsilon": 0.0}),
        ("nft", {"epsilon": float("nan")}),
        ("nft", {"negative_weight": -1.0}),
        ("nft", {"rate_margin": 0.5}),
        ("nft", {"ratio_type": "sentence"}),
        ("grpo", {"clip_low": 1.0}),
        ("dapo", {"overlong_buffer": 0.0}),
        ("infonca", {"beta": 0.0}),
        ("gspo", {"clip_low": 0.0}),
        ("cispo", {"max_ratio": 0.5}),
    ],
)
def test_options_that_mean_nothing_are_refused(name, options):
    with pytest.raises(ValidationError, match=next(iter(options))):
        build_algorithm(name, **options)
