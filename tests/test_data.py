"""Reading: layouts as downloaded, id tables, pictures and labels of every kind, crops that keep
image and label together."""
import os
import re
import struct
from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import common
from common import IGNORE
from conftest import ROOT, module_of, script
from standins import CITYSCAPES, FORMS, GREY, MAPILLARY, MAPILLARY_2, SYNTHIA, png16, reordered
from test_real import DAY, REAL, needs

source_stage = import_module("03_train_source")

TRAIN_IDS = {train_id: train_id for train_id in range(19)}
STREET = {"gta": 21, "synthia": 19, "cityscapes": 21, "mapillary": 30}    # ids above 18


@pytest.fixture
def paper(monkeypatch, tmp_path):
    """common as the paper's presets have it, with 19 classes; DATA is a temporary folder."""
    monkeypatch.setenv("PRESET", "gta")
    monkeypatch.setenv("DATA", str(tmp_path))
    return module_of(ROOT / "common.py")


@pytest.fixture
def put(tmp_path):
    """put(path, array or PIL image) writes a picture below the temporary folder -> its path"""
    def write(path, picture, **options):
        if not isinstance(picture, Image.Image):
            picture = Image.fromarray(np.asarray(picture, np.uint8))
        path = tmp_path / path
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, **options)
        return path
    return write


# ---------------------------------------------------------------------------- layouts
@pytest.mark.parametrize("name, image, label", [
    ("gta", "gta/images/00001.png", "gta/labels/00001.png"),
    ("synthia", "synthia/RGB/0000000.png", "synthia/GT/LABELS/0000000.png"),
    ("urbansyn", "urbansyn/rgb/rgb_0001.png", "urbansyn/ss/ss_0001.png"),
    ("cityscapes", "cityscapes/leftImg8bit/val/bonn/bonn_0_leftImg8bit.png",
     "cityscapes/gtFine/val/bonn/bonn_0_gtFine_labelIds.png"),
    ("bdd", "bdd100k/images/10k/val/a.jpg", "bdd100k/labels/sem_seg/masks/val/a.png"),
    ("mapillary", "mapillary/validation/images/a.jpg", "mapillary/validation/labels/a.png"),
    ("acdc", "acdc/rgb_anon/rain/val/GP1/a_rgb_anon.png",
     "acdc/gt/rain/val/GP1/a_gt_labelTrainIds.png"),
    ("acdc_fog", "acdc/rgb_anon/fog/val/GP1/a_rgb_anon.png",
     "acdc/gt/fog/val/GP1/a_gt_labelTrainIds.png"),
    ("acdc_night", "acdc/rgb_anon/night/val/a_rgb_anon.png",    # the official code's flat folders
     "acdc/gt/night/val/a_gt_labelTrainIds.png")])
def test_each_layout_is_read_as_downloaded(paper, put, tmp_path, name, image, label):
    put(image, np.zeros((2, 3, 3)))
    put(label, np.array([[STREET.get(name, 8)] * 3]))
    assert paper.pairs(name, "val") == [(tmp_path / image, tmp_path / label)]
    if "{split}" in paper.LAYOUTS[name][1]:
        with pytest.raises(paper.Stop, match="no images at"):
            paper.pairs(name, "train")


def test_acdcs_pictures_of_clear_weather_are_not_targets(paper, put):
    for name in ("rgb_anon/fog/val/G/a_rgb_anon", "rgb_anon/fog/val_ref/G/a_rgb_ref_anon",
                 "gt/fog/val/G/a_gt_labelTrainIds"):
        put(f"acdc/{name}.png", np.zeros((2, 3)))
    assert len(paper.pairs("acdc_fog", "val")) == len(paper.pairs("acdc", "val")) == 1


def test_the_gta_pairs_of_unequal_size_are_left_out(paper, put):
    for number in (15187, 15188, 17705, 20801, 20860, 20861):
        for kind in ("images", "labels"):
            put(f"gta/{kind}/{number:05d}.png", np.full((2, 3), 21))
    assert [image.stem for image, _ in paper.pairs("gta", "train")] == ["15187", "20861"]
    assert 24_966 - len(paper.GTA_LEFT_OUT) == paper.LAYOUTS["gta"][3][0] == 24_904


