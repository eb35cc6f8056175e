"""One of several processes: gathered losses and gradients against the big batch.  Run by test_gather.py."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from sda_core.losses import build, cmsa
from sda_core.losses.gather import gather
from sda_core.losses.grad_cache import cached_backward
from tests.sections import SHIPPED, changed

if TYPE_CHECKING:
    INDEX, COUNT, PORT = 0, 1, 0

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT)}
dist.init_process_group("gloo", rank=INDEX, world_size=COUNT)

B = 3
torch.manual_seed(0)
image, text = torch.randn(COUNT * B, 5), torch.randn(COUNT * B, 5)
big = [image.clone().requires_grad_(), text.clone().requires_grad_()]
whole = cmsa(*big, temperature=0.1)
whole.backward()

own = slice(INDEX * B, (INDEX + 1) * B)
parts = [image[own].clone().requires_grad_(), text[own].clone().requires_grad_()]
shared = cmsa(gather(parts[0]), gather(parts[1]), temperature=0.1)
shared.backward()
torch.testing.assert_close(shared, whole, rtol=0, atol=1e-12)
for part, one in zip(parts, big, strict=True):
    assert one.grad is not None
    assert part.grad is not None
    torch.testing.assert_close(part.grad, one.grad[own], rtol=0, atol=1e-12)

# losses that differ: the gradient is that of their mean
mine = image[own].clone().requires_grad_()
((INDEX + 1) * gather(mine).square().sum()).backward()
torch.testing.assert_close(mine.grad, 2 * image[own] * (COUNT + 1) / 2)

# parts of different length, in order; integers too
ragged = torch.arange(INDEX + 1) + 10 * INDEX
expected = torch.cat([torch.arange(index + 1) + 10 * index for index in range(COUNT)])
assert torch.equal(gather(ragged), expected)

# means that are subtracted, batch after batch, are those of the big batches; each process keeps the same running ones
for center in ("batch", "running"):
    params = changed(SHIPPED.train_adapter.loss, center=center, temperature=0.1, keep_base=0.3)
    ours, one_process = build(params), build(params)
    for seed in (5, 6, 7):
        torch.manual_seed(seed)
        batch = [torch.randn(COUNT * B, 5) + seed for _ in range(4)]
        rows, all_rows = ([x[part].clone().requires_grad_() for x in batch[:2]] for part in (own, slice(None)))
        value = ours(*map(gather, rows), base=(batch[2], batch[3]))
        whole = one_process(*all_rows, base=(batch[2], batch[3]))
        value.backward()
        whole.backward()
        torch.testing.assert_close(value, whole, rtol=0, atol=1e-12)
        for part, one in zip(rows, all_rows, strict=True):
            assert one.grad is not None
            torch.testing.assert_close(part.grad, one.grad[own], rtol=0, atol=1e-12)
    assert len(ours.center.means) == (4 if center == "running" else 0)
    for name, mean in ours.center.means.items():
        torch.testing.assert_close(mean, one_process.center.means[name], rtol=0, atol=1e-12)

# gradient caching on gathered vectors, with dropout: the parameters' gradients, summed, are the big batch's
torch.manual_seed(1)
net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.3), nn.Linear(7, 4))
log_temperature = torch.tensor(-2.0, requires_grad=True)


def embed(x: torch.Tensor, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return net(x)


def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return cmsa(gather(x), gather(y), log_temperature.exp())


chunks = [
    [lambda x=x, start=start, k=k: embed(x[start : start + 1], 100 * k + start) for start in range(INDEX * B, (INDEX + 1) * B)]
    for k, x in enumerate((image, text))
]
value = cached_backward(chunks, loss)
got = [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]
for grad in got:
    dist.all_reduce(grad)
temperature_grad = log_temperature.grad
net.zero_grad()
log_temperature.grad = None
x, y = (torch.cat([embed(m[i : i + 1], 100 * k + i) for i in range(COUNT * B)]) for k, m in enumerate((image, text)))
whole = cmsa(x, y, log_temperature.exp())
whole.backward()
torch.testing.assert_close(value, whole.detach(), rtol=0, atol=1e-10)
torch.testing.assert_close(temperature_grad, log_temperature.grad, rtol=0, atol=1e-10)
assert len(got) == 4
for grad, parameter in zip(got, net.parameters(), strict=True):
    assert parameter.grad is not None
    assert parameter.grad.any()
    torch.testing.assert_close(grad, parameter.grad, rtol=0, atol=1e-10)
dist.destroy_process_group()
