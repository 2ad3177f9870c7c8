"""What the experiments of the paper share: its design on request, and one knob for its size.

`design: identified` (the default) is the design that can find its effect; `design: paper` is that of arXiv 2509.23383: it sets every
parameter that the configuration leaves open to the paper's own value, and switches what the docstring of the experiment says it switches.
Either way the manifest records all parameters as used.

`scale` multiplies how much is inserted: numbers of items where a design counts them, shares where it gives a share of the run. Copies of
an item, windows, lengths and thresholds are never scaled. So `design: paper` with `scale: 1` at the reference geometry is the paper's
experiment. Numbers of items do not follow the geometry (a run of a hundredth of the steps wants `scale: 0.01`); shares do.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from megatron_exp.stream.slot import Geometry

REFERENCE = Geometry(sequence_length=4096, global_batch_size=512, steps=100_000)
"""The run of the paper: OLMo-2 1B, 209.7B tokens."""


class PaperDesign(BaseModel):
    """Mixin of an `Experiment`: the parameters `design` and `scale`."""

    PAPER: ClassVar[Mapping[str, Any]] = {}
    """Parameters of the paper's design that differ from the defaults."""

    design: Literal["identified", "paper"] = "identified"
    scale: Annotated[float, Field(gt=0, le=10_000)] = 1.0

    @model_validator(mode="before")
    @classmethod
    def _fill_in_the_papers(cls, data: Any) -> Any:
        """What the configuration sets wins over the paper's own."""
        if isinstance(data, dict) and data.get("design") == "paper":
            return {**cls.PAPER, **data}
        return data

    def scaled(self, number: float, least: int = 1) -> int:
        """A number of items at this scale, at least `least`."""
        return max(least, round(self.scale * number))
