"""Models that carry what they need: classes, input shape, normalisation; and the folder they are kept in.

A folder holds `model.safetensors` (weights and buffers) and `model.json` (how to build the module). Loading imports a
factory that is on the list of allowed packages and copies numbers into what it builds: nothing is unpickled.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from nss.contexts import evaluating, seeded
from nss.errors import ModelError, first_line
from nss.factories import factory_network
from nss.files import file_digest, replacing, write_json
from nss.mask import ChannelMask
from nss.model_spec import FORMAT, new_spec, read_spec
from nss.model_spec import ModelSpec as ModelSpec
from nss.model_spec import Task as Task
from nss.normalise import Normalise
from nss.operations import LAYERS
from nss.routing import Router
from nss.rows import FreeRows
from nss.surgery import shrink
from nss.tensor_files import read_tensors, write_tensors
from nss.weight_masks import MASK, apply_masks, plain_state
from nss.wiring import Columns, read_earlier

M = TypeVar("M", bound=nn.Module)


class Classifier(nn.Module):
    """A network with its normalisation inside. Layer names are those of `network`, the user's own module.

    >>> model = build_model("nss.zoo:lenet", classes=["a", "b"], input_shape=(1, 28, 28), seed=0)
    >>> model(torch.zeros(1, 1, 28, 28, dtype=torch.uint8)).shape
    torch.Size([1, 2])
    """

    def __init__(self, network: nn.Module, spec: ModelSpec, layout: torch.memory_format | None = None) -> None:
        super().__init__()
        self.spec = spec
        # The layout decides the last bits of every sum: a model has the same one whether it was built, cut or loaded.
        layout = layout or _layout_of(network, spec.input_shape)
        self.normalise = Normalise(spec.mean, spec.std, spec.input_shape, layout)
        self.network = network.to(memory_format=layout)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images: uint8 0..255 or floats 0..1, [n, c, h, w]. Returns logits [n, classes].

        Raises DataError for images of another shape, or other pixels.
        """
        logits: torch.Tensor = self.network(self.normalise(images))
        return logits


def _layout_of(network: nn.Module, input_shape: Sequence[int]) -> torch.memory_format:
    """Return channels last, in which convolutions on CPUs are faster, unless the network views maps as vectors."""
    like = next(network.parameters(), torch.zeros(()))
    image = torch.zeros(1, *input_shape, dtype=like.dtype, device=like.device)
    network.to(memory_format=torch.channels_last)
    try:
        with evaluating(network), torch.no_grad():
            network(image.contiguous(memory_format=torch.channels_last))
    except Exception as problem:
        # What else is wrong with it is said where it is used, with the images at hand.
        if "view size is not compatible" in str(problem):
            return torch.contiguous_format
    return torch.channels_last


def build_model(
    factory: str,
    classes: Sequence[str],
    input_shape: Sequence[int],
    seed: int,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    arguments: Mapping[str, Any] | None = None,
    allow: Sequence[str] = (),
) -> Classifier:
    """Build an untrained model; the same seed gives the same weights.

    factory: "package.module:callable", called with num_classes and, where its signature has it, input_shape.
    input_shape: (channels, height, width). mean, std: of each channel on 0..1 (default 0.5 and 0.5).
    allow: packages whose factories may be imported beside nss.zoo and torchvision.models.
    arguments: of the factory, of types that JSON has, since model.json keeps them.
    Raises ModelError for a factory that is not allowed, does not exist, or does not take its arguments, and for what
    model.json could not keep.

    >>> model = build_model("nss.zoo:resnet20", classes=["cat", "dog"], input_shape=(3, 32, 32), seed=0)
    >>> model.spec.classes
    ('cat', 'dog')
    """
    spec = new_spec(factory, classes, input_shape, mean, std, arguments)
    return Classifier(_build_network(spec, seed, allow), spec)


def _build_network(spec: ModelSpec, seed: int, allow: Sequence[str]) -> nn.Module:
    if not spec.tasks:
        return factory_network(spec, len(spec.classes), seed, allow)
    columns: list[nn.Module] = []
    for task in spec.tasks:
        column = factory_network(spec, task.classes, seed, allow)
        if task.kept:
            shrink(column, spec.input_shape, task.kept)
        if columns:
            with seeded(seed, device_of(column)):
                read_earlier(column, columns, spec.input_shape)
        columns.append(column)
    try:
        router = Router(spec.views, spec.features, [task.classes for task in spec.tasks])
    except RuntimeError as problem:
        raise ModelError(f"a router of {spec.features} features cannot be made: {first_line(problem)}") from None
    return Columns(columns, spec.input_shape, router)


