"""README.md and docs/ say of nss and its alternatives what the result files say, also where nss is behind."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
from PIL import Image
from torch import nn
from torch.nn.utils import prune

import nss
from bench import alternatives, alternatives_training, pictures, rq3, rq4
from bench.extend_cases import HALVES
from bench.extend_peers import JOINT, NAIVE, REPLAY
from bench.measured import Source, best_in_bold, find, percent
from bench.readapt_cases import MAIN
from nss.ingest import demo
from nss.sites import find_sites

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESTRUCTURE = json.loads((ROOT / "docs" / "results" / "restructure.json").read_text(encoding="utf-8"))["summary"]
_FIGURE = re.compile(r"\d+\.\d+|\d+ ?%|±")


@pytest.mark.parametrize("page", alternatives.pages(), ids=lambda page: page.name)
def test_the_tables_of_a_page_are_what_the_result_files_give(page: Path) -> None:
    assert page.read_text(encoding="utf-8") == alternatives.filled(page), "run python -m bench.alternatives"


def test_every_marker_is_closed_and_every_table_is_shown_somewhere() -> None:
    texts = {page: page.read_text(encoding="utf-8") for page in [README, *(ROOT / "docs").glob("*.md")]}
    for page, text in texts.items():
        assert len(alternatives.MARKS.findall(text)) == text.count("<!-- measured: end") == text.count("<!-- ") / 2, (
            page
        )
    shown = {name for text in texts.values() for _, name, _ in alternatives.MARKS.findall(text)}
    assert shown == set(alternatives.SECTIONS)


def test_no_figure_of_the_readme_stands_outside_of_what_the_files_give() -> None:
    text = alternatives.MARKS.sub("", README.read_text(encoding="utf-8"))
    text = re.sub(r"```.*?```|\]\([^)]*\)|arXiv \d+\.\d+", "", text, flags=re.DOTALL)
    assert _FIGURE.findall(text.replace("Python 3.11", "").replace("Apache-2.0", "")) == []


def of(model: str, budget: float, value: str) -> dict[str, float]:
    return {
        row["method"]: row[value] for row in RESTRUCTURE if row["model"].endswith(model) and row["budget"] == budget
    }


@pytest.mark.parametrize("model", ["vgg_small", "resnet20"])
@pytest.mark.parametrize("budget", [0.5, 0.25, 0.1])
def test_a_line_of_the_readme_has_the_better_variant_of_each_importance_and_the_best_is_bold(
    model: str, budget: float
) -> None:
    expected = []
    for value in ("accuracy_before", "accuracy"):
        found = of(model, budget, value)
        best = [found["nss"]]
        best += [max(found[f"tp-{name}-{scope}"] for scope in ("local", "global")) for name in ("magnitude", "taylor")]
        expected += [(f"{100 * each:.2f}", each == max(best)) for each in best]
    text = README.read_text(encoding="utf-8")
    lines = re.search(rf"^\| {model} .*\n(?:\| \|.*\n)*", text, re.MULTILINE)[0].splitlines()
    (line,) = [line for line in lines if f" {100 * budget:.0f} % " in line]
    cells = [cell.strip() for cell in line.split("|")[3:-1]]
    assert [(cell.strip("*").split(" ± ")[0], cell.startswith("**")) for cell in cells] == expected


def test_whatever_torch_pruning_is_ahead_in_is_said_and_nothing_else() -> None:
    words = {"accuracy_before": "untrained", "accuracy": "tuned"}
    words |= {"worst_class": "worst class", "speedup": "times faster"}
    small = {"params": "per cent of the weights left", "bytes": "kilobytes"}
    ahead = set()
    for model in ("vgg_small", "resnet20"):
        for budget in (0.5, 0.25, 0.1):
            for value, word in words.items():
                found = of(model, budget, value)
                if max(each for method, each in found.items() if method.startswith("tp-")) > found["nss"]:
                    ahead.add((model, f"{100 * budget:.0f} %", word))
            for value, word in small.items():
                found = of(model, budget, value)
                if min(each for method, each in found.items() if method.startswith("tp-")) < found["nss"]:
                    ahead.add((model, f"{100 * budget:.0f} %", word))
    assert ahead, "an empty list proves nothing"
    text = README.read_text(encoding="utf-8").partition("Where torch-pruning is ahead:")[2].partition("<!--")[0]
    said = re.findall(r"^- (\w+) at ([^:]*), ([a-z ]+): ", text, re.MULTILINE)
    assert {(model, budget, word) for model, budgets, word in said for budget in budgets.split(", ")} == ahead


def test_what_the_choice_of_neurons_gives_alone_stands_beside_all_of_nss_and_the_best_peer() -> None:
    _, *lines = cells(alternatives.smaller_parts(find("restructure")))
    found = [of(model, budget, "accuracy") for model in ("vgg_small", "resnet20") for budget in (0.5, 0.25, 0.1)]
    best = [max(each for method, each in accuracy.items() if method.startswith("tp-")) for accuracy in found]
    wanted = [[each["nss"], each["nss-8"], each["nss-cut"], peer] for each, peer in zip(found, best, strict=True)]
    said = [[cell.strip("*").split(" ± ")[0] for cell in line[2:6]] for line in lines]
    assert said == [[f"{100 * each:.2f}" for each in line] for line in wanted]


def row(method: str, accuracy: float | None, seeds: int = 3) -> dict[str, Any]:
    return {"method": method, "seeds": seeds, "accuracy": accuracy, "accuracy_sd": 0.001}


def test_whoever_is_best_is_bold_and_so_is_all_that_is_written_alike() -> None:
    rows = [row("nss", 0.91), row("peer", 0.93), row("other", 0.930001), row("missing", None)]
    assert best_in_bold(rows, "accuracy") == ["91.00 ± 0.10", "**93.00 ± 0.10**", "**93.00 ± 0.10**", "-"]
    assert best_in_bold(rows, "accuracy", smallest=True)[:2] == ["**91.00 ± 0.10**", "93.00 ± 0.10"]
    assert best_in_bold(rows[:1], "accuracy") == ["91.00 ± 0.10"]


def test_one_seed_has_no_spread() -> None:
    assert percent(row("nss", 0.9123, seeds=1), "accuracy") == "91.23"


def write(path: Path, command: str, seeds: int, **protocol: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": command, "protocol": protocol, "summary": [row("nss", 0.9, seeds)]}))


def test_whole_results_come_before_quick_ones_and_quick_ones_say_so(tmp_path: Path) -> None:
    assert find("rq3", tmp_path) is None
    write(tmp_path / "quick" / "rq3.json", "python -m bench rq3 --quick --json x", 1, quick="no choice of rates")
    quick = find("rq3", tmp_path)
    assert "**A quick run of one seed, a subset**" in quick.caption(tmp_path / "page.md")
    assert "(quick/rq3.json)" in quick.caption(tmp_path / "page.md")
    assert quick.caption(tmp_path / "page.md").endswith("`. It leaves out or takes less: no choice of rates.")
    write(tmp_path / "rq3.json", "python -m bench rq3 --json x", 3)
    whole = find("rq3", tmp_path)
    assert whole.caption(tmp_path / "docs" / "page.md").startswith("Three seeds, mean ± standard deviation; ")
    assert "(../rq3.json)" in whole.caption(tmp_path / "docs" / "page.md")
    assert "leaves out" not in whole.caption(tmp_path / "docs" / "page.md")


def test_what_was_not_measured_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alternatives, "find", lambda name: find(name, tmp_path))
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- measured: learned -->\nold\n<!-- measured: end -->\nb\n")
    command = "`python -m bench rq4 --summary --json docs/results/rq4.json`"
    text = f"a\n<!-- measured: learned -->\nNot among the results yet: {command}.\n<!-- measured: end -->\nb\n"
    assert alternatives.filled(page) == text


def cells(text: str) -> list[list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return rows[:1] + rows[2:]


def followed() -> Source:
    """Two networks, the main case and another, as rq3 sums them up; nss loses one point of new, wins four of old."""
    rows = [each for situation in (MAIN, ("repair", "drop 0.1")) for each in of_case(situation, {})]
    return Source(Path("rq3.json"), "python -m bench rq3", rq3.summarised(rows))


def of_case(case: tuple[str, str], fresh: dict[str, float]) -> list[dict[str, Any]]:
    """The chosen points of two networks. fresh: accuracy on fresh attacks, of an attack; the attack itself is read."""
    figures = {"nss": (0.79, 0.9), "full": (0.8, 0.86), "last": (0.7, 0.8)}
    figures |= {"batchnorm": (0.5, 0.7), "deeparc": (0.78, 0.8)}
    costs = {"batchnorm": {"trained_share": 0.0015, "reached": 0.0}}
    costs["full"] = {"seconds_to_target": 4.0, "trained_share": 1.0}
    return [
        {
            **{"data": "d", "model": f"nss.zoo:{model}", "seed": 0, "situation": case[0], "setting": case[1]},
            **{"method": method, "new_accuracy": 0.99 if fresh else new, "old_accuracy": old},
            **{"original_new": 0.3, "original_old": 0.93, "new_val": new, "old_val": old},
            **{"trained_share": 0.2, "steps": 10, "reached": 1.0, "steps_to_target": 8},
            **({"fresh_accuracy": fresh[method]} if fresh else {}),
            **costs.get(method, {}),
        }
        for model in ("a", "b")
        for method, (new, old) in figures.items()
    ]


def attacked() -> Source:
    """The main case and an attack that all methods read; on fresh attacks nss is two points behind full retraining."""
    fresh = {"nss": 0.6, "full": 0.62, "last": 0.2, "batchnorm": 0.5, "deeparc": 0.4}
    rows = [*of_case(MAIN, {}), *of_case(("attack", "fgsm"), fresh)]
    return Source(Path("rq3.json"), "python -m bench rq3", rq3.summarised(rows))


def test_following_is_shown_for_every_method_with_what_was_before_and_the_mean_of_all_cases() -> None:
    text = alternatives_training.followed(followed())
    header, before, *methods = cells(text)
    assert header == ["method", "a: new", "old", "b: new", "old"]
    assert before == ["before", "30.00", "93.00", "30.00", "93.00"]
    assert methods[0] == ["nss", "79.00", "**90.00**", "79.00", "**90.00**"]
    assert methods[1] == ["full retraining", "**80.00**", "86.00", "**80.00**", "86.00"]
    assert [each[0] for each in methods[2:]] == ["last layers", "BatchNorm only", "DeepArc"]
    assert "mean of 2 cases: a -1.0 on new and +4.0 on old images against full retraining, +1.0 on new" in text
    assert text.endswith("DeepArc."), "no attacks, nothing to say of them"


def test_every_case_of_following_has_a_line_and_the_main_case_its_cost() -> None:
    _, *lines = cells(alternatives_training.followed_cases(followed()))
    assert [line[1] for line in lines[:3]] == [": ".join(MAIN), "repair: drop 0.1", "mean of all"]
    assert lines[0][:4] == ["a", ": ".join(MAIN), "79.0 / **90.0**", "**80.0** / 86.0"]
    _, *costs = cells(alternatives_training.followed_costs(followed()))
    assert costs[0] == ["a", "nss", "20 %", "10", "8", "not timed"]
    assert costs[1] == ["", "full retraining", "100 %", "10", "8", "4.0 s (1.00)"]
    assert costs[3] == ["", "BatchNorm only", "0.15 %", "10", "not reached", "not reached"]
    assert len(costs) == 10


def test_a_target_that_some_seeds_reach_is_said_with_how_many() -> None:
    main = followed().where(situation=MAIN[0], model="nss.zoo:a")
    partly = {"steps_to_target_sd": None, "steps_to_target_seeds": 2, "trained_share_sd": 0.0, "steps_sd": 0.0}
    rows = [{**each, "seeds": 3, "reached": 2 / 3, **partly} for each in main]
    _, first, *_ = cells(alternatives_training.followed_costs(Source(Path("rq3.json"), "", rows)))
    assert first[4] == "8 (2 of 3 seeds)"


def test_what_is_won_by_reading_an_attack_is_neither_bold_nor_in_the_mean() -> None:
    header, *lines = cells(alternatives_training.followed_cases(attacked()))
    assert header[1] == "new / old / fresh attacks"
    assert lines[1][1:4] == ["attack: fgsm", "99.0 / **90.0** / 60.0", "99.0 / 86.0 / **62.0**"]
    assert lines[2][1:4] == ["mean of all, new without attacks", "79.0 / **90.0** / 60.0", "**80.0** / 86.0 / **62.0**"]
    text = alternatives_training.followed(attacked())
    assert (
        "mean of 2 cases: a -1.0 on new, +4.0 on old images and -2.0 on fresh attacks against full retraining" in text
    )
    assert text.endswith(alternatives_training.ABOUT_ATTACKS)


def learned() -> Source:
    half = {"data": "d", "model": "nss.zoo:a", "seed": 0, "setting": " + ".join(map(str, HALVES))}
    figures = {"nss": 0.86, "nss, replay 5 %": 0.88, NAIVE: 0.48, "replay 10 %": 0.87, JOINT: 0.95}
    halves = [
        {
            **{**half, "method": method, "chosen": True, "accuracy": accuracy, "told_old": 0.9, "told_new": 0.95},
            **{"old_accuracy": accuracy, "new_accuracy": accuracy, "before": 0.93, "val": accuracy},
            **{"steps": 5, "seconds": 10.0, "trained_share": 0.3},
        }
        for method, accuracy in figures.items()
    ]
    end = {"chosen": True, "told": 0.9, "accuracy": 0.5, "told_forgetting": 0.0, "forgetting": 0.25}
    chain = [{**half, "method": method, **end} for method in ("nss", NAIVE)]
    return Source(Path("rq4.json"), "python -m bench rq4", rq4.summarised(halves, chain, []))


def test_new_classes_are_shown_for_every_method_with_the_old_images_that_it_trains_on() -> None:
    header, *lines = cells(alternatives_training.learned(learned()))
    assert header == ["method", "old images trained on", "d, a"]
    assert lines == [
        ["nss", "none", "86.00"],
        ["nss, replay 5 %", "5%", "88.00"],
        ["retraining", "none", "48.00"],
        ["replay 10 %", "10%", "87.00"],
        ["joint training", "100%", "**95.00**"],
    ]
    assert set(REPLAY) < set(alternatives_training.LEARNING)
    tasks = cells(alternatives_training.learned_tasks(learned()))
    assert tasks[1][1:] == ["nss", "**90.00**", "**95.00**", "86.00", "86.00", "86.00"]
    chain = cells(alternatives_training.learned_chain(learned()))
    assert chain[2] == ["", "retraining", "**90.00**", "**50.00**", "0.00", "25.00"]


def test_every_picture_shows_what_the_files_say() -> None:
    drawn = {path.name: Image.open(path).text.get(pictures.DIGEST) for path in pictures.FOLDER.glob("*.png")}
    wanted = {name: pictures.digest(content) for name, (content, _) in pictures.drawings().items()}
    assert drawn == wanted, "run python -m bench.alternatives"


def test_a_picture_of_other_figures_has_another_digest() -> None:
    source = find("restructure")
    changed = [dict(each) for each in source.rows]
    changed[0]["accuracy"] += 0.001
    contents = [pictures.restructure_curves(Source(source.path, "", rows)) for rows in (source.rows, changed)]
    assert contents[0]["resnet20"] == contents[1]["resnet20"]
    assert len({pictures.digest(each) for each in contents}) == 2


def test_the_picture_of_the_stages_has_every_stage_right_of_what_it_reads() -> None:
    arrows = pictures.shown(pictures.stages())
    assert sorted(arrows) == sorted(
        [
            *(("data", "base"), ("champion.json", "base"), ("base", "profile"), ("base", "triage")),
            ("profile", "slice"),
            *((reader, verb) for reader in ("slice", "triage") for verb in ("restructure", "readapt", "extend")),
            *((verb, "evaluate") for verb in ("restructure", "readapt", "extend")),
            ("evaluate", "gate"),
        ]
    )
    at = pictures.places(arrows)
    assert all(at[start][0] < at[end][0] for start, end in arrows)
    assert len(set(at.values())) == len(at)


# What the second table of README.md says. A network whose channels come in pairs of twins is half of itself.


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> nss.Dataset:
    folder = tmp_path_factory.mktemp("digits") / "data"
    demo(folder)
    return nss.load_data(folder)


@pytest.fixture(scope="module")
def twins(digits: nss.Dataset) -> nss.Classifier:
    model = nss.build_model("nss.zoo:lenet", digits.classes, digits.image_shape, seed=0)
    with torch.no_grad():
        for layer in [each for each in model.network.children() if isinstance(each, nn.Conv2d | nn.Linear)][:-1]:
            for weights in (layer.weight, layer.bias):
                weights[1::2] = weights[::2]
    return model


def halved(network: nn.Module, image: torch.Tensor, ratio: float = 0.5) -> nn.Module:
    """The network cut by torch-pruning, its last layer spared."""
    smaller = copy.deepcopy(network)
    head = [each for each in smaller.modules() if isinstance(each, nn.Linear)][-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importance = tp.importance.MagnitudeImportance()
        tp.pruner.MetaPruner(smaller, image, importance, pruning_ratio=ratio, ignored_layers=[head]).step()
    return smaller


def test_both_take_channels_away_and_torch_keeps_them_as_zeros(twins: nss.Classifier, digits: nss.Dataset) -> None:
    image = torch.zeros(1, *digits.image_shape)
    masked = copy.deepcopy(twins.network)
    prune.ln_structured(masked.conv1, "weight", 0.5, n=2, dim=0)
    assert masked(image).shape == (1, 10)
    assert masked.conv1.weight.shape[0] == 16
    assert int((masked.conv1.weight.abs().sum((1, 2, 3)) == 0).sum()) == 8
    assert halved(twins.network, image).conv1.weight.shape[0] == 8
    kept = {site: torch.arange(16) % 2 == 0 for site in ("conv1",)}
    assert nss.remove(twins, kept).network.conv1.weight.shape[0] == 8


def test_only_nss_merges_what_leaves_into_what_stays(twins: nss.Classifier, digits: nss.Dataset) -> None:
    profile = nss.profile(twins, digits.split("train"), samples_per_class=20)
    slices = nss.semantic_slices(nss.critical_neurons(profile), profile, n_slices=2)
    merged = nss.restructure(twins, slices, digits, profile, params=0.5).model
    pixels = twins.normalise(digits.split("test").images).detach()
    cut, masked = halved(twins.network, pixels[:1]), copy.deepcopy(twins.network)
    for layer in (masked.conv1, masked.conv2, masked.fc1, masked.fc2):
        prune.ln_structured(layer, "weight", 0.5, n=2, dim=0)
    assert max(map(nss.count_parameters, (merged.network, cut))) <= 0.5 * nss.count_parameters(twins)
    with torch.no_grad():
        before = twins.network(pixels)
        errors = [float((each(pixels) - before).std() / before.std()) for each in (merged.network, cut, masked)]
    assert errors[0] < 0.02
    assert min(errors[1:]) > 0.3


def test_only_nss_loads_a_smaller_network_as_data(twins: nss.Classifier, digits: nss.Dataset, tmp_path: Path) -> None:
    image = torch.zeros(1, *digits.image_shape)
    cut = halved(twins.network, image)
    with pytest.raises(RuntimeError, match="size mismatch"):
        twins.network.load_state_dict(cut.state_dict())
    for content in (cut, tp.state_dict(cut)):
        torch.save(content, tmp_path / "cut.pt")
        with pytest.raises(Exception, match="Weights only load failed"):
            torch.load(tmp_path / "cut.pt", weights_only=True)
    smaller = nss.remove(twins, {"conv1": torch.arange(16) % 2 == 0})
    nss.save_model(smaller, tmp_path / "smaller")
    assert {path.suffix for path in (tmp_path / "smaller").iterdir()} == {".safetensors", ".json"}
    assert torch.equal(nss.load_model(tmp_path / "smaller")(image), smaller(image))


def halved_by_nss(model: nss.Classifier) -> nss.Classifier:
    shape = model.spec.input_shape
    kept = {site.name: torch.arange(len(site.ids)) % 2 == 0 for site in find_sites(model.network, shape)}
    return nss.remove(model, kept)


def test_both_cut_channels_that_a_residual_addition_couples() -> None:
    model = nss.build_model("nss.zoo:resnet20", ["a", "b"], (1, 8, 8), seed=0).eval()
    image = torch.zeros(1, 1, 8, 8)
    for smaller in (halved_by_nss(model).network, halved(model.network, image)):
        assert nss.count_parameters(smaller) < 0.5 * nss.count_parameters(model)
        assert smaller.eval()(image).shape == (1, 2)


def test_a_channel_shuffle_fails_in_torch_pruning_only() -> None:
    model = nss.build_model("torchvision.models:shufflenet_v2_x0_5", ["a", "b"], (3, 32, 32), seed=0).eval()
    image = torch.zeros(1, 3, 32, 32)
    with pytest.raises(ZeroDivisionError):
        halved(model.network, image)
    smaller = halved_by_nss(model)
    assert nss.count_parameters(smaller) < nss.count_parameters(model)
    assert smaller(image).shape == (1, 2)
