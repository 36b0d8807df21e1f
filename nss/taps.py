"""Modules put into a traced copy of a network behind chosen nodes. The user's own module is not touched."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, fx, nn

from nss.functional import shell


class Tap(nn.Module):
    """Hands the activation to `see` and passes on what it returns."""

    def __init__(self, see: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._see = see

    def forward(self, x: Tensor) -> Tensor:
        """Pass the activation on."""
        return self._see(x)


def with_modules(graph: fx.GraphModule, behind: Mapping[fx.Node, nn.Module], prefix: str) -> fx.GraphModule:
    """Return a graph that calls `behind[node]` on the output of each node; parameters are shared with `graph`."""
    root = shell(graph)
    twin = fx.Graph()
    places: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        places[node] = twin.node_copy(node, lambda old: places[old])
        if node in behind:
            name = f"{prefix}_{node.name}"
            while name in root._modules:
                name += "_"
            root._modules[name] = behind[node]
            places[node] = twin.call_module(name, (places[node],))
    return fx.GraphModule(root, twin)