def model_digest(model: nn.Module) -> str:
    """Digest of names, shapes and bytes of all parameters, buffers and masks, 32 hexadecimal characters."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(plain_state(model).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_model(model: nn.Module, folder: str | Path) -> None:
    """Write a model made by `build_model` (or sliced, restructured .. from one) as a folder, in one rename.

    Raises ModelError for a module that does not say how it is built.
    """
    if not isinstance(model, Classifier):
        raise ModelError(
            f"{type(model).__name__} does not say how it is built",
            allowed="models made by nss.build_model or nss.load_model",
            fix='make a factory for it and call nss.build_model("package.module:callable", ...)',
        )
    if any(isinstance(module, ChannelMask) for module in model.modules()):
        raise ModelError("a masked view cannot be kept", fix="save nss.remove(model, neurons) instead")
    if any(isinstance(module, FreeRows) for module in model.modules()):
        raise ModelError("a frozen copy cannot be kept", fix="save nss.thaw(model) instead")
    with replacing(Path(folder)) as part:
        part.mkdir()
        write_tensors(part / "model.safetensors", plain_state(model), {"format": FORMAT})
        weights = file_digest(part / "model.safetensors")
        write_json(part / "model.json", {"format": FORMAT, **asdict(model.spec), "weights": weights})


def load_model(folder: str | Path, allow: Sequence[str] = ()) -> Classifier:
    """Load a model folder in evaluation mode: equal logits in any process, ready to train on.

    allow: packages whose factories may be imported beside nss.zoo and torchvision.models.
    Raises ModelError for a missing, damaged or changed file and for a factory that is not allowed.

    >>> nss.save_model(model, "folder")
    >>> again = nss.load_model("folder")
    """
    folder = Path(folder)
    spec, weights = read_spec(folder / "model.json")
    tensors, _ = read_tensors(folder / "model.safetensors", ModelError)
    if file_digest(folder / "model.safetensors") != weights:
        raise ModelError("the weights are not those that model.json names", where=str(folder), fix="restore the folder")
    network = _build_network(spec, 0, allow)
    if spec.kept:
        shrink(network, spec.input_shape, spec.kept)
    model = Classifier(network, spec)
    masks = _split_masks(model, tensors, folder)
    _fill(model, tensors, folder)
    apply_masks(model, masks)
    return model.eval()


def _split_masks(model: nn.Module, tensors: dict[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    """Take the masks of weights out of `tensors`. Returns {layer: mask}."""
    own = model.state_dict()
    names = [name for name in tensors if name.endswith(f".{MASK}") and name not in own]
    masks = {name.removesuffix(f".{MASK}"): tensors.pop(name) for name in names}
    prunable = {name: module.weight.shape for name, module in model.named_modules() if isinstance(module, LAYERS)}
    for layer, mask in masks.items():
        if mask.dtype != torch.bool or mask.shape != prunable.get(layer):
            found = f"{str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}"
            allowed = f"bool {list(prunable[layer])}" if layer in prunable else "layers with weights to mask"
            raise ModelError(
                f"the mask of {layer!r} is {found}", where=str(folder), allowed=allowed, fix="restore the folder"
            )
    return masks


def _fill(model: nn.Module, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if own != stored:
        differing = sorted(name for name in own.keys() | stored.keys() if own.get(name) != stored.get(name))
        raise ModelError(
            f"the weights do not fit the factory: {', '.join(differing[:5])}{' ..' if len(differing) > 5 else ''}",
            where=str(folder),
            fix="the factory has changed since the model was saved: restore it, or train again",
        )
    for name, tensor in model.state_dict(keep_vars=True).items():
        # A model may have been made double or half; load_state_dict would round without a word. A mean that was once
        # kept as whole numbers is none the less one of floats.
        if tensors[name].is_floating_point() or not tensor.is_floating_point():
            tensor.data = tensor.data.to(tensors[name].dtype)
    model.load_state_dict(dict(tensors))


def network_of(model: nn.Module) -> nn.Module:
    """Return the module whose layers have the names that profiles and slices use."""
    return model.network if isinstance(model, Classifier) else model


def with_network(model: nn.Module, network: nn.Module, **changes: Any) -> nn.Module:
    """Return `network` dressed like `model`; `changes` go into its spec."""
    if not isinstance(model, Classifier):
        return network
    twin = Classifier(network, replace(model.spec, **changes), model.normalise.layout)
    # What shares weights goes to another device or precision together with the model; what has its own goes alone.
    is_view = not set(network.parameters()).isdisjoint(model.network.parameters())
    twin.normalise = model.normalise if is_view else copy.deepcopy(model.normalise)
    twin.training = model.training
    return twin


def shape_of(model: nn.Module, input_shape: Sequence[int] | None) -> tuple[int, ...]:
    """Return the image shape a model takes: its own, or the one that was given."""
    if input_shape is not None:
        return tuple(input_shape)
    if isinstance(model, Classifier):
        return model.spec.input_shape
    raise ModelError(
        f"{type(model).__name__} does not say which images it takes",
        allowed="input_shape=(channels, height, width)",
        fix="pass input_shape, or make the model with nss.build_model",
    )


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter; without parameters, the CPU."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def on_device(model: M, device: str | torch.device | None) -> M:
    """Return `model` where it is, or a copy of it on another device; "auto" is CUDA, then MPS, then the CPU.

    Raises ModelError for a device that this machine does not have.
    """
    found = fastest_device() if device == "auto" else device_of(model) if device is None else torch.device(device)
    if found.type == device_of(model).type:
        return model
    try:
        return copy.deepcopy(model).to(found)
    except (RuntimeError, AssertionError) as problem:
        raise ModelError(
            f"the model cannot go to {found}: {problem}", allowed=f"auto, cpu or {fastest_device()} on this machine"
        ) from None


def fastest_device() -> torch.device:
    """Return CUDA or MPS where PyTorch can use it, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
