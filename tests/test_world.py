"""The miniature world: the same picture for the same seed, splits that do not meet, captions that tell the truth."""
import numpy as np

import common
import world
from conftest import fresh


def test_the_world_and_the_toy_preset_have_the_same_classes():
    assert world.CLASSES == list(common.TOY_CLASSES)


def test_a_seed_decides_everything():
    a, b, c = world.draw(5, "rain"), world.draw(5, "rain"), world.draw(6, "rain")
    assert all(np.array_equal(x, y) for x, y in zip(a[:3], b[:3])) and a[3] == b[3] and not np.array_equal(a[0], c[0])


def test_the_style_changes_the_picture_but_not_the_street():
    labels = [world.draw(9, style)[1] for style in ("day", "night", "snow", "fog", "rain")]
    assert np.mean(labels[0] == labels[2]) > .9


def test_no_scene_is_in_two_splits():
    everything = [seed for split in world.SPLITS for style in world.STYLES for seed in world.seeds(split, style)]
    assert len(everything) == len(set(everything))


def test_shapes_ids_and_every_class_somewhere():
    seen = set()
    for style in world.STYLES:
        for seed in range(4):
            image, label, instance, caption = world.draw(seed, style)
            assert image.shape == (128, 256, 3) and label.shape == instance.shape == (128, 256) and label.max() < 12
            seen |= set(np.unique(label).tolist())
    assert seen == set(range(12))


def test_a_caption_names_what_is_there_and_parses_as_a_prompt():
    stage = fresh("01_prompts")
    table = stage.word_table(common.SYNONYMS)
    for seed in range(30):
        _, label, _, caption = world.draw(seed, "night")
        prompt, named = stage.parse(caption, table)
        if "a street in" not in caption:
            assert prompt == caption and all((label == world.CLASSES.index(name)).sum() >= 60 for name in named)
