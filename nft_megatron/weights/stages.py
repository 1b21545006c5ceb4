"""Which layers of a model each pipeline stage holds."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from nft_megatron.base.errors import UserError


@dataclass(frozen=True)
class Stages:
    """``num`` pipeline stages of ``parts`` equal parts each. The stages take the parts of the model in turn.

    first, last: layers of the first and of the last stage, which also hold the embedding and the LM head; None: as many as the
    stages between them.

    >>> Stages(4, last=5).layers(32)
    (9, 9, 9, 5)
    >>> [Stages(2, parts=2, first=2).stage_of(layer, 8) for layer in range(8)]
    [0, 1, 1, 1, 0, 1, 1, 1]
    """

    num: int
    parts: int = 1
    first: int | None = None
    last: int | None = None

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers of each stage.

        Raises:
            UserError: if ``num_layers`` cannot be divided that way.
        """
        if self.first is None and self.last is None:
            if num_layers % (self.num * self.parts):
                field = "parallel.pipeline" + (" × parallel.virtual_pipeline" if self.parts > 1 else "")
                raise UserError(
                    field, self.num * self.parts, f"does not divide the model's {num_layers} layers", "choose a divisor"
                )
            return (num_layers // self.num,) * self.num
        others = self.num - (self.first is not None) - (self.last is not None)
        rest = num_layers - (self.first or 0) - (self.last or 0)
        each = rest // others if others > 0 else 0
        layers = [each] * self.num
        layers[0], layers[-1] = self.first or each, self.last or each
        if sum(layers) != num_layers or min(layers) < 1 or any(count % self.parts for count in layers):
            raise self._refused(num_layers, others, rest)
        return tuple(layers)

    def _refused(self, num_layers: int, others: int, rest: int) -> UserError:
        given = {"parallel.first_stage_layers": self.first, "parallel.last_stage_layers": self.last}
        fields = [name for name, count in given.items() if count is not None]
        stages = f"{others} other stages" if others != 1 else "the other stage"
        parts = f" of {self.parts} parts" if self.parts > 1 else ""
        return UserError(
            ", ".join(fields),
            " and ".join(str(given[name]) for name in fields),
            f"leaves {rest} of the model's {num_layers} layers to {stages}{parts}",
            "every stage needs a layer for each part, and all stages but the first and the last need equally many",
        )

    def stage_of(self, layer: int, num_layers: int) -> int:
        """The stage of a layer."""
        return _stage_of_each(self, num_layers)[layer]


@functools.lru_cache(maxsize=64)
def _stage_of_each(stages: Stages, num_layers: int) -> tuple[int, ...]:
    of_a_part = [count // stages.parts for count in stages.layers(num_layers)]
    return tuple(stage for stage, count in enumerate(of_a_part) for _ in range(count)) * stages.parts
