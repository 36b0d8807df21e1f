"""Traced copies for profiling: the same numbers, with BatchNorm folded where that is sound."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from nss.anatomy import trace
from nss.functional import with_norms_folded
from nss.prune_weights import prune_weights


def settled(network: nn.Module) -> nn.Module:
    """Norms with statistics and weights of their own."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for name, tensor in {**dict(module.named_buffers()), **dict(module.named_parameters())}.items():
                if tensor.is_floating_point():
                    tensor.data.uniform_(0.5, 1.5, generator=generator)
                    tensor.data.mul_(-1 if name == "bias" else 1)
    return network.eval()


def targets(graph: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]


class Twice(nn.Module):
    """Calls one convolution twice, and reads another one before its norm too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.norm_a, self.norm_b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.lone = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        once = self.norm_a(self.a(self.a(x)))
        read = self.b(once)
        return self.lone(self.c(self.norm_b(read))) + read


@pytest.mark.parametrize("layer", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("bias", [True, False])
def test_a_norm_behind_a_convolution_becomes_part_of_it(layer: type[nn.Conv2d], bias: bool) -> None:
    axes = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[layer]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes - 1](4)
    network = settled(nn.Sequential(layer(2, 4, 3, bias=bias, groups=2), norm, nn.ReLU()))
    x = torch.randn(2, 2, *[5] * axes, generator=torch.Generator().manual_seed(1))
    folded = with_norms_folded(trace(network))
    assert len(targets(folded)) == 2
    assert torch.allclose(folded(x), network(x), atol=1e-5)
    # What others know the value by is the norm's name.
    assert [node.name for node in folded.graph.nodes if str(node.target).startswith("folded_")] == ["_1"]


def test_nothing_is_folded_where_a_value_is_read_or_a_layer_called_again_or_statistics_are_the_batchs() -> None:
    graph = trace(settled(Twice()))
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    assert targets(with_norms_folded(graph)) == targets(graph)
    assert torch.equal(with_norms_folded(graph)(x), graph(x))


def test_a_value_that_must_stay_is_kept() -> None:
    graph = trace(settled(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))))
    (conv,) = [node.name for node in graph.graph.nodes if node.target == "0"]
    assert targets(with_norms_folded(graph, {conv})) == ["0", "1"]
    assert len(targets(with_norms_folded(graph))) == 1


def test_masked_weights_count_as_zeros_and_the_network_is_left_as_it_was() -> None:
    network = settled(nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 16, 3)))
    pruned = prune_weights(network, "global", 0.5).train()
    before = {name: value.clone() for name, value in pruned.state_dict().items()}
    graph = with_norms_folded(trace(pruned))
    x = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    assert all(torch.equal(value, before[name]) for name, value in pruned.state_dict().items())
    assert all(module.training for module in pruned.modules())
    assert torch.allclose(graph(x), pruned.eval()(x), atol=1e-5)
