"""Adam with torch's fused kernel, without the start-up cost of :class:`torch.optim.Optimizer`.

The constructor of torch's optimizers imports torch's compiler, which costs two seconds of processor time, as much as a short
training.  The functional form used here is bit-equal.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam


class Adam:
    """Adam (Kingma & Ba 2015) with betas .9 and .999, as ``torch.optim.Adam(parameters, lr, weight_decay=..., fused=True)``.

    Args:
        parameters: parameters to train, all on one device.
        learning_rate: learning rate of every step.
        weight_decay: factor of the weights that are added to the gradients.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float) -> None:
        self.parameters = list(parameters)
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.state: dict[int, dict[str, Tensor]] = {}

    def zero_grad(self) -> None:
        """Set all gradients to None."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One step for every parameter that has a gradient."""
        used = [(index, parameter) for index, parameter in enumerate(self.parameters) if parameter.grad is not None]
        states = [self._state(index, parameter) for index, parameter in used]
        adam(
            [parameter for _, parameter in used],
            [parameter.grad for _, parameter in used if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
            eps=1e-8,
            maximize=False,
        )

    def _state(self, index: int, parameter: nn.Parameter) -> dict[str, Tensor]:
        if index not in self.state:
            self.state[index] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return self.state[index]

    def state_dict(self) -> dict[str, Any]:
        """The moments by number of the parameter, in the format of torch's optimizers."""
        return {"state": self.state}

    def load_state_dict(self, given: dict[str, Any]) -> None:
        """Restore the moments of :meth:`state_dict` on the device of their parameters."""
        self.state = {
            index: {key: tensor.to(self.parameters[index].device) for key, tensor in entry.items()}
            for index, entry in given["state"].items()
        }