def test_folders_above_that_are_named_like_parts_of_a_layout_do_no_harm(paper, put, tmp_path):
    paper.DATA = str(tmp_path / "images/RGB")
    put("images/RGB/synthia/RGB/0.png", np.zeros((1, 3, 3)))
    label = put("images/RGB/synthia/GT/LABELS/0.png", np.full((1, 3), 19))
    assert paper.pairs("synthia", "train")[0][1] == label


def test_one_listing_for_all_pictures_and_it_says_what_it_passed_over(put, tmp_path, capsys):
    kinds = "a.png", "b.JPG", "c.jpeg", "d.webp", "e.bmp", "f.tif", "sub/g.TIFF"
    for name in kinds:
        put(f"own/{name}", np.zeros((2, 3, 3)), format="PNG")
    other = put("elsewhere/h.png", np.zeros((2, 3, 3))).parent
    (tmp_path / "own/link").symlink_to(other)
    (tmp_path / "own/sub/loop").symlink_to(tmp_path / "own")
    for name in ("._a.png", ".DS_Store", "i.heic"):
        (tmp_path / "own" / name).write_bytes(b"")
    os.mkfifo(tmp_path / "own/pipe.png")
    found = common.pictures(tmp_path / "own")
    assert found == [tmp_path / "own" / name for name in (*kinds[:6], "link/h.png", kinds[6])]
    assert "own: 8 pictures; passed over: 1 .heic, 1 .png, 2 hidden\n" in capsys.readouterr().out
    assert common.pictures(tmp_path / "nowhere") == []


def test_pictures_of_a_folder_and_below_it_have_labels_of_their_names(paper, put, tmp_path):
    for name in ("images/GP1/a.webp", "labels/GP1/a.png", "images/b.bmp", "labels/b.png",
                 "images/._b.png", "labels/._b.png"):
        put(f"own/{name}", np.full((2, 3), 4), format="PNG")
    found = paper.pairs(f"folder:{tmp_path}/own", "train")
    assert [image.name for image, _ in found] == ["a.webp", "b.bmp"]
    assert found[0][1] == tmp_path / "own/labels/GP1/a.png"
    put("own/images/b.png", np.zeros((2, 3)))
    with pytest.raises(paper.Stop, match=r"images/b\..* and .*images/b\..* have one label"):
        paper.pairs(f"folder:{tmp_path}/own", "train")


def test_a_toy_world_that_cannot_be_drawn_is_one_message(monkeypatch, put, tmp_path):
    monkeypatch.setattr(common, "DATA", str(put("data.png", np.zeros((2, 2)))))      # a file
    with pytest.raises(common.Stop, match="(?s)toy cannot be written.*DATA=PATH"):
        common.pairs(f"folder:{common.DATA}/toy/day", "val")


def test_the_first_process_draws_the_toy_world_and_the_others_wait(monkeypatch, put, tmp_path):
    monkeypatch.setattr(common, "DATA", str(tmp_path))
    monkeypatch.setattr(common, "RANK", 1)
    labels = [np.full((4, 4), 3)]
    monkeypatch.setattr(common.time, "sleep", lambda seconds: put_set(put, "toy/day", labels))
    assert len(common.pairs(f"folder:{tmp_path}/toy/day", "val")) == 1


@pytest.mark.parametrize("column", [1, 4])
def test_a_set_with_ids_of_its_own_is_a_row_of_layouts(paper, put, column):
    paper.TABLE = {"wall": [(1, 2, 3), *[(5,)] * 4], "floor": [(4, 5, 6), *[(9,)] * 4]}
    paper.LAYOUTS["own"] = column, "own/images/**", {"/images/": "/labels/"}, None
    put("own/images/a.png", np.zeros((1, 2, 3)))
    (_, label), = [put("own/labels/a.png", np.array([[5, 9]])) and paper.pairs("own", "train")[0]]
    assert paper.read_label(label, "own").tolist() == [[0, 1]]


