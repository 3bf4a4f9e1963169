"""Reading: id maps, layouts as downloaded, augmentation that keeps image and label together."""
import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import IGNORE


@pytest.fixture
def nineteen(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "CLASSES", list(common.CITYSCAPES_CLASSES))
    monkeypatch.setattr(common, "DATA", str(tmp_path))

    def put(path, array, mode=None):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.asarray(array, np.uint8))
        if mode == "P":
            image.putpalette(list(range(256)) * 3)
        image.save(tmp_path / path)
    return put


@pytest.mark.parametrize("name, image, label", [
    ("gta", "gta/images/00001.png", "gta/labels/00001.png"), ("cityscapes", "cityscapes/leftImg8bit/val/bonn/bonn_0_leftImg8bit.png", "cityscapes/gtFine/val/bonn/bonn_0_gtFine_labelIds.png"),
    ("acdc_fog", "acdc/rgb_anon/fog/val/GOPR1/a_rgb_anon.png", "acdc/gt/fog/val/GOPR1/a_gt_labelTrainIds.png"), ("acdc_fog", "acdc/rgb_anon/fog/val/a_rgb_anon.png", "acdc/gt/fog/val/a_gt_labelTrainIds.png"),
    ("acdc", "acdc/rgb_anon/rain/val/GP1/a_rgb_anon.png", "acdc/gt/rain/val/GP1/a_gt_labelTrainIds.png"),
    ("bdd", "bdd100k/images/10k/val/a.jpg", "bdd100k/labels/sem_seg/masks/val/a.png"), ("bdd", "bdd100k/seg/images/val/a.jpg", "bdd100k/seg/labels/val/a_train_id.png"),
    ("mapillary", "mapillary/validation/images/a.jpg", "mapillary/validation/labels/a.png"), ("mapillary", "mapillary/validation/images/a.jpg", "mapillary/validation/v1.2/labels/a.png"),
    ("mapillary_v2", "mapillary/validation/images/a.jpg", "mapillary/validation/v2.0/labels/a.png")])
def test_each_layout_is_read_as_downloaded(nineteen, name, image, label):
    nineteen(image, np.zeros((2, 3, 3)))
    ids = {"gta": [[7, 26, 34], [0, 33, 24]], "cityscapes": [[7, 26, 29], [0, 33, 24]], "mapillary": [[13, 55, 0], [23, 52, 19]], "mapillary_v2": [[21, 108, 0], [45, 105, 30]]}
    nineteen(label, ids.get(name, [[0, 13, 255], [255, 18, 11]]), "P" if name in ("gta", "mapillary", "mapillary_v2") else None)
    (found_image, found_label), = common.pairs(name, "val")
    assert str(found_image).endswith(image) and common.read_label(found_label, name, (3, 2)).tolist() == [[0, 13, IGNORE], [IGNORE, 18, 11]]


def test_reference_images_of_acdc_are_not_targets(nineteen):
    for folder in ("val", "val_ref"):
        nineteen(f"acdc/rgb_anon/fog/{folder}/GOPR1/a_{'rgb_ref' if 'ref' in folder else 'rgb'}_anon.png", np.zeros((2, 3, 3)))
    nineteen("acdc/gt/fog/val/GOPR1/a_gt_labelTrainIds.png", np.zeros((2, 3)))
    assert len(common.pairs("acdc_fog", "val")) == 1


def test_an_image_without_its_label_is_named_with_the_place_where_it_was_expected(nineteen):
    for name in "ab":
        nineteen(f"bdd100k/images/10k/val/{name}.jpg", np.zeros((2, 3, 3)))
    nineteen("bdd100k/labels/sem_seg/masks/val/a.png", np.zeros((2, 3)))
    with pytest.raises(common.Stop, match=r"1 of 2 images of bdd have no label, the first is .*val/b.jpg\n  expected it at .*masks/val/b.png"):
        common.pairs("bdd", "val")


