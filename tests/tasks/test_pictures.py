from __future__ import annotations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tasks import pictures

TREE = np.array([[0, 2, 0.2, 2], [1, 3, 0.4, 2], [4, 5, 0.8, 4]])
CLASSES = ["cat", "car", "dog", "bus"]
SLICES = {"slice-0": ("cat", "dog"), "slice-1": ("car", "bus")}


def texts(axis) -> list[str]:
    return [label.get_text() for label in axis]


def shown(axis) -> list:
    """Labels of the ticks that are drawn: matplotlib keeps some beyond the limits."""
    low, high = sorted(axis.get_view_interval())
    return [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]


def many(count: int) -> tuple[np.ndarray, list[str], dict[str, list[str]]]:
    """A chain of merges, names, and slices of five."""
    rows = [[0 if row == 0 else count + row - 1, row + 1, 0.1 + row / count, row + 2] for row in range(count - 1)]
    names = [f"category number {number}" for number in range(count)]
    return np.array(rows, dtype=float), names, {f"s{at}": names[at : at + 5] for at in range(0, count, 5)}


def renders(figure: Figure) -> None:
    """No label lies outside of the picture, and it is not blank."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    width, height = canvas.get_width_height()
    for axes in figure.axes:
        for label in [*shown(axes.xaxis), *shown(axes.yaxis), axes.title]:
            box = label.get_window_extent(renderer)
            assert box.x0 >= -1, label
            assert box.y0 >= -1, label
            assert box.x1 <= width + 1, label
            assert box.y1 <= height + 1, label
    # One number a colour: rows take numpy ten times as long to sort.
    colours = np.asarray(canvas.buffer_rgba())[..., :3].astype(np.uint32) @ np.array([65536, 256, 1], np.uint32)
    assert len(np.unique(colours)) > 2


def test_the_dendrogram_puts_merged_categories_side_by_side_in_one_colour() -> None:
    figure = pictures.dendrogram(TREE, CLASSES, SLICES)
    (axes,) = figure.axes
    assert texts(axes.get_yticklabels()) == ["cat", "dog", "car", "bus"]
    colours = [label.get_color() for label in axes.get_yticklabels()]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    assert [line.get_xdata().max() for line in axes.get_lines()] == [0.2, 0.4, 0.8]
    assert [line.get_color() for line in axes.get_lines()][:2] == [colours[0], colours[2]]
    assert axes.get_lines()[2].get_color() not in colours
    renders(figure)


def test_the_overlap_is_one_minus_the_distance_in_the_order_of_the_tree_with_slices_framed() -> None:
    distances = np.array([[0, 0.8, 0.2, 0.9], [0.8, 0, 0.7, 0.4], [0.2, 0.7, 0, 0.6], [0.9, 0.4, 0.6, 0]])
    figure = pictures.overlap(distances, TREE, CLASSES, SLICES)
    axes = figure.axes[0]
    assert texts(axes.get_xticklabels()) == texts(axes.get_yticklabels()) == ["cat", "dog", "car", "bus"]
    shown = axes.images[0].get_array()
    assert shown[0, 1] == pytest.approx(0.8)
    assert shown[0, 3] == pytest.approx(0.1)
    assert "0.80" in texts(axes.texts)
    assert [(frame.get_x(), frame.get_width()) for frame in axes.patches] == [(-0.5, 2), (1.5, 2)]
    renders(figure)


def test_kept_neurons_stand_before_all_there_are() -> None:
    figure = pictures.kept_neurons({"a": {"c1": 3, "c2": 5}, "b": {"c1": 2, "c2": 8}}, {"c1": 4, "c2": 8})
    (axes,) = figure.axes
    assert [[bar.get_height() for bar in group] for group in axes.containers] == [[4, 8], [3, 5], [2, 8]]
    assert texts(axes.get_legend().get_texts()) == ["all neurons", "a", "b"]
    assert texts(axes.get_xticklabels()) == ["c1", "c2"]
    renders(figure)


def test_many_slices_are_drawn_as_mean_and_range() -> None:
    kept = {f"slice-{number}": {"c1": number} for number in range(20)}
    figure = pictures.kept_neurons(kept, {"c1": 32})
    (axes,) = figure.axes
    assert "mean and range of 20 slices" in texts(axes.get_legend().get_texts())
    assert 9.5 in [bar.get_height() for bar in axes.patches]
    renders(figure)


def test_the_training_curve_shows_loss_and_both_accuracies() -> None:
    rows = [{"epoch": n, "loss": 1 / n, "train_accuracy": 0.5, "val_accuracy": 0.25 * n} for n in (1, 2, 3)]
    figure = pictures.training_curve(rows)
    left, right = figure.axes
    assert list(left.get_lines()[0].get_ydata()) == [1, 1 / 2, 1 / 3]
    assert texts(right.get_legend().get_texts()) == ["train accuracy", "val accuracy"]
    assert right.get_title(loc="left") == "accuracy, at last 75.0% on validation"
    renders(figure)


def test_confusion_shows_shares_of_rows_and_survives_a_class_without_images() -> None:
    figure = pictures.confusion(np.array([[3, 1, 0], [0, 2, 0], [0, 0, 0]]), ["a", "b", "c"])
    axes = figure.axes[0]
    assert axes.images[0].get_array().tolist() == [[0.75, 0.25, 0], [0, 1, 0], [0, 0, 0]]
    assert texts(axes.texts)[:2] == ["75%", "25%"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "actual")
    renders(figure)


def test_the_worst_class_is_on_top_and_alone_in_its_colour() -> None:
    figure = pictures.class_accuracy({"a": 0.9, "b": 0.5, "c": 0.7}, 0.7)
    (axes,) = figure.axes
    assert texts(axes.get_yticklabels()) == ["b", "c", "a"]
    colours = [bar.get_facecolor() for bar in axes.patches]
    assert colours[0] != colours[1] == colours[2]
    assert axes.get_title(loc="left") == "worst class b 50.0%, overall 70.0%"
    renders(figure)


@pytest.mark.parametrize("count", [2, 10, 100])
def test_pictures_of_few_and_many_categories_lose_no_label(count: int) -> None:
    tree, names, slices = many(count)
    figures = [
        pictures.dendrogram(tree, names, slices),
        pictures.overlap(np.full((count, count), 0.5), tree, names, slices),
        pictures.confusion(np.eye(count), names),
        pictures.class_accuracy(dict.fromkeys(names, 0.5), 0.5),
    ]
    for figure in figures:
        assert set(texts(figure.axes[0].get_yticklabels())) == set(names)
        renders(figure)


def test_a_single_category_has_a_tree_without_branches() -> None:
    figure = pictures.dendrogram(np.zeros((0, 4)), ["only"], {"slice-0": ["only"]})
    assert texts(figure.axes[0].get_yticklabels()) == ["only"]
    assert not figure.axes[0].get_lines()


def test_the_size_curve_marks_the_chosen_model() -> None:
    figure = pictures.size_curve([(0.25, 0.9), (0.5, 0.96), (1.0, 0.97)], 0.5)
    (axes,) = figure.axes
    curve, mark = axes.get_lines()
    assert list(curve.get_xydata().ravel()) == [0.25, 0.9, 0.5, 0.96, 1.0, 0.97]
    assert list(mark.get_xydata().ravel()) == [0.5, 0.96]
    assert axes.get_title(loc="left") == "96.0% at 50% of the multiply-adds"
    renders(figure)


def test_neurons_that_were_tuned_are_called_so() -> None:
    (axes,) = pictures.kept_neurons({"tuned": {"c1": 3}}, {"c1": 4}, "tuned").axes
    assert axes.get_title(loc="left") == "neurons tuned by layer"


def test_following_shows_new_and_old_accuracy_and_the_epoch_that_was_kept() -> None:
    figure = pictures.following_curve([(0, 0.2, 0.9), (1, 0.6, 0.7), (2, 0.8, 0.85)], 2)
    (axes,) = figure.axes
    new, old, kept = axes.get_lines()
    assert new.get_xydata().tolist() == [[0, 0.2], [1, 0.6], [2, 0.8]]
    assert old.get_xydata().tolist() == [[0, 0.9], [1, 0.7], [2, 0.85]]
    assert list(kept.get_xdata()) == [2, 2]
    assert texts(axes.get_legend().get_texts()) == ["new", "old", "kept"]
    assert axes.get_title(loc="left") == "accuracy while following new images, epoch 2 kept"
    renders(figure)


@pytest.mark.parametrize(("row", "drawn"), [((None, 0.9), ["old"]), ((0.5, None), ["new"]), ((None, None), [])])
def test_following_without_held_out_images_leaves_their_line_out(row: tuple, drawn: list[str]) -> None:
    figure = pictures.following_curve([(0, *row), (1, *row)], 1)
    assert texts(figure.axes[0].get_legend().get_texts()) == [*drawn, "kept"]
    renders(figure)


def test_learning_shows_the_loss_and_the_accuracy_on_new_classes() -> None:
    figure = pictures.learning_curve([(1, 0.8, 0.5), (2, 0.25, 0.75)])
    loss, accuracy = figure.axes
    assert loss.get_lines()[0].get_xydata().tolist() == [[1, 0.8], [2, 0.25]]
    assert accuracy.get_lines()[0].get_xydata().tolist() == [[1, 0.5], [2, 0.75]]
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["loss", "accuracy on new classes, told the task"]
    renders(figure)


def test_learning_without_held_out_images_shows_the_loss_alone() -> None:
    figure = pictures.learning_curve([(1, 0.8, None), (2, 0.25, None)])
    assert np.isnan(figure.axes[1].get_lines()[0].get_ydata()).all()
    renders(figure)


def test_capacity_stacks_new_on_old_before_all_there_are() -> None:
    figure = pictures.capacity({"c1": (8, 4, 2), "c2": (32, 24, 12)})
    (axes,) = figure.axes
    bars = [[(bar.get_y(), bar.get_height()) for bar in group] for group in axes.containers]
    assert bars == [[(0, 8), (0, 32)], [(0, 4), (0, 24)], [(4, 2), (24, 12)]]
    assert texts(axes.get_xticklabels()) == ["c1", "c2"]
    assert axes.get_title(loc="left") == "neurons used by layer, 5% free"
    renders(figure)


def test_the_change_of_classes_has_the_worst_loss_on_top_and_losses_in_red() -> None:
    figure = pictures.class_change({"cat": (0.9, 0.95), "car": (0.8, 0.7), "dog": (0.5, 0.5)})
    (axes,) = figure.axes
    assert texts(axes.get_yticklabels()) == ["car", "dog", "cat"]
    assert axes.get_ylim() == (2.5, -0.5)
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([-10, 0, 5])
    red, grey, _ = (bar.get_facecolor() for bar in axes.patches)
    assert red != grey
    assert axes.get_title(loc="left") == "worst change: car -10.0 points"
    renders(figure)


def test_differences_have_a_dot_and_an_interval_for_each_candidate_and_losses_are_red() -> None:
    rows = [("extend, known images", -0.01, -0.03, 0.01), ("readapt, new images", 0.3, 0.25, 0.5)]
    figure = pictures.differences(rows)
    (axes,) = figure.axes
    assert texts(axes.get_yticklabels()) == ["extend, known images", "readapt, new images"]
    spans = [
        line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2 and line.get_color() != pictures._DARK
    ]
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [list(span) for span in spans] == [pytest.approx([-3, 1]), pytest.approx([25, 50])]
    assert [float(dot.get_xdata()[0]) for dot in dots] == pytest.approx([-1, 30])
    assert [dot.get_color() for dot in dots] == [pictures._BAD, "#1f6fb4"]
    assert axes.get_ylim() == (1.5, -0.5), "the first candidate is on top"
    renders(figure)
