"""The miniature world: the same picture for the same seed, splits that do not meet, captions that
name what is there."""
import numpy as np
import world
from PIL import Image

import common
from conftest import ROOT, fresh


def test_a_seed_decides_everything():
    first, again, other = world.draw(5, "rain"), world.draw(5, "rain"), world.draw(6, "rain")
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])


def test_the_style_changes_the_picture_but_not_the_street():
    day, snow = world.draw(9, "day"), world.draw(9, "snow")
    assert np.mean(day[1] == snow[1]) > .9
    assert np.abs(day[0].astype(int) - snow[0]).mean() > 20


def test_no_scene_is_in_two_splits():
    everything = [seed for split in world.SPLITS for style in world.STYLES
                  for seed in world.seeds(split, style)]
    assert len(everything) == len(set(everything))


def test_shapes_ids_and_every_class_of_the_toy_preset_somewhere():
    seen = set()
    for style in world.STYLES:
        for seed in range(4):
            image, *labels, _ = world.draw(seed, style)
            assert image.shape == (128, 256, 3) and image.dtype == np.uint8
            assert all(x.shape == (128, 256) and x.dtype == np.uint8 for x in labels)
            seen |= set(np.unique(labels[0]).tolist())
    assert seen == set(range(12)) and world.CLASSES == common.CLASSES


def test_many_scenes_are_drawn_by_other_processes_in_their_order():
    jobs = [(seed, "fog") for seed in range(17)]
    images, labels, _, captions = world.draw_many(jobs)
    for i in (0, 16):
        image, label, _, caption = world.draw(*jobs[i])
        assert np.array_equal(images[i], image) and np.array_equal(labels[i], label)
        assert captions[i] == caption


def test_a_caption_names_what_is_there_and_parses_as_a_prompt():
    stage = fresh("01_prompts")
    table = stage.word_table(stage.WORDS)
    for seed in range(30):
        _, label, _, caption = world.draw(seed, "night")
        if "a street in" not in caption:        # else nothing in it is large enough to be named
            [(prompt, named)] = stage.parse(caption, table)
            assert prompt == caption
            assert all((label == world.CLASSES.index(name)).sum() >= 60 for name in named)


def test_a_folder_is_a_data_set_of_the_stages_and_stays_as_it_is(tmp_path):
    world.write_folder(tmp_path / "fog", "test", "fog", 2)
    found, seeds = common.pairs(f"folder:{tmp_path}/fog", "val"), world.seeds("test", "fog", 2)
    assert [image.stem for image, _ in found] == [f"fog_{seed}" for seed in seeds]
    (image, label), drawn = found[1], world.draw(seeds[1], "fog")
    assert np.array_equal(Image.open(image), drawn[0])
    assert np.array_equal(Image.open(label), drawn[1])
    before = image.stat().st_mtime_ns
    world.write_folder(tmp_path / "fog", "test", "fog", 2)
    assert image.stat().st_mtime_ns == before and [p.name for p in tmp_path.iterdir()] == ["fog"]


def test_the_shipped_picture_of_the_world_is_of_this_code(tmp_path):
    world.contact_sheet(tmp_path / "sheet.png")
    shipped = np.asarray(Image.open(ROOT / "tests/toy/pictures/world.png").convert("RGB"), int)
    ours = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"), int)
    # the shipped one has a palette of 256 colours, which costs 2.7 of 255; another world, 40
    assert shipped.shape == ours.shape and np.abs(shipped - ours).mean() < 5
