"""What the tests compare with, and what stands in for models that are not here: the libraries'
models and losses behind one call each, models of no size in official formats, and rules of the
paper and of SSD written plainly. No test is in here."""
import colorsys
import copy
import json
from collections import Counter
from functools import partial
from itertools import cycle
from types import SimpleNamespace

import numpy as np
import open_clip
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from segment_anything import modeling
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, Mask2FormerConfig, SegformerConfig, SegformerModel
from transformers.models.mask2former import modeling_mask2former as library

import common
from common import IGNORE
from conftest import here
from standins import CITYSCAPES, png16
from tests.toy import sam as miniature


# ------------------------------------------------------------ encoders in their libraries' formats
def random_statistics(module):
    """BatchNorms that differ from their first state, as in any trained network."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.uniform_(-.2, .2)
            norm.running_var.uniform_(.5, 2.)
    return module


def write_clip(folder, vision):
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": {"image_size": 64, **vision}, "text_cfg": text}
    about = {"model_cfg": config, "preprocess_cfg": {"mean": [.1, .2, .4], "std": [.4, .5, .6]}}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    model = random_statistics(open_clip.CLIP(**config))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")


def write_convnext(folder, name="convnext_atto"):
    write_clip(folder, {"timm_model_name": name, "timm_model_pretrained": False, "timm_pool": "",
                        "timm_proj": "mlp", "timm_drop_path": .1})


def write_resnet(folder):
    write_clip(folder, {"layers": [1, 2, 1, 1], "width": 8, "patch_size": None})


def write_timm(folder, architecture="resnet18", **model):
    statistics = {"mean": [.1, .2, .4], "std": [.4, .5, .6], "num_classes": 5}
    about = {"architecture": architecture, "num_classes": 5, "pretrained_cfg": statistics,
             "model_args": model}
    (folder / "config.json").write_text(json.dumps(about))
    network = random_statistics(timm.create_model(architecture, num_classes=5, **model))
    save_file(network.state_dict(), folder / "model.safetensors")


def load_nothing(monkeypatch):
    """The libraries create their models as always, but with random weights."""
    clip, image_model = open_clip.create_model, timm.create_model

    def create_clip(name, pretrained, require_pretrained):
        return clip(name)

    def create_image_model(name, pretrained, **options):
        return image_model(name, pretrained=False, **options)

    def create_segformer(name, dtype):
        assert name == "nvidia/mit-b5" and dtype == torch.float32
        config = SegformerConfig(depths=[3, 6, 40, 3], hidden_sizes=[64, 128, 320, 512])
        return SegformerModel(config)
    monkeypatch.setattr(open_clip, "create_model", create_clip)
    monkeypatch.setattr(timm, "create_model", create_image_model)
    monkeypatch.setattr(AutoModel, "from_pretrained", create_segformer)


def stages_of(stem, stages):
    """A CNN as a function: picture -> what each of its stages, one after another, gives."""
    def features(x):
        x, maps = stem(x), []
        for block in stages:
            x = block(x)
            maps.append(x)
        return maps
    return features


# ------------------------------------------------------------ Mask2Former's decoder
def mask2former(layers=4, dim=64, queries=7):
    """transformers' module of queries with random weights, biases and norms too. In float64: its
    masks become True or False between the layers, and what is near zero may fall either way."""
    config = Mask2FormerConfig(hidden_dim=dim, mask_feature_size=dim, num_attention_heads=8,
                               dim_feedforward=48, decoder_layers=layers + 1, dropout=0.,
                               num_queries=queries)
    module = library.Mask2FormerTransformerModule(dim, config).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.add_(.2 * torch.randn_like(parameter))
    return module.double()


def their_position(maps):
    embed = library.Mask2FormerSinePositionEmbedding(maps.shape[1] // 2, normalize=True)
    return embed(maps.shape, maps.device, maps.dtype).flatten(2)[:1].mT


def copy_attention(ours, separate):
    """torch's attention <- one of transformers', which has three matrices in the place of one."""
    parts = (separate.q_proj, separate.k_proj, separate.v_proj)
    ours.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
    ours.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
    ours.out_proj.load_state_dict(separate.out_proj.state_dict())


def copy_layer(ours, theirs):
    ours.cross_attention.load_state_dict(theirs.cross_attn.state_dict())
    copy_attention(ours.self_attention, theirs.self_attn)
    ours.feed[0].load_state_dict(theirs.fc1.state_dict())
    ours.feed[2].load_state_dict(theirs.fc2.state_dict())
    norms = (theirs.cross_attn_layer_norm, theirs.self_attn_layer_norm, theirs.final_layer_norm)
    for mine, its in zip(ours.norms, norms):
        mine.load_state_dict(its.state_dict())


def copy_decoder(ours, theirs):
    for mine, its in zip(ours.layers, theirs.decoder.layers):
        copy_layer(mine, its)
    ours.query.load_state_dict(theirs.queries_features.state_dict())
    ours.query_position.load_state_dict(theirs.queries_embedder.state_dict())
    ours.level.load_state_dict(theirs.level_embed.state_dict())
    ours.norm.load_state_dict(theirs.decoder.layernorm.state_dict())
    head = theirs.decoder.mask_predictor.mask_embedder.state_dict().values()
    for mine, its in zip(ours.mask_head.parameters(), head, strict=True):
        mine.copy_(its)


def xavier(module):
    """A new module by the rule of Mask2Former's transformer layers; of a projection, too."""
    for weight in module.parameters():
        if weight.dim() > 1:
            nn.init.xavier_uniform_(weight)
    return module