# ---------------------------------------------------------------------------- ids
@pytest.mark.parametrize("name, ids, last", [
    ("gta", CITYSCAPES, 34), ("cityscapes", CITYSCAPES, 34), ("synthia", SYNTHIA, 22),
    ("mapillary", MAPILLARY, 65), ("bdd", TRAIN_IDS, 18), ("acdc", TRAIN_IDS, 18),
    ("acdc_snow", TRAIN_IDS, 18), ("folder:x", TRAIN_IDS, 18), ("urbansyn", TRAIN_IDS, 19)])
@pytest.mark.parametrize("form", ["grey", "palette"])
def test_every_id_becomes_its_train_id_and_others_are_named(paper, put, name, ids, last, form):
    array = np.array([[*range(last + 1), IGNORE]], np.uint8)
    label = paper.read_label(put("a.png", FORMS[form](array, None)), name, (last + 2, 1))
    assert label.dtype == np.uint8
    assert label[0].tolist() == [ids.get(k, IGNORE) for k in range(last + 1)] + [IGNORE]
    with pytest.raises(paper.Stop, match=rf"expected ids 0 to {last} .* not ids \[{last + 1}\]"):
        paper.read_label(put("a.png", FORMS[form](array[:, :-1] + 1, None)), name, (last + 1, 1))


def test_every_id_of_synthia_is_red_of_sixteen_bits(paper, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 2 ** 16, (3, 23, 3)).astype(np.uint16)
    pixels[..., 0] = np.arange(23)              # green holds the number of the object
    label = paper.read_label(png16(tmp_path / "a.png", pixels), "synthia", (23, 3))
    assert label.tolist() == 3 * [[SYNTHIA.get(k, IGNORE) for k in range(23)]]


def test_names_colours_and_ids_are_those_of_cityscapesscripts(paper):
    labels = pytest.importorskip("cityscapesscripts.helpers.labels").labels
    ours = [(name, row[0], *row[1]) for name, row in paper.TABLE.items()]
    theirs = {row.trainId: (row.name, row.color, row.id) for row in labels if not row.ignoreInEval}
    assert ours == [theirs[train_id] for train_id in range(19)]


def test_the_toy_preset_names_twelve_classes_with_the_same_colours(paper):
    full = {"sign": "traffic sign"}
    assert len(common.CLASSES) == 12
    for name, row in common.TABLE.items():
        assert row == paper.TABLE[full.get(name, name)]


@pytest.mark.parametrize("preset", ["toy", "gta"])
def test_readmes_classes_of_ones_own_take_the_place_of_the_nineteen(tmp_path, monkeypatch, preset):
    snippet = re.search(r"```python\n(TABLE = .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    text = (ROOT / "common.py").read_text()
    (tmp_path / "common.py").write_text(
        text.replace("\nCLASSES = list(TABLE)", f"\n{snippet[1]}\nCLASSES = list(TABLE)"))
    monkeypatch.setenv("PRESET", preset)
    own = module_of(tmp_path / "common.py")
    assert own.CLASSES == ["wall", "floor", "chair"]
    assert own.COLOURS[[0, 1, 2, IGNORE]].tolist() == [
        [120, 120, 120], [80, 50, 50], [204, 70, 3], [0, 0, 0]]


# ---------------------------------------------------------------------------- labels
def colours_of(paper, name):
    """uint8 (256, 3): the colour of every id, as cityscapesScripts has them"""
    colours = paper.COLOURS[paper.numbering(name)[0]]
    colours[[5, 6, 9, 10]] = (111, 74, 0), (81, 0, 81), (250, 170, 160), (230, 150, 140)
    return paper.COLOURS if name.startswith("folder") else colours


@needs(REAL / "cityscapes", DAY)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["cityscapes", "folder:x"])
def test_real_labels_in_other_forms_are_the_same_labels(paper, put, name, form):
    path = sorted((REAL / "cityscapes/gtFine").rglob("*labelIds.png"))[0]
    path = path if name == "cityscapes" else sorted((DAY / "labels").iterdir())[0]
    ids = np.asarray(Image.open(path))
    right = paper.numbering(name)[0][ids]
    other = FORMS[form](ids, colours_of(paper, name))
    other = put("a.png", other, format="TIFF" if other.mode == "I" else "PNG")
    assert len(np.unique(right)) > 8
    assert np.array_equal(paper.read_label(other, name, ids.shape[::-1]), right)


