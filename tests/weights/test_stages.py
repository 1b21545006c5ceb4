"""Which layers a pipeline stage holds."""

import pytest

from nft_megatron.base.errors import UserError
from nft_megatron.weights.stages import Stages


@pytest.mark.parametrize(
    ("stages", "num_layers", "layers"),
    [
        (Stages(1), 28, (28,)),
        (Stages(4, parts=2), 16, (4, 4, 4, 4)),
        (Stages(4, last=5), 32, (9, 9, 9, 5)),
        (Stages(4, first=7, last=5), 32, (7, 10, 10, 5)),
        (Stages(2, first=20), 32, (20, 12)),
        (Stages(2, first=20, last=12), 32, (20, 12)),
        (Stages(4, parts=2, last=4), 64, (20, 20, 20, 4)),
    ],
)
def test_layers_of_each_stage(stages: Stages, num_layers: int, layers: tuple[int, ...]):
    assert stages.layers(num_layers) == layers
    of_each = [stages.stage_of(layer, num_layers) for layer in range(num_layers)]
    assert tuple(of_each.count(stage) for stage in range(stages.num)) == layers
    assert of_each == of_each[: num_layers // stages.parts] * stages.parts, "every part of the model is dealt alike"
    part = of_each[: num_layers // stages.parts]
    assert part == sorted(part)


@pytest.mark.parametrize(
    ("stages", "num_layers", "message"),
    [
        (Stages(3), 28, "parallel.pipeline = 3: does not divide the model's 28 layers"),
        (Stages(2, parts=4), 28, "parallel.pipeline × parallel.virtual_pipeline = 8: does not divide"),
        (Stages(4, last=4), 32, "parallel.last_stage_layers = 4: leaves 28 of the model's 32 layers to 3 other stages"),
        (Stages(4, first=40), 32, "parallel.first_stage_layers = 40: leaves -8 of"),
        (Stages(3, first=2, last=2), 4, "leaves 0 of the model's 4 layers to the other stage"),
        (Stages(2, first=2, last=3), 4, "parallel.last_stage_layers = 2 and 3: leaves -1 of the model's 4 layers to 0 other"),
        (Stages(4, parts=2, last=5), 32, "to 3 other stages of 2 parts"),
    ],
)
def test_what_cannot_be_divided_is_refused(stages: Stages, num_layers: int, message: str):
    with pytest.raises(UserError) as caught:
        stages.layers(num_layers)
    assert message in str(caught.value)
