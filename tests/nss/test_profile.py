"""Every metric against numbers worked out by hand and against formulas written out plainly; sums that merge."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from nss.data import Data
from nss.errors import DataError, ModelError, ProfileError
from nss.model import save_model
from nss.profile import Profile, profile
from nss.sliced import sliced
from nss.tensor_files import write_tensors

METRICS = ("avg", "var", "ens", "taylor")
ZOO = ("lenet", "vgg_small", "resnet20", "mobilenet_small")

# networks.Plain on its four samples. Means over the maps: class 0: (1, 3) and (3, 1); class 1: (2, 2) and (0, 4).
# The hidden layer is (4, 4, m0). Both logits are 4, so d log p / d hidden = (+-1/2, -+1/2, 0) and the pooled maps get
# +-1/2 each: Taylor is m / 2 for the convolution and (2, 2, 0) for the hidden layer.
EXACT = {
    "avg": {"conv": [[1 / 2, 1 / 2], [1 / 4, 3 / 4]], "hidden": [[0.4, 0.4, 0.2], [4 / 9, 4 / 9, 1 / 9]]},
    "var": {"conv": [[1 / 2, 1 / 2], [1 / 2, 1 / 2]], "hidden": [[0, 0, 1], [0, 0, 1]]},
    "ens": {"conv": [[1 / 2, 1 / 2], [3 / 8, 5 / 8]], "hidden": [[0.2, 0.2, 0.6], [2 / 9, 2 / 9, 5 / 9]]},
    "taylor": {"conv": [[1 / 2, 1 / 2], [1 / 4, 3 / 4]], "hidden": [[1 / 2, 1 / 2, 0], [1 / 2, 1 / 2, 0]]},
}
OVERALL = {
    "avg": {"conv": [3 / 8, 5 / 8], "hidden": [8 / 19, 8 / 19, 3 / 19]},
    "var": {"conv": [1 / 2, 1 / 2], "hidden": [0, 0, 1]},
    "ens": {"conv": [7 / 16, 9 / 16], "hidden": [4 / 19, 4 / 19, 11 / 19]},
    "taylor": {"conv": [3 / 8, 5 / 8], "hidden": [1 / 2, 1 / 2, 0]},
}


def plain_profile(networks: ModuleType, **settings: object) -> Profile:
    return profile(networks.Plain(), networks.plain_samples(), classes=("a", "b"), input_shape=(1, 2, 2), **settings)


def as_tensor(rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("metric", METRICS)
def test_scores_of_a_hand_written_network_are_exact(networks: ModuleType, metric: str) -> None:
    found = plain_profile(networks)
    assert found.counts.tolist() == [2, 2]
    for layer, rows in EXACT[metric].items():
        torch.testing.assert_close(found.scores(metric)[layer], as_tensor(rows), atol=1e-7, rtol=0)
        torch.testing.assert_close(found.overall_scores(metric)[layer], as_tensor(OVERALL[metric][layer]))


def test_sums_of_a_hand_written_network_are_exact(networks: ModuleType) -> None:
    sums = plain_profile(networks).sums
    expected = {
        "abs": {"conv": [[4, 4], [2, 6]], "hidden": [[8, 8, 4], [8, 8, 2]]},
        "mean": {"conv": [[4, 4], [2, 6]], "hidden": [[8, 8, 4], [8, 8, 2]]},
        "square": {"conv": [[10, 10], [4, 20]], "hidden": [[32, 32, 10], [32, 32, 4]]},
        "taylor": {"conv": [[2, 2], [1, 3]], "hidden": [[4, 4, 0], [4, 4, 0]]},
    }
    assert sums.keys() >= expected.keys()
    for name, layers in expected.items():
        for layer, rows in layers.items():
            assert sums[name][layer].dtype == torch.float64
            torch.testing.assert_close(sums[name][layer], as_tensor(rows), atol=1e-6, rtol=0)


def test_second_moments_of_what_enters_each_layer_are_exact(networks: ModuleType) -> None:
    found = plain_profile(networks)
    # hidden reads the means (1, 3) (3, 1) (2, 2) (0, 4), once a sample; head reads (4, 4, m0).
    assert found.gram("hidden").tolist() == [[14 / 4, 10 / 4], [10 / 4, 30 / 4]]
    assert found.gram("head").tolist() == [[16, 16, 6], [16, 16, 6], [6, 6, 14 / 4]]
    assert (found.positions["hidden"], found.positions["head"]) == (4, 4)
    assert found.reads["conv"] == ("hidden", (0, 1))
    assert found.reads["hidden"] == ("head", (0, 1, 2))
    with pytest.raises(ProfileError, match="no Gram matrix of 'nowhere'"):
        found.gram("nowhere")
    assert not plain_profile(networks, gram=False).grams


def test_taylor_takes_the_size_of_the_sum_over_space_not_the_sum_of_sizes(networks: ModuleType) -> None:
    # Pixels 2 and 2: logit 0 is 2 - 2 + 2 + 2 - 4 = 0, p = 1/2. Channel 0 gives 2/2 - 2/2 = 0, channel 1 2/2 + 2/2 = 2.
    data = torch.full((1, 1, 1, 2), 2.0), torch.tensor([0])
    found = profile(networks.Opposed(), data, ("taylor",), classes=("a", "b"), input_shape=(1, 1, 2))
    torch.testing.assert_close(found.sums["taylor"]["conv"][0], as_tensor([0, 2]), atol=1e-6, rtol=0)


def written_out(network: nn.Module, images: Tensor, labels: Tensor, classes: int) -> dict[str, dict[str, Tensor]]:
    """The formulas of method.md 2 with loops over samples, from a network that names its parts."""
    per_sample: dict[str, list[dict[str, Tensor]]] = {}
    for image, label in zip(images, labels.tolist(), strict=True):
        parts, logits = network.parts(image[None])
        log_p = logits[0, label] - logits[0].exp().sum().log()
        for layer, a in parts.items():
            (gradient,) = torch.autograd.grad(log_p, a, retain_graph=True)
            flat = a.detach().double().reshape(a.shape[1], -1)
            product = (a * gradient).detach().double().reshape(a.shape[1], -1)
            values = {"label": torch.tensor(label), "mean": flat.mean(1), "taylor": product.sum(1).abs()}
            per_sample.setdefault(layer, []).append(values)
    found: dict[str, dict[str, Tensor]] = {metric: {} for metric in METRICS}
    for layer, rows in per_sample.items():
        by_class = [[row for row in rows if int(row["label"]) == c] for c in range(classes)]
        avg = torch.stack([torch.stack([r["mean"].abs() for r in of]).mean(0) for of in by_class])
        var = torch.stack([torch.stack([r["mean"] for r in of]).var(0, unbiased=False) for of in by_class])
        taylor = torch.stack([torch.stack([r["taylor"] for r in of]).mean(0) for of in by_class])
        avg, var, taylor = (each / each.sum(1, keepdim=True) for each in (avg, var, taylor))
        found["avg"][layer], found["var"][layer], found["taylor"][layer] = avg, var, taylor
        found["ens"][layer] = (avg + var) / 2
    return found


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        ("Smooth", (2, 4, 4), 3),
        ("InPlace", (1, 6, 6), 2),
        ("OneRelu", (1, 6, 6), 2),
        ("Twice", (1, 6, 6), 2),
        ("DropThenAdd", (1, 6, 6), 2),
        ("ViewThenRelu", (1, 4, 4), 2),
    ],
)
def test_scores_follow_the_formulas_written_out(
    networks: ModuleType, name: str, shape: tuple[int, int, int], classes: int
) -> None:
    torch.manual_seed(1)
    network = networks.randomise(getattr(networks, name)(), 2).eval()
    images, labels = networks.floats(11, shape), torch.arange(11) % classes
    expected = written_out(network, images, labels, classes)
    found = profile(
        network, (images, labels), batch_size=4, classes=[str(c) for c in range(classes)], input_shape=shape
    )
    assert list(found.layers) == list(expected["avg"])
    for metric in METRICS:
        for layer, rows in expected[metric].items():
            difference = float((found.scores(metric)[layer] - rows).abs().max())
            assert difference < 1e-5, f"{metric} {layer}"


@pytest.mark.parametrize("metric", METRICS)
def test_scores_sum_to_one_for_each_category_and_layer(networks: ModuleType, metric: str) -> None:
    model = networks.zoo_model("mobilenet_small")
    found = profile(model, (networks.pictures(12), torch.arange(12) % 4))
    for rows in found.scores(metric).values():
        torch.testing.assert_close(rows.sum(1), torch.ones(4, dtype=torch.float64))
        assert (rows >= 0).all()


class Case:
    """A zoo model, 13 images, and their profile gathered in one go."""

    def __init__(self, networks: ModuleType, name: str) -> None:
        self.model = networks.zoo_model(name, seed=5)
        self.images, self.labels = networks.pictures(13, seed=5), torch.arange(13) % 4

    def profile(self, start: int, stop: int, batch_size: int) -> Profile:
        return profile(self.model, (self.images[start:stop], self.labels[start:stop]), METRICS, batch_size=batch_size)


@pytest.fixture(scope="module")
def exact(networks: ModuleType) -> dict[str, tuple[Case, Profile]]:
    """Float64 throughout: the last digit of a float32 activation depends on the batch size that was asked for."""
    found = {}
    for name in ZOO:
        case = Case(networks, name)
        case.model.double()
        found[name] = (case, case.profile(0, 13, 13))
    return found


def assert_equal_sums(left: Profile, right: Profile) -> None:
    """To 1e-9, sums above 1 as a share of the largest."""
    assert torch.equal(left.counts, right.counts)
    assert left.sums.keys() == right.sums.keys()
    assert dict(left.positions) == dict(right.positions)
    pairs = [(rows, right.sums[name][layer]) for name, layers in left.sums.items() for layer, rows in layers.items()]
    pairs += [(rows, right.grams[layer]) for layer, rows in left.grams.items()]
    for mine, theirs in pairs:
        assert float((mine - theirs).abs().max()) < 1e-9 * max(1.0, float(mine.abs().max()))


@pytest.mark.parametrize("name", ZOO)
@given(cut=st.integers(1, 12), batch_size=st.sampled_from([3, 5, 7]))
@settings(max_examples=3, deadline=None)
def test_profiles_of_two_parts_merge_into_that_of_the_whole_wherever_batches_end(
    exact: dict[str, tuple[Case, Profile]], name: str, cut: int, batch_size: int
) -> None:
    case, whole = exact[name]
    first, second = case.profile(0, cut, batch_size), case.profile(cut, 13, batch_size)
    assert_equal_sums(first.merge(second), whole)
    assert_equal_sums(second.merge(first), whole)


@pytest.mark.parametrize("name", ZOO)
def test_single_precision_merges_as_exactly_wherever_the_samples_are_parted(networks: ModuleType, name: str) -> None:
    """Batches are filled up, so that an image's float32 numbers do not depend on which others came with it."""
    case = Case(networks, name)
    whole = case.profile(0, 13, 32)
    for cut in (1, 5, 6, 12):
        assert_equal_sums(case.profile(0, cut, 32).merge(case.profile(cut, 13, 32)), whole)


