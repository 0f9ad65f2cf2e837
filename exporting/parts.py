"""The networks that an export consists of, each with example inputs and dynamic sizes."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Part:
    """A network that becomes a file of its own: most models have one, SAM and CLIPSeg have more."""

    name: str  # network; encoder, decoder of SAM; vision, text, decoder of CLIPSeg
    # The network, or its exported file once opened. Takes tensors in the order of `inputs`.
    module: nn.Module | Callable
    inputs: dict[str, Tensor]  # name -> example, with a batch of two
    outputs: tuple[str, ...]  # names of the results
    # Name of an input -> {axis: name of its size}; all other sizes are fixed.
    dynamic: dict[str, dict[int, str]] = field(default_factory=dict)

    @torch.no_grad()
    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs by name. inputs: as `inputs`, in the same order."""
        outputs = self.module(*inputs.values())
        if isinstance(outputs, Tensor):
            outputs = (outputs,)
        return dict(zip(self.outputs, outputs, strict=True))
