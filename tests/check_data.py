"""
check_data: look through data sets before hours are spent on them.

    PRESET=gta python tests/check_data.py gta cityscapes folder:PATH
    out     RUN/check/NAME_SPLIT.png    six images and their labels, to look at
    time    gta: minutes on a slow disk, because the sizes of all files are read

Compares the number of pairs with the official one and the size of every image with its label's,
counts the classes in a hundred labels. Of a data set with two splits it checks those that are
there. Checks every set that is named, then lists what is wrong and ends with status 1.
"""
import sys
from glob import glob
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
from common import CLASSES, DATA, IGNORE, LAYOUTS, RUN, Stop

READ = 100                              # labels whose classes are counted
SHOWN = 6                               # pictures in the sheet
WIDTH = 384                             # of one of them, in pixels


def splits_of(name):
    """The splits of a data set that are on the disk; ["val"] if none is. Without splits: train."""
    pattern = LAYOUTS[name][1] if name in LAYOUTS else ""
    if "{split}" not in pattern:
        return ["train"]
    found = []
    for split in ("train", "val"):
        if glob(pattern.split("**")[0].format(split=split), root_dir=DATA):
            found.append(split)
    return found or ["val"]


def size_of(path):
    """(width, height) of a picture as it is stored; reads only its head. Raises Stop."""
    with common.explain(f"{path} cannot be read as a picture", "take it and its pair away"):
        return Image.open(path).size


def wrong_sizes(name, pairs):
    """-> [what is wrong with a pair]"""
    wrong = []
    for image, label in tqdm(pairs, "sizes", disable=None, dynamic_ncols=True):
        if size_of(image) != size_of(label):        # unless EXIF turns the image
            try:
                common.read_pair(image, label, name)
            except Stop as problem:
                wrong.append(str(problem))
    return wrong


def shares(name, pairs):
    """Share of pixels of every train id, float (256,), the mean over some pairs. Raises Stop."""
    total = np.zeros(256)
    for image, label in tqdm(pairs, "labels", disable=None, dynamic_ncols=True):
        ids = common.read_pair(image, label, name)[1]
        total += np.bincount(ids.ravel(), minlength=256) / ids.size
    return total / len(pairs)


def save_sheet(path, name, pairs):
    """image | label, two pairs per row, all of them reduced to one width"""
    tiles = []
    for image_path, label_path in pairs:
        image, label = common.read_pair(image_path, label_path, name)
        label = Image.fromarray(label)
        size = WIDTH, round(WIDTH * image.height / image.width)
        tiles.append([(image_path.name, np.asarray(image.resize(size))),
                      (label_path.name, np.asarray(label.resize(size, Image.NEAREST)))])
    rows = [first + second for first, second in zip(tiles[::2], tiles[1::2])]
    path.parent.mkdir(parents=True, exist_ok=True)
    common.save_sheet(path, rows or tiles)


def spread(pairs, n):
    """n of the pairs, evenly spread"""
    return [pairs[i] for i in np.unique(np.linspace(0, len(pairs) - 1, n).astype(int))]


def check(name, split):
    """Print what a split of a data set holds, save a sheet -> what is wrong. Raises Stop."""
    pairs, title = common.pairs(name, split), f"{name}, {split}"
    numbers = LAYOUTS.get(name, common.FOLDER)[3]
    official = numbers[split == "val"] if numbers else len(pairs)
    wrong = wrong_sizes(name, pairs)
    if wrong:
        return [f"{title}: {len(wrong)} pairs are wrong: {wrong[0]}"]
    share = shares(name, spread(pairs, READ))
    parts = [f"{k} {100 * share[i]:.1f} %" for i, k in enumerate(CLASSES)]
    never = [k for i, k in enumerate(CLASSES) if share[i] == 0]
    sheet = Path(RUN, "check", f"{quote(name, safe=':')}_{split}.png")
    save_sheet(sheet, name, spread(pairs, SHOWN))
    print(f"  {', '.join(parts)}, no label {100 * share[IGNORE]:.1f} %")
    print(f"  not seen: {', '.join(never) or 'none'}\n  look at {sheet}")
    if len(pairs) != official:
        return [f"{title}: {len(pairs)} pairs, officially {official}: an archive is missing, or "
                "was not unpacked whole"]
    return []


def main(names):
    if not names or names[0].startswith("-"):
        sys.exit(__doc__)
    wrong = []
    for name in names:
        for split in splits_of(name):
            try:
                wrong += check(name, split)
            except Stop as problem:
                wrong.append(f"{name}, {split}: {problem}")
    if wrong:
        sys.exit("\n".join(wrong))
    print("nothing is wrong")


if __name__ == "__main__":
    main(sys.argv[1:])
