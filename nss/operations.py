"""What each operation of a traced network does to channels: the vocabulary of nss.anatomy."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn

from nss.mask import ChannelMask

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# What has weights over channels.
LAYERS = (*CONVOLUTIONS, nn.Linear)
CHANNEL_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Norms that average over channels: a channel removed and a channel at zero are two different things to them.
MIXING_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Tanh, nn.ELU, nn.SELU, nn.CELU, nn.Mish,
    nn.Hardtanh, nn.Softsign, nn.Sigmoid, nn.Hardsigmoid, nn.Softplus, nn.LogSigmoid,
)  # fmt: skip
POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.Upsample, nn.ZeroPad2d,
)  # fmt: skip
PASSING = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.FeatureAlphaDropout, ChannelMask,
)  # fmt: skip

ACTIVATION_NAMES = {
    "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "gelu", "silu", "hardswish", "tanh", "tanh_", "elu", "elu_",
    "selu", "celu", "mish", "hardtanh", "hardtanh_", "softsign", "sigmoid", "sigmoid_", "hardsigmoid", "softplus",
    "logsigmoid", "clamp", "clamp_", "clip",
}  # fmt: skip
POOL_NAMES = {
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d", "boolean_dispatch", "interpolate",
}  # fmt: skip
PASSING_NAMES = {
    "dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "alpha_dropout", "contiguous",
    "clone", "detach", "to", "float", "type_as", "neg", "abs", "stochastic_depth",
}  # fmt: skip
REDUCTION_NAMES = {"mean", "sum", "amax"}
MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
MAX_POOL_NAMES = {"max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d"}
# Operations that only move numbers about; the second set fixes sizes that removal would change.
FREE_MOVES = {
    "flatten",
    "permute",
    "transpose",
    "cat",
    "concat",
    "stack",
    "unsqueeze",
    "squeeze",
    "getitem",
    "roll",
    "t",
}
RIGID_MOVES = {"reshape", "view", "chunk", "split", "unflatten", "expand", "tensor_split", "unbind"}
BINARY_NAMES = {
    "add",
    "iadd",
    "add_",
    "sub",
    "isub",
    "sub_",
    "mul",
    "imul",
    "mul_",
    "div",
    "truediv",
    "itruediv",
    "div_",
}
DIVISIONS = {"div", "truediv", "itruediv", "div_"}
KNOWN_NAMES = (
    ACTIVATION_NAMES | POOL_NAMES | PASSING_NAMES | REDUCTION_NAMES | MAX_POOL_NAMES | FREE_MOVES | RIGID_MOVES
    | BINARY_NAMES
)  # fmt: skip
# f(0) != 0: after one of these a masked channel has to be masked again.
ZERO_MOVERS = {
    "sigmoid", "sigmoid_", "hardsigmoid", "softplus", "logsigmoid", "clamp", "clamp_", "clip", "hardtanh", "hardtanh_",
}  # fmt: skip
ZERO_MOVING_MODULES = (nn.Sigmoid, nn.Hardsigmoid, nn.Softplus, nn.LogSigmoid, nn.Hardtanh, *CHANNEL_NORMS)


# Who wrote the functions that go by their names here; builtins of PyTorch name no module.
LIBRARIES = {"torch", "torchvision", "_operator", "None"}


def name_of(node: fx.Node) -> str:
    """Plain name of the function or method a node calls: `F.relu`, `torch.relu` and `x.relu()` are all "relu".

    Empty where a name says nothing: an attribute `self.relu` and a function of the user's own can be anything.
    """
    library = str(getattr(node.target, "__module__", None)).partition(".")[0]
    known = node.op == "call_method" or (node.op == "call_function" and library in LIBRARIES)
    return _called(node) if known else ""


def _called(node: fx.Node) -> str:
    return str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))


def by_position(node: fx.Node) -> None:
    """Let a node take by position what it reads, as in `torch.add(input=x, other=y)`: others look for it there."""
    if node.op != "call_module" and name_of(node) not in KNOWN_NAMES:
        return  # another function's `other` may be its third
    settings = dict(node.kwargs)
    for place, names in enumerate((("input", "tensors"), ("other",))):
        given = [name for name in names if name in settings and len(node.args) == place]
        node.args = (*node.args, *(settings.pop(name) for name in given))
    node.kwargs = settings


def module_calls(graph: fx.GraphModule) -> Counter[str]:
    """Return how often each module is called, {name: number}."""
    return Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_module")


def module_of(node: fx.Node, root: nn.Module) -> nn.Module | None:
    """Return the module that a node calls, or None for functions and methods."""
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def is_activation(node: fx.Node, root: nn.Module) -> bool:
    """Say whether the node is an elementwise nonlinearity."""
    module = module_of(node, root)
    if module is not None:
        return isinstance(module, ACTIVATIONS)
    return name_of(node) in ACTIVATION_NAMES


def is_norm(node: fx.Node, root: nn.Module) -> bool:
    """Say whether the node is a normalisation layer."""
    return isinstance(module_of(node, root), CHANNEL_NORMS + MIXING_NORMS)


def is_passing(node: fx.Node, root: nn.Module) -> bool:
    """Say whether the node keeps channels as they are: pooling, dropout, identity."""
    module = module_of(node, root)
    if module is not None:
        return isinstance(module, POOLS + PASSING)
    return name_of(node) in POOL_NAMES | PASSING_NAMES


def is_depthwise(layer: nn.Module) -> bool:
    """Say whether each output of the layer reads one channel: none is mixed with another."""
    return 1 < int(getattr(layer, "groups", 1)) == getattr(layer, "in_channels", 0)


def is_dropout(node: fx.Node, root: nn.Module) -> bool:
    """Say whether the node hands its input on in evaluation mode."""
    module = module_of(node, root)
    if module is not None:
        return isinstance(module, PASSING)
    return "dropout" in name_of(node) or name_of(node) == "stochastic_depth"


def norm_behind(node: fx.Node, root: nn.Module) -> nn.BatchNorm2d | None:
    """Return the BatchNorm that alone reads the node's output, or None."""
    norm = module_of(next(iter(node.users)), root) if len(node.users) == 1 else None
    return cast(nn.BatchNorm2d, norm) if isinstance(norm, CHANNEL_NORMS) else None


