"""One channel that a convolution reads several times: each place counts, as those of a flattened map do not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nss.profile import profile

SHAPE = (3, 8, 8)
READ = {"expand": 3, "concatenated": 4, "stacked": 4}


class Copied(nn.Module):
    """Reads what one convolution makes more than once."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.first = nn.Conv2d(3, 1 if how == "expand" else 2, 3, padding=1)
        self.second = nn.Conv2d(READ[how], 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def copied(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.how == "expand":
            return x.expand(-1, 3, -1, -1)
        return torch.cat([x, -x], 1) if self.how == "concatenated" else torch.stack([x] * 2, 2).flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(self.copied(x))).mean((2, 3)))


@pytest.mark.parametrize("how", READ)
def test_the_gram_matrix_is_of_all_that_a_convolution_reads(how: str) -> None:
    network = Copied(how).eval()
    images = torch.rand(12, *SHAPE, generator=torch.Generator().manual_seed(1))
    found = profile(network, (images, torch.arange(12) % 4), classes=list("abcd"), input_shape=SHAPE, windows=1)
    read = network.copied(images).detach().double().movedim(1, -1).reshape(-1, READ[how])
    torch.testing.assert_close(found.grams["second"], read.T @ read, rtol=1e-6, atol=1e-6)