def test_a_folder_above_that_is_named_like_a_part_of_the_layout_does_no_harm(nineteen, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "DATA", str(tmp_path / "images/RGB"))
    nineteen("images/RGB/synthia/RGB/0.png", np.zeros((1, 3, 3)))
    nineteen("images/RGB/synthia/GT/LABELS/0.png", np.zeros((1, 3, 3)))
    assert common.pairs("synthia", "train")[0][1] == tmp_path / "images/RGB/synthia/GT/LABELS/0.png"


def test_checking_a_data_set_tells_what_is_wrong_with_it(nineteen, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(common, "RUN", str(tmp_path / "run"))
    monkeypatch.setattr(common, "COLOURS", np.array([c for c, _ in common.CITYSCAPES_CLASSES.values()], np.uint8))
    for i in range(4):
        nineteen(f"acdc/rgb_anon/fog/val/G/{i}_rgb_anon.png", np.zeros((8, 12, 3)))
        nineteen(f"acdc/gt/fog/val/G/{i}_gt_labelTrainIds.png", np.where(np.arange(12) < 3, 10, 255)[None].repeat(8, 0))
    with pytest.raises(common.Stop, match="acdc_fog val has 4 pairs, officially 100"):
        common.check("acdc_fog")
    said = capsys.readouterr().out
    assert "sky 25.0 %" in said and "no label 75.0 %" in said and "not seen in them: road, " in said
    assert Image.open(tmp_path / "run/check/acdc_fog_val.png").width == 4 * 384
    nineteen("acdc/gt/fog/val/G/2_gt_labelTrainIds.png", np.zeros((8, 11)))
    with pytest.raises(common.Stop, match="2_gt_labelTrainIds.png is 11 x 8, .* is 12 x 8"):
        common.check("acdc_fog")


def test_synthia_labels_are_sixteen_bit_and_the_class_is_the_first_channel(nineteen, tmp_path):
    from torchvision.io import write_png
    nineteen("synthia/RGB/0000000.png", np.zeros((1, 3, 3)))
    (tmp_path / "synthia/GT/LABELS").mkdir(parents=True)
    import struct, zlib
    pixels = [(3, 700, 0), (8, 1, 0), (22, 0, 0)]                                  # road, car, lane marking (not a class)
    raw = b"\0" + b"".join(struct.pack(">HHH", *p) for p in pixels)
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    (tmp_path / "synthia/GT/LABELS/0000000.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 3, 1, 16, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b""))
    (_, label), = common.pairs("synthia", "train")
    assert common.read_label(label, "synthia", (3, 1)).tolist() == [[0, 13, IGNORE]]


def test_the_gta_pairs_of_unequal_size_are_left_out(nineteen):
    for number in (15187, 15188, 20801, 20860, 20861):
        for kind in ("images", "labels"):
            nineteen(f"gta/{kind}/{number:05d}.png", np.zeros((2, 3)))
    assert [image.stem for image, _ in common.pairs("gta", "train")] == ["15187", "20861"] and len(common.GTA_MISMATCHED) == 62


def test_the_id_maps_name_nineteen_classes():
    assert sorted(common.CITYSCAPES_IDS.values()) == list(range(19)) and sorted(set(common.MAPILLARY_IDS.values())) == list(range(19)) and sorted(common.SYNTHIA_IDS.values()) == list(range(19))
    assert sorted(set(common.MAPILLARY_V2_IDS.values())) == list(range(19)) and len(common.MAPILLARY_IDS) == 25


def test_crops_keep_image_and_label_together():
    random = np.random.default_rng(0)
    label = random.integers(0, 12, (4, 8)).astype(np.uint8).repeat(16, 0).repeat(16, 1)
    image = Image.fromarray(np.stack([label * 20] * 3, -1))
    plain, common.colour_jitter = common.colour_jitter, lambda x, _: x
    try:
        for seed in range(20):
            x, y = common.scale_and_crop(image, label, np.random.default_rng(seed), (48, 64), (.5, 2.), (7, 8, 9))
            inside = y != IGNORE
            assert x.shape == (3, 48, 64) and y.shape == (48, 64)
            assert ((x[0].float() - y * 20).abs()[inside] < 10).float().mean() > .7          # equal but for the blended borders of blocks
            assert (x[:, ~inside] == torch.tensor((7, 8, 9))[:, None]).all()
    finally:
        common.colour_jitter = plain


def test_crop_offsets_of_rows_and_columns_are_drawn_apart():
    y, x = np.indices((64, 64))
    image = Image.fromarray(np.stack((y, x, x), -1).astype(np.uint8))
    plain, common.colour_jitter = common.colour_jitter, lambda i, _: i
    try:
        corners = [common.scale_and_crop(image, np.zeros((64, 64), np.uint8), np.random.default_rng(s), (16, 16), (1., 1.), (0, 0, 0))[0][:2, 0, 0].tolist() for s in range(40)]
    finally:
        common.colour_jitter = plain
    assert abs(np.corrcoef(np.array(corners).T)[0, 1]) < .6                        # the official code shares one number: correlation 1


def test_a_batch_depends_on_its_address_only(folder):
    images = {str(i): np.random.default_rng(i).integers(0, 255, (40, 50, 3)) for i in range(5)}
    found = common.pairs(folder(images, {k: np.zeros((40, 50)) for k in images}), "train")
    batch = lambda step: common.source_batch(found, "folder:x", step, 3, 0, (32, 32), (.5, 2.), (0, 0, 0))[0]
    direct = batch(4)
    assert torch.equal(direct, list(common.ahead(batch, range(6), 2))[4]) and not torch.equal(direct, batch(5))


def test_an_epoch_shows_everything_once():
    seen = [common.shuffled(7, 3, i) for i in range(21)]
    assert sorted(seen[:7]) == sorted(seen[7:14]) == list(range(7)) and seen[:7] != seen[7:14]


def test_rare_classes_come_often_and_the_labels_are_counted_once(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "CLASSES", ["a", "b", "c"])
    labels = {str(i): np.zeros((4, 4)) for i in range(10)}
    labels["7"][0, 0] = 1                                                          # one pixel of b in one image, c nowhere
    name = folder({k: np.zeros((4, 4, 3)) for k in labels}, labels)
    found = common.pairs(name, "train")
    pick = common.sampler(found, name, 0, .5, tmp_path / "classes.npy")
    share = np.mean([pick(i) == 7 for i in range(2000)])
    a, b = np.exp((1 - 159 / 160) / .5), np.exp((1 - 1 / 160) / .5)
    assert abs(share - (b + a / 10) / (a + b)) < .03                               # b always means image 7, a means it once in ten
    again = common.sampler(found, name, 0, .5, tmp_path / "classes.npy")
    assert [again(i) for i in range(20)] == [pick(i) for i in range(20)] and capsys.readouterr().out.count("counting") == 1
    with pytest.raises(common.Stop, match="counts 10 labels, there are 9: remove it"):
        common.sampler(found[1:], name, 0, .5, tmp_path / "classes.npy")
    plain = common.sampler(found, name, 0, 0, tmp_path / "none.npy")
    assert sorted(plain(i) for i in range(10)) == list(range(10)) and not (tmp_path / "none.npy").exists()


def test_grey_palette_and_turned_pictures_become_upright_rgb(tmp_path):
    for mode in ("L", "P", "RGBA", "I;16"):
        Image.new(mode, (4, 2)).save(tmp_path / "a.png")
        assert common.read_image(tmp_path / "a.png").mode == "RGB"
    turned = Image.new("RGB", (4, 2))
    exif = turned.getexif()
    exif[274] = 6
    turned.save(tmp_path / "b.jpg", exif=exif)
    assert common.read_image(tmp_path / "b.jpg").size == (2, 4)