def test_a_dataset_a_pair_and_a_loader_give_one_profile(networks: ModuleType) -> None:
    data = networks.coloured_data(24)
    torch.manual_seed(0)
    network = networks.Three()
    settings_ = {"classes": data.classes, "input_shape": data.image_shape}
    images = data.images.float() / 255
    loader = DataLoader(TensorDataset(images, data.labels), batch_size=7)
    pair = profile(network, (images, data.labels), batch_size=5, **settings_)
    streamed = profile(network, loader, batch_size=5, **settings_)
    for layer, scores in pair.scores().items():
        assert torch.equal(scores, streamed.scores()[layer])


def test_only_the_first_samples_of_each_category_are_used(networks: ModuleType) -> None:
    model = networks.zoo_model("lenet")
    images = networks.pictures(20)
    labels = torch.tensor([0, 0, 1, 0, 2, 1, 3, 3, 3, 1, 1, 2, 2, 0, 0, 1, 2, 3, 0, 1])
    chosen, seen = [], dict.fromkeys(range(4), 0)
    for index, label in enumerate(labels.tolist()):
        if seen[label] < 3:
            chosen.append(index)
            seen[label] += 1
    limited = profile(model, (images, labels), samples_per_class=3, batch_size=4)
    expected = profile(model, (images[chosen], labels[chosen]), batch_size=20)
    assert limited.counts.tolist() == [3, 3, 3, 3]
    for layer, scores in expected.scores("taylor").items():
        torch.testing.assert_close(limited.scores("taylor")[layer], scores, atol=1e-6, rtol=1e-4)