def projection(channels):
    """Mask2Former's input projections: Xavier-uniform with gain 1, no bias."""
    layer = xavier(nn.Conv2d(channels, 256, 1))
    nn.init.zeros_(layer.bias)
    return layer


def filled(channels, size):
    """detectron2's c2_xavier_fill: Kaiming-uniform with a=1, no bias."""
    layer = nn.Conv2d(channels, 256, size)
    nn.init.kaiming_uniform_(layer.weight, a=1)
    nn.init.zeros_(layer.bias)
    return layer


# ------------------------------------------------------------ Mask2Former's loss, at chosen pixels
class Mask2FormerLoss(library.Mask2FormerLoss):
    """The library's loss. It remembers which image each mask belongs to, for fake draws."""

    def loss_masks(self, masks, labels, indices, num_masks):
        queries = [torch.full_like(query, image) for image, (query, _) in enumerate(indices)]
        self.image = torch.cat(queries)
        return super().loss_masks(masks, labels, indices, num_masks)


def centres(pixels, shape):
    x, y = pixels % shape[1], pixels // shape[1]
    return torch.stack(((x + .5) / shape[1], (y + .5) / shape[0]), -1)


def mask2former_loss(monkeypatch, classes, masks, labels, pools, n, weights, no_object):
    """-> the library's loss; its matches (layer, image, query, class), the last layer's first; its
    three terms. pools: {points: pixels per image, one tensor each}, which stand in for the
    library's random draws, of which the matcher makes `n` for one image after another."""
    config = SimpleNamespace(
        num_labels=classes.shape[-1] - 1, no_object_weight=no_object, train_num_points=n,
        oversample_ratio=3., importance_sample_ratio=.75, class_weight=weights[0],
        mask_weight=weights[1], dice_weight=weights[2])
    loss, matches, images = Mask2FormerLoss(config, {}), [], cycle(range(len(labels)))
    shape = labels.shape[1:]

    def rand(boxes, count, _, device):
        if count == n:
            return centres(pools[n][next(images)], shape)[None]
        return torch.stack([centres(pools[count][image], shape) for image in loss.image.tolist()])

    targets = [label.unique() for label in labels]
    targets = [ids[ids != IGNORE] for ids in targets]
    truth = [(label == ids[:, None, None]).float() for label, ids in zip(labels, targets)]
    forward = loss.matcher.forward

    def remember(*arguments):
        found = forward(*arguments)
        layer = []
        for image, (queries, ids) in enumerate(found):
            for q, k in zip(queries.tolist(), ids.tolist()):
                layer.append((len(matches), image, q, targets[image][k].item()))
        matches.append(layer)
        return found
    monkeypatch.setattr(torch, "rand", rand)
    monkeypatch.setattr(loss.matcher, "forward", remember)
    *others, last = [{"masks_queries_logits": m, "class_queries_logits": c}
                     for c, m in zip(classes, masks)]
    terms = loss(**last, mask_labels=truth, class_labels=targets, auxiliary_predictions=others)
    monkeypatch.undo()
    names = ("loss_cross_entropy", "loss_mask", "loss_dice")
    sums = [sum(v for k, v in terms.items() if k.startswith(name)) for name in names]
    total = sum(weight * term for weight, term in zip(weights, sums))
    return total, matches, [term.item() for term in sums]


