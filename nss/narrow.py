"""An extended model of which neurons were cut: again one of columns, which can be loaded, cut and extended as any."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from nss.model import Classifier, Task
from nss.routing import Router, choose_views
from nss.wiring import Columns

Kept = Mapping[str, tuple[int, ...]]


def narrow(model: Classifier) -> None:
    """Write, in place, what `remove` cut into the tasks of an extended model, and give it a router for what is left.

    The router has still to learn what the classes look like, and how to weigh its evidence (`route_anew`).
    """
    spec, network = model.spec, cast(Columns, model.network)
    tasks = tuple(Task(each.classes, _left(each.kept, spec.kept, place)) for place, each in enumerate(spec.tasks))
    views, features = choose_views(network.columns[0], spec.input_shape)
    router = Router(views, features, [each.classes for each in tasks])
    network.router = router.to(network.router.means.device)
    model.spec = replace(spec, kept={}, tasks=tasks, views=views, features=features)


def _left(before: Kept, cut: Kept, place: int) -> dict[str, tuple[int, ...]]:
    """Return {layer: the factory's neurons that are left of it in a column}. cut: by the layers of all columns."""
    prefix = f"columns.{place}."
    found = dict(before)
    for name, indices in cut.items():
        if name.startswith(prefix):
            layer = name.removeprefix(prefix)
            found[layer] = tuple(before[layer][index] for index in indices) if layer in before else indices
    return found