def test_the_numbers_of_gta5s_palette_are_ids_though_plates_have_the_colour_of_cars(paper, put):
    colours = colours_of(paper, "gta")
    colours[34] = colours[26]
    picture = Image.fromarray(np.array([[7, 26, 34, 4]], np.uint8), "P")
    picture.putpalette(colours.ravel().tolist())
    assert paper.read_label(put("a.png", picture), "gta", (4, 1)).tolist() == [[0, 13, 255, 255]]


def test_grey_that_is_no_id_is_a_classs_colour(paper, put):
    path = put("a.png", GREY[[70, 153, 0]][None])
    assert paper.read_label(path, "bdd").tolist() == [[2, 5, IGNORE]]


def test_black_and_white_are_colours_where_classes_have_them(put, monkeypatch):
    table = {"wall": [(0, 0, 0), (0,)], "floor": [(255, 255, 255), (1,)]}
    monkeypatch.setattr(common, "TABLE", table)
    path = put("a.png", np.array([[[0] * 3, [255] * 3]]))
    assert common.read_label(path, "folder:x").tolist() == [[0, 1]]
    path = put("a.png", np.array([[[0] * 3, [1] * 3]]))                 # and ids elsewhere
    assert common.read_label(path, "folder:x").tolist() == [[0, 1]]


def test_few_bits_per_pixel_hold_ids(tmp_path):
    for bits in (1, 2, 4):
        ids = np.arange(24).reshape(3, 8) % min(2 ** bits, 12)
        path = png16(tmp_path / "a.png", ids, bits, 0)
        assert common.read_label(path, "folder:x", (8, 3)).tolist() == ids.tolist()


@pytest.mark.parametrize("label, format, answer", [
    (Image.fromarray(np.array([[1.5, 0, 1]], np.float32)), "TIFF", "expected integer ids"),
    (Image.fromarray(np.array([[-1, 0, 1]], np.int32)), "TIFF", r"ids \[-1\]"),
    (Image.fromarray(np.array([[12, 0, 1]], np.uint8)), "PNG", r"ids \[12\]"),
    (Image.fromarray(np.array([[300, 0, 1]], np.uint16)), "PNG", r"ids \[300\]"),
    (Image.new("L", (4, 1)), "PNG", r"its image, \(3, 1\), not \(4, 1\)"),
    (Image.new("L", (1, 3)), "PNG", "size of its image"),
    (Image.new("RGB", (3, 1), (1, 2, 3)), "PNG", r"colours of no class .*\(1, 2, 3\)"),
    (reordered(np.array([[0, 2, 4]], np.uint8), np.array(5 * [(128, 64, 128), (0, 0, 142),
     (255, 0, 0), (1, 2, 3)])[[0, 0, 1, 0, 3, *range(15)]].astype(np.uint8)), "PNG", "of no class"),
    (Image.new("L", (3, 1)), "JPEG", "in a PNG, not JPEG")],
    ids=["float", "negative", "no class", "16 bit", "wider", "turned", "colour", "colours", "JPEG"])
def test_a_wrong_label_is_refused_and_named(put, label, format, answer):
    path = put("a.png", label, format=format)
    with pytest.raises(common.Stop, match=answer) as stopped:
        common.read_label(path, "folder:x", (3, 1))
    first, *more = str(stopped.value).splitlines()
    assert first.startswith(f"{path} cannot be read as a label") and len(more) < 2


def test_broken_and_huge_pictures_and_pipes_are_named(put, tmp_path, monkeypatch):
    assert 2 * Image.MAX_IMAGE_PIXELS == 300_000_000        # PIL's limit is twice as many
    good = put("a.png", np.random.default_rng(0).integers(0, 255, (64, 64, 3))).read_bytes()
    path = tmp_path / "a.png"
    for content, limit in ((b"", 4096), (b"not a picture", 4096), (good[:-2000], 4096),
                           (good, 2000), (None, 4096)):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        path.unlink()
        path.write_bytes(content) if content is not None else os.mkfifo(path)
        with pytest.raises(common.Stop, match="a.png cannot be read as a picture"):
            common.read_image(path)
        with pytest.raises(common.Stop, match="a.png cannot be read as a label"):
            common.read_label(path, "folder:x", (64, 64))


