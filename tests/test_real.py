"""A real picture and real weights, for those who have them in the folder REAL, by default
../shared/real: camvid_day, tf_efficientnet_lite0 in the local-dir format of timm, cityscapes."""
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import common
from conftest import ROOT, fresh

REAL = Path(os.environ.get("REAL", ROOT.parent / "shared/real")).resolve()
CNN, DAY = REAL / "tf_efficientnet_lite0", REAL / "camvid_day"


def needs(*folders):
    missing = [str(folder) for folder in folders if not folder.is_dir()]
    return pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)}")


@needs(CNN, DAY)
def test_a_real_cnn_gives_timms_features_of_a_real_picture():
    import timm
    from torchvision.transforms.functional import normalize
    encoder = fresh("03_train_source").Encoder(f"timm:local-dir:{CNN}").train()
    model = timm.create_model(f"local-dir:{CNN}", pretrained=True).eval()
    image = common.read_image(sorted((DAY / "images").iterdir())[0]).resize((224, 160))
    image = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    config = model.pretrained_cfg
    x = normalize(image / 255, config["mean"], config["std"])
    with torch.no_grad():
        wanted = model.forward_intermediates(x, indices=4, intermediates_only=True)
    for _ in range(2):                  # the second time too: no statistics have moved
        for ours, theirs in zip(encoder(image), wanted, strict=True):
            assert torch.equal(ours, theirs)
    assert encoder.channels == [24, 40, 112, 320]