def test_only_the_sums_of_the_metrics_asked_for_are_gathered(networks: ModuleType) -> None:
    found = plain_profile(networks, metrics=("avg",))
    assert found.metrics == ("avg",)
    assert list(found.sums) == ["abs"]
    with pytest.raises(ProfileError, match="'taylor' was not gathered") as caught:
        found.scores("taylor")
    assert caught.value.allowed == "avg"
    assert plain_profile(networks, metrics=("ens",)).metrics == ("avg", "var", "ens")


def test_a_torchvision_resnet_with_in_place_relu_and_add_is_profiled_call_by_call(networks: ModuleType) -> None:
    torch.manual_seed(0)
    network = networks.randomise(torchvision.models.resnet18(num_classes=3), 1).eval()
    images, labels = networks.floats(4, (3, 32, 32)), torch.arange(4) % 2
    found = profile(network, (images, labels), ("avg",), classes=("a", "b", "c"), input_shape=(3, 32, 32))
    seen: dict[str, Tensor] = {}
    handle = network.layer1[0].bn2.register_forward_hook(lambda _m, _i, out: seen.update(out=out.clone()))
    with torch.no_grad():
        network(images)
    handle.remove()
    expected = seen["out"].mean((2, 3)).abs().double()
    torch.testing.assert_close(
        found.sums["abs"]["layer1.0.conv2"][0], expected[labels == 0].sum(0), atol=1e-5, rtol=1e-4
    )