def pieces(*class_sets):
    """Labels (B, H, W) of blocks of 8 x 8 pixels, each of a random class of the image's set."""
    random, labels = np.random.default_rng(4), []
    for ids in class_sets:
        block = np.resize(random.permutation(np.resize(ids, 24)), (4, 6))
        labels.append(torch.from_numpy(np.kron(block, np.ones((8, 8), np.int64))))
    return torch.stack(labels)


# ------------------------------------------------------------ SAM
def tiny_sam():
    """A small Sam in the library's own classes, random, but with masks that are neither empty nor
    full."""
    encoder = modeling.ImageEncoderViT(
        img_size=256, patch_size=16, embed_dim=32, depth=2, num_heads=2, out_chans=32,
        norm_layer=partial(nn.LayerNorm, eps=1e-6), use_rel_pos=True, window_size=4,
        global_attn_indexes=(1,))
    prompts = modeling.PromptEncoder(32, (16, 16), (256, 256), 4)
    transformer = modeling.TwoWayTransformer(2, 32, 2, 64)
    decoder = modeling.MaskDecoder(transformer_dim=32, transformer=transformer,
                                   iou_head_hidden_dim=32)
    sam = modeling.Sam(encoder, prompts, decoder, miniature.MEAN, miniature.STD)
    return sam.eval().requires_grad_(False)