def moves_zero(node: fx.Node, root: nn.Module) -> bool:
    """Say whether a channel that is zero before the node may not be zero after it."""
    module = module_of(node, root)
    if module is not None:
        return isinstance(module, ZERO_MOVING_MODULES)
    name = name_of(node)
    scalar = any(isinstance(arg, (int, float)) for arg in node.args)
    return name in ZERO_MOVERS or (name in ("add", "iadd", "add_", "sub", "isub", "sub_") and scalar)


def writes_in_place(node: fx.Node, root: nn.Module) -> bool:
    """Say whether the node overwrites its first argument."""
    module = module_of(node, root)
    if module is not None:
        return bool(getattr(module, "inplace", False))
    inplace_operators = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
    named = node.op in ("call_method", "call_function") and _called(node).endswith("_")
    return named or node.target in inplace_operators or bool(node.kwargs.get("inplace", False))


def move_ids(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a moving operation on integer tensors: where the numbers go, their names go."""
    if node.op == "call_method":
        # The names are an expanded tensor, which cannot be viewed, only reshaped.
        name = "reshape" if name_of(node) == "view" else name_of(node)
        return getattr(args[0], name)(*args[1:], **kwargs)
    function = cast("Callable[..., Any]", node.target)
    return function(*args, **kwargs)


def flattens_all(node: fx.Node, result: torch.Tensor) -> bool:
    """Say whether a view or reshape is `x.view(n, -1)`: sizes follow whatever channels are left."""
    sizes: Any = node.args[1:] or tuple(node.kwargs.values())
    sizes = sizes[0] if isinstance(sizes[0], (tuple, list)) else sizes
    return bool(result.dim() == 2 and sizes[-1] == -1)


def is_max_pool(node: fx.Node, root: nn.Module) -> bool:
    """Say whether the node takes the largest value of each window, and says nothing of where it lies."""
    module = module_of(node, root)
    if isinstance(module, MAX_POOLS):
        return not module.return_indices
    # Unlike its namesake of torch.nn.functional, this one returns both.
    return name_of(node) in MAX_POOL_NAMES and node.target is not torch.adaptive_max_pool1d


def bound(node: fx.Node, root: nn.Module, **changes: Any) -> Callable[..., Any]:
    """Return what the node does as a function of the nodes it reads; `changes` override its settings."""
    module = module_of(node, root)
    if isinstance(module, nn.ReLU) or name_of(node) == "relu":
        return nn.ReLU()
    if module is not None:
        twin = copy.copy(module)
        for name, value in changes.items():
            setattr(twin, name, value)
        return twin
    # torch.max_pool2d cannot say where the largest value lies; its namesake, with the same arguments, can.
    target: Any = getattr(F, name_of(node)) if is_max_pool(node, root) else node.target

    def call(*inputs: Any) -> Any:
        values = dict(zip(node.all_input_nodes, inputs, strict=True))
        args = fx.map_arg(node.args, values.__getitem__)
        settings = {**fx.map_arg(node.kwargs, values.__getitem__), **changes}
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **settings)
        return target(*args, **settings)

    return call