def test_masked_neurons_of_a_view_contribute_nothing(networks: ModuleType) -> None:
    view = sliced(networks.zoo_model("lenet"), {"conv1": torch.arange(16) < 4})
    found = profile(view, (networks.pictures(8), torch.arange(8) % 4))
    for metric in METRICS:
        assert not found.scores(metric)["conv1"][:, 4:].any(), metric


def test_a_category_without_images_scores_zero_and_one_with_a_single_image_has_no_variance(
    networks: ModuleType,
) -> None:
    model = networks.zoo_model("lenet")
    found = profile(model, (networks.pictures(4), torch.tensor([0, 0, 0, 2])))
    assert found.counts.tolist() == [3, 0, 1, 0]
    assert [float(row.sum()) for row in found.scores("taylor")["conv1"]] == pytest.approx([1, 0, 1, 0])
    for metric in ("var", "ens"):
        with pytest.raises(ProfileError, match=f"'{metric}' needs two samples") as caught:
            found.scores(metric)
        assert caught.value.where == "cow"
    assert float(found.overall_scores("var")["conv1"].sum()) == pytest.approx(1)


def test_a_silent_layer_scores_zero_without_dividing_by_it(networks: ModuleType) -> None:
    network = networks.Plain()
    with torch.no_grad():
        network.conv.weight.zero_()
        network.conv.bias.zero_()
    found = profile(network, networks.plain_samples(), classes=("a", "b"), input_shape=(1, 2, 2))
    for metric in METRICS:
        assert found.scores(metric)["conv"].tolist() == [[0, 0], [0, 0]]