# ---------------------------------------------------------------------------- sets
def put_set(put, folder, labels):
    """Write labels and black pictures of their size as PATH of a `folder:` data set."""
    for i, label in enumerate(labels):
        put(f"{folder}/labels/{i}.png", label)
        put(f"{folder}/images/{i}.png", np.zeros((*label.shape, 3)))


@needs(REAL / "cityscapes", DAY)
@pytest.mark.parametrize("resize", [Image.NEAREST, Image.BILINEAR, Image.BICUBIC])
@pytest.mark.parametrize("factor", [.4, .7, 1.6])
@pytest.mark.parametrize("name", ["gta", "own"])
def test_real_labels_resized_with_blending_are_named(paper, put, tmp_path, name, resize, factor):
    files = (DAY / "labels").iterdir() if name == "own" else REAL.rglob("*labelIds.png")
    for i, file in enumerate(sorted(files)[:3]):
        label = Image.open(file).point([*range(255), 0])    # 255 would give a blend away by itself
        size = int(label.width * factor), int(label.height * factor)
        put(f"{name}/labels/{i}.png", label.resize(size, resize))
        put(f"{name}/images/{i}.png", Image.new("RGB", size))
    name = name if name == "gta" else f"folder:{tmp_path}/own"
    if resize == Image.NEAREST:
        assert len(paper.pairs(name, "train")) == 3
        return
    with pytest.raises(paper.Stop, match="blending|not ids"):
        paper.pairs(name, "train")


@needs(REAL / "cityscapes")
def test_a_set_of_another_systems_ids_is_named(paper, put, tmp_path):
    ids = np.asarray(Image.open(sorted(REAL.rglob("*labelIds.png"))[0]))[::4, ::4]
    train_ids = paper.numbering("gta")[0][ids]
    version_2 = np.array([*MAPILLARY_2, 123])[train_ids.clip(0, 19)]
    put_set(put, "own", [ids])
    put_set(put, "gta", [train_ids])
    put_set(put, "mapillary/training", [train_ids])
    put_set(put, "mapillary/validation", [version_2])
    for name, split, answer in (
            (f"folder:{tmp_path}/own", "train", r"expected ids 0 to 18 .* not ids \[20 21 22"),
            ("gta", "train", "gta: no label has an id above 18"),
            ("mapillary", "train", "mapillary: no label has an id above 18"),
            ("mapillary", "val", r"expected ids 0 to 65 .* not ids \[.*123\][^$]*take v1.2")):
        with pytest.raises(paper.Stop, match=answer):
            paper.pairs(name, split)


