"""Tracing a network: the graph of operations that everything else goes by."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from nss import operations as ops
from nss.errors import SiteError
from nss.mask import ChannelMask

# torch.fx replaces methods of nn.Module while it traces, and puts back what it found.
_ONE_AT_A_TIME = threading.RLock()


class _Tracer(fx.Tracer):
    """Symbolic tracing that keeps torch's modules whole, wherever they come from.

    While it traces, torch.fx hands it every call of every module of the process: those of other threads go their way.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Put in the image alone: what else the forward takes has its default, so that it may ask for it."""
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        image = next((arg for arg in args if isinstance(arg, fx.Proxy)), None)
        return function, [arg if arg is image else _default(arg) for arg in args]

    def path_of_module(self, mod: nn.Module) -> str:
        """Return what a module is called in the network."""
        try:
            return super().path_of_module(mod)
        except NameError as problem:
            raise SiteError(
                f"the forward calls a {type(mod).__name__} that is no submodule of {type(self.root).__name__}",
                allowed="modules that the network holds, as attributes or in nn.Sequential or nn.ModuleList",
                fix="make it in __init__ (self.act = nn.ReLU()), not in the forward, and keep several in an "
                "nn.ModuleList, not a list; without weights it may be a function (F.relu)",
            ) from problem

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a call of this thread, run one of another."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Record an access of this thread, leave one of another alone."""
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, fx.GraphModule):
            return False
        return isinstance(m, ChannelMask) or super().is_leaf_module(m, module_qualified_name)


def _default(arg: Any) -> Any:
    """Return the default of an argument that has one, and the argument itself of others."""
    if not isinstance(arg, fx.Proxy) or not arg.node.args:
        return arg
    default = arg.node.args[0]
    arg.node.graph.erase_node(arg.node)
    return default


def trace(network: nn.Module) -> fx.GraphModule:
    """Return the network, as it answers to an image alone, as a graph that shares its parameters and modules.

    Raises SiteError when the forward depends on the data (an `if` on a tensor, a loop over its length).
    """
    try:
        with _ONE_AT_A_TIME:
            graph = _Tracer().trace(network)
    except SiteError:
        raise
    except Exception as problem:  # torch.fx raises whatever the user's forward raises on a proxy
        raise SiteError(
            f"the forward of {type(network).__name__} cannot be traced: {problem}",
            allowed="a forward whose operations do not depend on the values in the tensors",
            fix="replace `if`/`for` on tensors by torch.where or fixed loops, or put torch.fx.wrap around that part",
        ) from problem
    for node in graph.nodes:
        ops.by_position(node)
    return fx.GraphModule(network, graph)
