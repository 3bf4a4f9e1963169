"""Scores counted by hand."""
import numpy as np
import pytest

from conftest import fresh

IGNORE = 255


@pytest.fixture
def stage(monkeypatch):
    module = fresh("05_eval")
    module.CLASSES, module.SCORED = ["a", "b", "c"], ("a", "b", "c")
    return module


TRUTH = np.array([[0, 0, 1], [0, 1, 1], [IGNORE, IGNORE, 0]])
GUESS = np.array([[0, 1, 1], [0, 1, 2], [2, 0, 0]])


def test_the_confusion_matrix_counts_labelled_pixels_only(stage):
    assert stage.confusion(TRUTH, GUESS, 3).tolist() == [[3, 1, 0], [0, 2, 1], [0, 0, 0]]


def test_native_counts_a_class_that_is_only_predicted_as_zero(stage):
    matrix = stage.confusion(TRUTH, GUESS, 3)
    assert np.allclose(stage.iou(matrix), [3 / 4, 2 / 4, 0])                       # a: 3 of 3 + 1; b: 2 of 2 + 1 + 1; c: 0 of 1
    assert abs(stage.mean_iou(matrix)[0] - 100 * (3 / 4 + 2 / 4) / 3) < 1e-9


def test_clouds_leaves_such_a_class_out(stage):
    stage.PROTOCOL = "clouds"
    mean, each = stage.mean_iou(stage.confusion(TRUTH, GUESS, 3))
    assert each == {"a": 75., "b": 50., "c": None} and abs(mean - 62.5) < 1e-9


def test_a_class_in_neither_is_left_out_by_both(stage):
    matrix = stage.confusion(TRUTH % 254 % 2, np.zeros((3, 3), int), 3)
    assert np.isnan(stage.iou(matrix)[2]) and np.isnan(stage.iou(matrix, absent_counts=False)[2])


def test_sixteen_classes_are_the_mean_of_their_own_ious(stage):
    stage.SCORED = ("a", "c")
    mean, each = stage.mean_iou(stage.confusion(TRUTH, GUESS, 3))                  # what was taken for b still counts as an error of a
    assert list(each) == ["a", "c"] and abs(mean - 37.5) < 1e-9


def test_the_matrix_of_two_images_is_their_sum_not_a_mean_of_means(stage):
    a, b = stage.confusion(np.zeros(9, int), np.zeros(9, int), 3), stage.confusion(np.ones(1, int), np.zeros(1, int), 3)
    assert np.allclose(stage.iou(a + b)[:2], [9 / 10, 0])
