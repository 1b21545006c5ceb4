"""Algorithms by name, and the messages for names and values that are wrong."""

import pytest

from nft_megatron.algorithms import BUILDERS, build_algorithm
from nft_megatron.errors import UserError


@pytest.mark.parametrize("name", ["nft", "rft"])
def test_builds_by_name(name):
    algorithm = build_algorithm(name)
    assert algorithm.name == name
    assert algorithm.uses_wrong_answers == (name == "nft")


def test_names_in_the_registry_are_the_algorithms_own():
    assert {name: build_algorithm(name).name for name in BUILDERS} == {name: name for name in BUILDERS}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ntf", {}, "algorithm.name = ntf: unknown; did you mean 'nft'? known: nft, rft"),
        ("zzz", {}, "algorithm.name = zzz: unknown; known: nft, rft"),
        ("nft", {"epsilom": 1.0}, "did you mean 'epsilon'?"),
        ("rft", {"epsilon": 1.0}, "algorithm.epsilon"),
        ("nft", {"prompt_weight": "one_minus_rat"}, "did you mean 'one_minus_rate'?"),
        ("nft", {"epsilon": 0.0}, "algorithm.epsilon = 0.0"),
        ("nft", {"epsilon": float("nan")}, "algorithm.epsilon = nan"),
        ("nft", {"negative_weight": -1.0}, "algorithm.negative_weight = -1.0"),
    ],
)
def test_mistakes_are_user_errors(name, options, message):
    with pytest.raises(UserError) as error:
        build_algorithm(name, **options)
    assert message in str(error.value)