def test_equal_profiles_give_equal_bytes_and_load_back_equal(networks: ModuleType, tmp_path: Path) -> None:
    found = plain_profile(networks)
    found.save(tmp_path / "a.safetensors")
    Profile.load(tmp_path / "a.safetensors").save(tmp_path / "b.safetensors")
    plain_profile(networks).save(tmp_path / "c.safetensors")
    first = (tmp_path / "a.safetensors").read_bytes()
    assert first == (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()
    again = Profile.load(tmp_path / "a.safetensors")
    assert (again.classes, dict(again.layers), again.model) == (found.classes, dict(found.layers), found.model)
    assert list(again.layers) == ["conv", "hidden"]
    for metric in METRICS:
        assert all(torch.equal(rows, again.scores(metric)[layer]) for layer, rows in found.scores(metric).items())


def test_profiles_of_different_models_classes_layers_or_metrics_do_not_merge(networks: ModuleType) -> None:
    found = plain_profile(networks)
    other = networks.Plain()
    with torch.no_grad():
        other.conv.weight += 1
    samples = networks.plain_samples()
    elsewhere = profile(other, samples, classes=("a", "b"), input_shape=(1, 2, 2))
    renamed = profile(networks.Plain(), samples, classes=("b", "a"), input_shape=(1, 2, 2))
    fewer = plain_profile(networks, metrics=("avg", "var"))
    for partner, what in ((elsewhere, "models"), (renamed, "classes"), (fewer, "metrics")):
        with pytest.raises(ProfileError, match=f"of different {what}"):
            found.merge(partner)
    thin = Profile(found.classes, {"conv": 2}, found.counts, {"abs": {}}, found.model)
    with pytest.raises(ProfileError, match="of different layers"):
        found.merge(thin)


@pytest.mark.parametrize("damage", ["missing", "cut", "text", "a model's weights", "another format"])
def test_a_missing_damaged_or_foreign_profile_is_refused(networks: ModuleType, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "profile.safetensors"
    plain_profile(networks).save(path)
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage == "text":
        path.write_text("not tensors")
    elif damage == "a model's weights":
        save_model(networks.zoo_model("lenet"), tmp_path / "model")
        path = tmp_path / "model" / "model.safetensors"
    else:
        write_tensors(path, {"counts": torch.zeros(2)}, {"format": 99})
    with pytest.raises(ProfileError) as caught:
        Profile.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [({"metrics": ("avg", "size")}, r"the metrics are \['avg', 'size'\]"), ({"metrics": ()}, r"the metrics are \[\]")],
)
def test_unknown_metrics_are_refused(networks: ModuleType, settings_: dict[str, object], message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        plain_profile(networks, **settings_)


@pytest.mark.parametrize("label", [2, -1])
def test_a_label_that_the_model_does_not_know_is_named(networks: ModuleType, label: int) -> None:
    images, labels = networks.plain_samples()
    labels[1] = label
    with pytest.raises(ProfileError, match=f"a label is {label}") as caught:
        profile(networks.Plain(), (images, labels), classes=("a", "b"), input_shape=(1, 2, 2))
    assert "0 to 1" in caught.value.allowed


def test_more_classes_than_the_model_has_logits_are_refused(networks: ModuleType) -> None:
    images, labels = networks.plain_samples()
    labels[3] = 2
    with pytest.raises(ProfileError):
        profile(networks.Plain(), (images, labels), classes=("a", "b", "c"), input_shape=(1, 2, 2))


def test_a_norm_by_the_batch_is_refused_since_an_image_has_no_numbers_of_its_own(networks: ModuleType) -> None:
    data = networks.floats(5, (1, 4, 4)), torch.arange(5) % 2
    for norm, refused in ((nn.BatchNorm2d, True), (nn.InstanceNorm2d, False)):
        layers = nn.Conv2d(1, 3, 3), norm(3, track_running_stats=False), nn.Flatten(), nn.Linear(12, 3), nn.ReLU()
        with pytest.raises(ProfileError, match="the norm '1' keeps no statistics") if refused else nullcontext():
            profile(nn.Sequential(*layers, nn.Linear(3, 2)), data, classes=("a", "b"), input_shape=(1, 4, 4))


def test_no_samples_no_names_no_shape_and_whole_numbers_are_refused(networks: ModuleType) -> None:
    images, labels = networks.plain_samples()
    network = networks.Plain()
    empty: Data = (images[:0], labels[:0])
    with pytest.raises(ProfileError, match="no samples to profile"):
        profile(network, empty, classes=("a", "b"), input_shape=(1, 2, 2))
    with pytest.raises(ProfileError, match="Plain does not say which classes it knows"):
        profile(network, (images, labels), input_shape=(1, 2, 2))
    with pytest.raises(ModelError, match="does not say which images it takes"):
        profile(network, (images, labels), classes=("a", "b"))
    with pytest.raises(ProfileError, match="the images are whole numbers"):
        profile(network, (images.byte(), labels), classes=("a", "b"), input_shape=(1, 2, 2))
    with pytest.raises(DataError, match="do not fit each other"):
        profile(network, (images, labels[:2]), classes=("a", "b"), input_shape=(1, 2, 2))