def test_a_set_of_one_class_is_warned_of(put, tmp_path, capsys):
    put_set(put, "one", [np.array([[3, 3, IGNORE]])])
    assert len(common.pairs(f"folder:{tmp_path}/one", "train")) == 1
    assert "one: fence is the only class" in capsys.readouterr().out


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("drawn_on, width", [("stored", 6), ("upright", 6), ("stored", 4)])
def test_exif_turns_a_picture_only_where_just_that_fits(put, capsys, orientation, drawn_on, width):
    common.SAID.clear()
    pixels = np.random.default_rng(0).integers(0, 256, (4, width, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = put("images/a.png", pixels, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(image)))
    assert np.array_equal(common.read_image(image), upright)
    pixels = upright if drawn_on == "upright" and orientation > 4 else pixels
    label = put("labels/a.png", pixels[..., 0] % 12)
    for _ in range(2):
        picture, read = common.read_pair(image, label, "folder:x")
        assert np.array_equal(picture, pixels) and np.array_equal(read, pixels[..., 0] % 12)
    both_fit = orientation in (2, 3, 4) or orientation > 4 and width == 4
    assert capsys.readouterr().out.count("images/a.png") == both_fit        # said once


@pytest.mark.parametrize("odd", [(0x011A, 2, 4, b"abc\0"), (0x0100, 11, 1, bytes(4))])
def test_an_odd_exif_tag_does_no_harm(put, odd):
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHI4s", *odd)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    image = put("a.jpg", np.zeros((4, 6, 3)), exif=exif)
    assert common.read_image(image).size == (4, 6)
    assert common.read_pair(image, put("b.png", np.zeros((6, 4))), "folder:x")[0].size == (4, 6)


# ---------------------------------------------------------------------------- images
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK"])
def test_pictures_of_every_mode_become_rgb(put, mode):
    format = "TIFF" if mode in ("CMYK", "PA") else "PNG"
    path = put("a.png", Image.new("RGB", (4, 2), "white").convert(mode), format=format)
    image = common.read_image(path)
    assert image.mode == "RGB" and image.size == (4, 2) and np.asarray(image).min() == 255


@pytest.mark.parametrize("kind, numbers", [
    (np.uint16, [0, 256, 32768, 65535]), (np.uint16, [0, 16, 2048, 4095]),      # 16, 12 bits
    (np.int32, [0, 1, 128, 255]), (np.float32, [0, .004, .5, 1]), (np.float32, [0, 1, 128, 255])])
def test_other_depths_and_ranges_become_eight_bits(put, kind, numbers):
    path = put("a.png", Image.fromarray(np.array([numbers], kind)), format="TIFF")
    assert np.asarray(common.read_image(path))[0].tolist() == [[k] * 3 for k in (0, 1, 128, 255)]


def test_deep_colours_become_eight_bits_and_bad_numbers_are_named(put, tmp_path, capsys):
    pixels = np.array([[[0, 16, 2048], [4095, 4080, 32]]])                  # 12 bits
    for factor in (1, 16):
        image = common.read_image(png16(tmp_path / "a.png", factor * pixels))
        assert np.asarray(image).tolist() == [[[0, 1, 128], [255, 254, 2]]]
    for bad in (np.nan, -1, 1e6):
        path = put("a.png", Image.fromarray(np.array([[bad, 1]], np.float32)), format="TIFF")
        with pytest.raises(common.Stop, match="its values go from"):
            common.read_image(path)
    common.read_image(put("b.png", Image.new("LA", (2, 2))))
    assert f"black, first {tmp_path}/b.png" in capsys.readouterr().out


# ---------------------------------------------------------------------------- crops
@pytest.fixture
def plain(monkeypatch):
    """Crops without colour jitter."""
    monkeypatch.setattr(source_stage, "colour_jitter", lambda image, random: image)


def blocks(seed, shape=(64, 128), size=16):
    """A label of square blocks of random classes."""
    small = np.random.default_rng(seed).integers(0, 12, (shape[0] // size, shape[1] // size))
    return small.repeat(size, 0).repeat(size, 1).astype(np.uint8)


def crop(seed, label, size=(48, 64), scale=(.5, 2.), fill=(7, 8, 9)):
    """Of a picture whose colour is its label: 20 grey levels per class."""
    image, random = Image.fromarray(np.stack([label * 20] * 3, -1)), np.random.default_rng(seed)
    return source_stage.scale_and_crop(image, label, random, size, scale, fill)


@pytest.mark.parametrize("seed", range(20))
def test_crops_keep_image_and_label_on_one_grid(plain, seed):
    image, label = crop(seed, blocks(seed))
    assert image.shape == (3, 48, 64) and label.shape == (48, 64)
    assert image.dtype == torch.uint8 and label.dtype == torch.uint8
    inside = label != IGNORE
    differs = (image[0].float() - 20 * label).abs()[inside] >= 10
    assert differs.float().mean() < .3          # the blended borders of blocks
    # on those borders image and label change places equally often: no shift between the two
    right = image[0, :, 1:].float() - 20 * label[:, :-1]
    left = image[0, :, :-1].float() - 20 * label[:, 1:]
    both = inside[:, 1:] & inside[:, :-1] & (label[:, 1:] != label[:, :-1])
    a, b = (right[both].abs() < 10).float().mean(), (left[both].abs() < 10).float().mean()
    assert abs(a - b) < .2


def test_padding_is_the_fill_and_has_no_label(plain):
    image, label = crop(0, np.full((20, 24), 3, np.uint8), scale=(1., 1.))
    assert (label != IGNORE).sum() == 20 * 24
    assert (image[:, label == IGNORE].T == torch.tensor((7, 8, 9))).all()
    assert (image[:, label == 3] == 60).all()


def test_a_crop_at_scale_one_is_a_cut_whose_row_and_column_are_drawn_apart(plain):
    whole, corners = blocks(1, size=4), []
    cuts = np.lib.stride_tricks.sliding_window_view(whole, (32, 32))
    for seed in range(60):
        _, label = crop(seed, whole, size=(32, 32), scale=(1., 1.))
        equal = [(cuts == cut).all((2, 3)) for cut in (label.numpy(), label.numpy()[:, ::-1])]
        corner, = np.argwhere(equal[0] | equal[1])
        corners.append(corner / (32, 96))
    assert abs(np.corrcoef(np.array(corners).T)[0, 1]) < .4     # officially 1: one number for both
    assert np.ptp(corners, axis=0).min() > .83                  # from one edge to the other


# ---------------------------------------------------------------------------- streams
def test_an_epoch_shows_everything_once_in_another_order():
    seen = [source_stage.shuffled(7, (3, 1), i) for i in range(21)]
    assert sorted(seen[:7]) == sorted(seen[7:14]) == sorted(seen[14:]) == list(range(7))
    assert seen[:7] != seen[7:14]


@pytest.fixture
def crops(folder):
    """make((seed, stage), *names): crops of folders of five pictures, each of one grey level."""
    def make(key, *names):
        made = []
        for k, name in enumerate(names):
            images = {str(i): np.full((40, 50, 3), 5 * k + i) for i in range(5)}
            labels = {stem: np.full((40, 50), k) for stem in images}
            made.append(folder(images, labels, name))
        return source_stage.SourceCrops(made, key, (32, 32), (.5, 2.), (0, 0, 0))
    return make


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_an_item_depends_on_seed_stage_and_number_alone(crops):
    first, again = crops((0, 3), "a"), crops((0, 3), "a")
    later = [again[i] for i in (9, 2, 7)]
    assert same(first[7], later[2]) and same(first[2], later[1])
    assert not all(same(first[i], first[i + 1]) for i in range(10))
    for key in ((1, 3), (0, 4)):                # another seed; 04 with the seed of 03
        other = crops(key, "a")
        assert not all(same(first[i], other[i]) for i in range(10))


def test_several_sources_are_mixed_and_each_picture_comes_once_per_epoch(crops):
    labels = [crops((0, 3), "a", "b")[i][1] for i in range(20)]
    source = [label[label != IGNORE].unique().item() for label in labels]
    assert sum(source[:10]) == sum(source[10:]) == 5
    assert source[:5] != source[5:10]


def test_workers_and_a_later_start_give_the_same_batches(crops):
    dataset = crops((0, 3), "a")
    alone = list(source_stage.batches(dataset, 2, 0, 5, 0))
    assert len(alone) == 5 and alone[0][0].shape == (2, 3, 32, 32)
    for workers in (0, 2):
        later = list(source_stage.batches(dataset, 2, 3, 5, workers))
        assert all(same(a, b) for a, b in zip(alone[3:], later, strict=True))


# ---------------------------------------------------------------------------- check_data.py
def test_all_sets_are_checked_even_if_an_earlier_one_is_wrong(put, tmp_path):
    for i in range(4):
        put(f"acdc/rgb_anon/fog/val/G/{i}_rgb_anon.png", np.zeros((8, 12, 3)))
        ids = np.where(np.arange(12) < 3, 10, IGNORE)[None].repeat(8, 0)
        put(f"acdc/gt/fog/val/G/{i}_gt_labelTrainIds.png", ids)
    for name in ("bad", "good"):
        put_set(put, name, [np.ones((8, 12))])
    put("bad/labels/0.png", np.ones((8, 11)))
    sets = "gta", "acdc_fog", f"folder:{tmp_path}/bad", f"folder:{tmp_path}/good"
    done = script("tests/check_data", *sets, run=tmp_path / "run", data=tmp_path, PRESET="gta")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "no images at" in done.stderr
    assert "acdc_fog, val: 4 pairs, officially 100" in done.stderr
    assert "expected the size of its image, (12, 8), not (11, 8)" in done.stderr
    assert "sky 25.0 %" in done.stdout and "no label 75.0 %" in done.stdout
    sheets = [path.name for path in (tmp_path / "run/check").iterdir()]
    assert len(sheets) == 2 and "acdc_fog_val.png" in sheets    # none where sizes are wrong