@torch.no_grad()
def plain_sam(small, pixels, points, shape):
    """The miniature's weights in segment_anything's own classes, which do work on the padding:
    normalise, encode the picture's multiples of 16, cut every code to the embedding.

    pixels uint8 (H, W, 3) and points (1, n, 2), both as SamPredictor scales them
    -> low masks, their ratings, masks enlarged to `shape`"""
    plain = copy.deepcopy(small)
    plain.__class__, plain.mask_decoder.__class__ = modeling.Sam, modeling.MaskDecoder
    height, width = pixels.shape[:2]
    rows, columns = -(-height // 16) * 16, -(-width // 16) * 16
    square = plain.preprocess(torch.from_numpy(pixels).permute(2, 0, 1)[None].float())
    embedding = plain.image_encoder(square[..., :rows, :columns])
    positive = torch.ones(points.shape[:2])
    sparse, dense = plain.prompt_encoder((points, positive), None, None)
    position = plain.prompt_encoder.get_dense_pe()[..., :rows // 8, :columns // 8]
    dense = dense[..., :rows // 8, :columns // 8]
    low, ratings = plain.mask_decoder(embedding, position, sparse, dense, True)
    padded = torch.zeros(1, 3, 128, 128)
    padded[..., :rows // 2, :columns // 2] = low
    return low[0], ratings[0], plain.postprocess_masks(padded, (height, width), shape)[0]


# ------------------------------------------------------------ colour jitter
class Recorder(np.random.Generator):
    """A generator that remembers the amounts which were drawn: [(range, amount)]."""

    def __init__(self, seed):
        super().__init__(np.random.PCG64(seed))
        self.amounts = []

    def uniform(self, *between):
        self.amounts.append((between, super().uniform(*between)))
        return self.amounts[-1][1]

    def integers(self, *between):
        self.amounts.append((between, super().integers(*between)))
        return self.amounts[-1][1]


def ssd_step(pixel, step, amount):
    """One step of detectron2's ColorAugSSDTransform for one pixel, with an exact HSV."""
    if step == "brightness":
        return [c + amount for c in pixel]
    if step == "contrast":
        return [c * amount for c in pixel]
    hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
    if step == "saturation":
        saturation = min(1, saturation * amount)
    if step == "hue":
        hue = (hue + amount / 180) % 1
    return colorsys.hsv_to_rgb(hue, saturation, value)


def ssd_jitter(image, *steps):
    """Steps (name, amount) of uint8 (3, H, W), each cut to 0 to 255 and to whole numbers."""
    pixels = image.flatten(1).T.tolist()
    for name, amount in steps:
        pixels = np.array([ssd_step(pixel, name, amount) for pixel in pixels])
        pixels = pixels.clip(0, 255).astype(int).tolist()
    return torch.tensor(pixels).T.reshape(image.shape)


# ------------------------------------------------------------ refinement
def random_label(seed, shape=(14, 19), classes=4):
    """From noise to large areas, some with IGNORE."""
    random, block = np.random.default_rng(seed), 1 + seed % 4
    coarse = random.integers(0, classes, (-(-shape[0] // block), -(-shape[1] // block)))
    label = np.kron(coarse, np.ones((block, block)))[:shape[0], :shape[1]].astype(np.uint8)
    label[random.random(shape) < .1 * (seed % 3)] = IGNORE
    return label


def union_find(label):
    """The 4-connected pieces of one class -> {first pixel: set of pixels}, IGNORE left out."""
    parent = {(y, x): (y, x) for y, x in np.argwhere(label != IGNORE).tolist()}

    def root(pixel):
        while parent[pixel] != pixel:
            pixel = parent[pixel]
        return pixel
    for y, x in parent:
        for other in ((y - 1, x), (y, x - 1)):
            if other in parent and label[other] == label[y, x]:
                one, two = sorted((root((y, x)), root(other)))
                parent[two] = one
    pieces = {}
    for pixel in parent:
        pieces.setdefault(root(pixel), set()).add(pixel)
    return pieces


def papers_rule(label, masks, classes):
    """3.3 written out. masks: one for every piece that is large enough, in the order of prompts.
    Union of a class first; a pixel of two different classes, or of none, is not labelled."""
    out = np.full(label.shape, IGNORE)
    for y, x in np.ndindex(label.shape):
        claims = {cls for cls, mask in zip(classes, masks) if mask[y, x]}
        if len(claims) == 1:
            out[y, x] = claims.pop()
    return out


# ------------------------------------------------------------ mIoU
IDS = np.array(list(CITYSCAPES))        # in the order of the train ids


def made_maps(classes):
    """Three pairs (prediction, truth) of label ids: an eighth has no label; where there are few
    classes, most are predicted but absent from the truth."""
    y, x = np.indices((40, 60))
    for i in range(3):
        truth = IDS[np.array(classes)[(y * 7 + x * x + i * 13) // 5 % len(classes)]]
        truth = truth * ((y + 3 * x + i) % 8 > 0)
        other = IDS[(3 * y + x * y + 5 * i) % 19]
        yield np.where((y * x + i) % 5 < 3, np.maximum(truth, 7), other), truth


def cityscapesscripts_iou(maps, folder, ids):
    """maps: pairs (prediction, truth) of label ids, written to a folder -> cityscapesScripts' mean
    and its IoU of every class in `ids`, in 0..1"""
    from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as scripts
    scripts.args.evalInstLevelScore = scripts.args.evalPixelAccuracy = False
    scripts.args.JSONOutput, scripts.args.quiet = False, True
    files = {"prediction": [], "truth": []}
    for i, pair in enumerate(maps):
        for kind, array in zip(files, pair):
            files[kind].append(str(folder / f"{kind}_{i}.png"))
            Image.fromarray(array.astype(np.uint8)).save(files[kind][-1])
    official = scripts.evaluateImgLists(files["prediction"], files["truth"], scripts.args)
    names = {label.id: label.name for label in scripts.labels}
    each = [official["classScores"][names[label_id]] for label_id in ids]
    return official["averageScoreClasses"], each


# ------------------------------------------------------------ data sets in their official formats
SIZE = 64, 128                          # rows, columns of every picture
# ids that the labels hold: some of the 19 classes, some that are not scored
CITYSCAPES_IDS = (0, 3, 7, 8, 11, 19, 21, 23, 26, 33)
SYNTHIA_IDS = (0, 1, 2, 3, 8, 15, 22)
MAPILLARY_IDS = (0, 13, 17, 24, 27, 30, 41, 55, 65)
TRAIN_IDS = (0, 1, 2, 7, 10, 13, 18, 255)


def picture(path, seed):
    """A picture of soft colours, as PNG or JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(SIZE[::-1], Image.BICUBIC).save(path)


def scene(ids, seed):
    """uint8 (H, W): 32 squares, each of one of the ids"""
    coarse = np.random.default_rng((seed, 1)).choice(ids, (4, 8))
    return np.kron(coarse, np.ones((16, 16))).astype(np.uint8)


def grey(path, label, colours=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(label)
    if colours:
        image.putpalette(colours)
    image.save(path)


def palette(path, label):
    """The pixels are ids, the file knows a colour for each."""
    grey(path, label, np.random.default_rng(0).integers(0, 256, 768).tolist())


def write_official_data(root):
    """Two pictures of every data set that the presets name, three for training."""
    def instances(path, label):     # SYNTHIA_IDS: the id in red and an instance's number in green
        png16(path, np.stack((label, label * 7, label * 0), -1).astype(np.uint16))

    def pair(image, label, write, ids, seed):
        picture(root / image, seed)
        write(root / label, scene(ids, seed))
    for i in range(3):
        pair(f"gta/images/{i + 1:05}.png", f"gta/labels/{i + 1:05}.png", palette, CITYSCAPES_IDS, i)
        pair(f"synthia/RGB/{i:07}.png", f"synthia/GT/LABELS/{i:07}.png", instances, SYNTHIA_IDS, i)
    for split, city, n in (("train", "aachen", 3), ("val", "frankfurt", 2)):
        for i in range(n):
            name = f"{split}/{city}/{city}_000000_{i:06}"
            pair(f"cityscapes/leftImg8bit/{name}_leftImg8bit.png",
                 f"cityscapes/gtFine/{name}_gtFine_labelIds.png", grey, CITYSCAPES_IDS, i)
            grey(root / f"cityscapes/gtFine/{name}_gtFine_instanceIds.png", scene((0, 7), i))
    for i in range(2):
        name = f"val/7d06fefd-f7be05a{i}"
        pair(f"bdd100k/images/10k/{name}.jpg", f"bdd100k/labels/sem_seg/masks/{name}.png", grey,
             TRAIN_IDS, i)
        name = f"{i}AFqPoXNmdqnDmqHXjVMmg"
        pair(f"mapillary/validation/images/{name}.jpg", f"mapillary/validation/labels/{name}.png",
             palette, MAPILLARY_IDS, i)
        for weather in ("fog", "night", "rain", "snow"):
            name = f"{weather}/val/GOPR0476/GOPR0476_frame_00085{i}"
            pair(f"acdc/rgb_anon/{name}_rgb_anon.png", f"acdc/gt/{name}_gt_labelTrainIds.png", grey,
                 TRAIN_IDS, i)


# ------------------------------------------------------------ what 03 and 04 do in their steps
WATCHED = "mask_loss", "refine", "embed_pictures", "update_teacher"
FEW = {"03_train_source": ["--BATCH=4"], "04_selftrain": ["--N_SOURCE=3", "--N_GENERATED=3"]}


def scenes(folder):
    """[(picture uint8 (3, H, W), label int64 (H, W))] of a folder of the miniature world"""
    found = []
    for path in sorted((folder / "images").iterdir()):
        picture = np.array(Image.open(path).convert("RGB"))
        label = np.array(Image.open(folder / "labels" / path.name))
        found.append((torch.from_numpy(picture).permute(2, 0, 1), torch.from_numpy(label).long()))
    return found


def last_weight(module):
    return list(module.parameters())[-1].detach().clone()


class WatchedRun:
    """A run of 03 or 04 whose functions are watched.

    calls: {function: [(arguments, what it returned)]}; seen: the pictures that the student saw in
    each step; teachers: a weight of the teacher in each; seeds: of the loss's random points; norms:
    of the gradient of each step's loss; start: the weights before the first step.
    invert: all colours, in place of the colour jitter. noise: relative, on the first weights."""

    def __init__(self, name, root, out, *arguments, invert=True, noise=0., seed=0, steps=10 ** 9):
        self.invert, self.noise, self.seed, self.steps = invert, noise, seed, steps
        self.calls = {name: [] for name in WATCHED}
        self.seen, self.teachers, self.seeds, self.norms = [], [], [], []
        self.truth, self.source = scenes(root / "toy/day"), scenes(root / "toy/game_train")
        arguments = [*FEW[name], *arguments, "--LOG_EVERY=1", "--WORKERS=0", f"--OUT={out}"]
        if name == "04_selftrain":
            arguments.append(f"--GENERATED=folder:{root}/toy/day/images")
        end = here(name, *arguments, run=root / "run", data=root, change=self.change)
        assert end == (None if steps == 10 ** 9 else f"{name}.py: enough")
        self.log, self.out = common.read_lines(out / "log.jsonl", "step", "loss"), out

    def change(self, stage):
        self.stages = stage, getattr(stage, "source_stage", stage)
        if self.invert:
            self.put("colour_jitter", lambda image, random: 255 - image)
        self.put("preview", lambda *arguments: None)
        self.put("predict", self.predict)
        for name in WATCHED:
            self.watch(name)
        make, forward = self.find("make_optimizer"), self.stages[1].Encoder.forward

        def make_optimizer(*arguments):
            self.optimizer, trained = make(*arguments)
            generator = torch.Generator().manual_seed(self.seed)
            with torch.no_grad():
                for weight in trained:
                    random = torch.randn(weight.shape, generator=generator)
                    weight.mul_(1 + self.noise * random)
            self.start = [weight.detach().clone() for weight in trained]
            return self.optimizer, trained

        def see(encoder, images):
            if images.dtype == torch.uint8:
                self.seen.append(images)
            return forward(encoder, images)
        self.put("make_optimizer", make_optimizer)
        self.stages[1].Encoder.forward = see

    def find(self, name):
        return getattr(self.stages[0], name, None) or getattr(self.stages[1], name, None)

    def put(self, name, function):
        """Replace a function in the stage and in 03, from where 04 takes some."""
        for module in self.stages:
            setattr(module, name, function)

    def watch(self, name):
        function = self.find(name)

        def call(*arguments, **options):
            if name == "mask_loss" and len(self.calls[name]) == self.steps:
                raise common.Stop("enough")
            if name == "mask_loss":
                self.seeds.append(torch.initial_seed())
            result = function(*arguments, **options)
            if name == "mask_loss":
                weights = sum((group["params"] for group in self.optimizer.param_groups), [])
                found = torch.autograd.grad(result[0], weights, retain_graph=True,
                                            allow_unused=True)
                squares = [g.double().square().sum() for g in found if g is not None]
                self.norms.append(float(sum(squares).sqrt()))
            self.calls[name].append((arguments, result))
            return result
        if function:
            self.put(name, call)

    def predict(self, encoder, decoder, images, half=False):
        """Scores of a teacher that knows the label of every clean picture, and no other picture"""
        self.teachers.append(last_weight(decoder))
        assert not decoder.training and not encoder.training
        labels = []
        for image in images:
            label, = [label for clean, label in self.truth if torch.equal(image, clean)]
            labels.append(label)
        return torch.nn.functional.one_hot(torch.stack(labels), 12).movedim(3, 1).float()

    def pairs(self):
        """[(a picture that the student saw, as it was before; the label that it learnt)]"""
        found = []
        for images, (arguments, _) in zip(self.seen, self.calls["mask_loss"], strict=True):
            found += zip(255 - images, arguments[2].long(), strict=True)
        return found


# ------------------------------------------------------------ waits for a GPU
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::bincount",
         "aten::_unique2", "aten::equal"}


class Waits(TorchDispatchMode):
    """Counts what makes the CPU wait if the tensors lie on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        masks = args[1] if name in ("aten::index", "aten::index_put_") else ()
        by_mask = any(mask is not None and mask.dtype == torch.bool for mask in masks)
        fills = name == "aten::index_put_" and args[2].numel() == 1     # by masked_fill
        self.count[name] += name in WAITS or by_mask and not fills
        return func(*args, **(kwargs or {}))


# ------------------------------------------------------------ results of the stages
RESULT = {"01_prompts": "prompts.txt", "02_generate": "index.jsonl",
          "03_train_source": "model.safetensors", "04_selftrain": "model.safetensors",
          "05_eval": "results.json"}
TRAINING = "03_train_source", "04_selftrain"


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def same_pictures(a, b):
    names = [row["file"] for row in common.read_lines(a / "index.jsonl")]
    return all(np.array_equal(Image.open(a / name), Image.open(b / name)) for name in names)


def scores(folder):
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return [[target["iou"] for target in row["targets"].values()] for row in rows]


def same(stage, a, b):
    """Whether two run folders hold the same result of a stage, bit for bit."""
    a, b, result = a / stage, b / stage, RESULT[stage]
    if stage == "05_eval":
        return scores(a) == scores(b)
    if stage in TRAINING:
        names = [result, "teacher.safetensors"][:1 + (stage == "04_selftrain")]
        return all(equal(load_file(a / name), load_file(b / name)) for name in names)
    if stage == "02_generate" and not same_pictures(a, b):
        return False
    return (a / result).read_bytes() == (b / result).read_bytes()


class SmallRun:
    """As much of common.Run as a checkpoint needs."""
    constants = {"LR": 1}

    def __init__(self, out):
        self.out = out

    def compare(self, earlier):
        assert earlier["LR"] == 1
