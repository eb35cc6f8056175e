"""Adam by torch's own fused kernel, without the start of :class:`torch.optim.Optimizer`.

The constructor of every optimizer of torch imports torch's compiler, two seconds of processor time, which is as long as a short
training takes.  The functional form that this calls does the same steps, to the bit.
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
        parameters: to train; all are of one device.
        learning_rate: of every step.
        weight_decay: times the weights, added to the gradients.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float) -> None:
        self.parameters = list(parameters)
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.state: dict[int, dict[str, Tensor]] = {}

    def zero_grad(self) -> None:
        """Forget the gradients."""
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
        """The moments by number of the parameter, as torch's optimizers give them."""
        return {"state": self.state}

    def load_state_dict(self, given: dict[str, Any]) -> None:
        """Take the moments of :meth:`state_dict`, onto the device of their parameters."""
        self.state = {
            index: {key: tensor.to(self.parameters[index].device) for key, tensor in entry.items()}
            for index, entry in given["state"].items()
        }
