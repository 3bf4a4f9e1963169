"""
03_train_source: train a mask decoder on frozen CLIP features with labelled source images only (paper 3.1).

    in    SOURCE                                      labelled images of one domain: a data set's name or folder:PATH
    out   RUN/03_train_source/model.safetensors       theta_0, which labels the first painted scenes in 04; preview.png
    time  toy: see README; paper: 40,000 steps on one GPU (not run here)

The encoder E is a CNN tower of CLIP and stays frozen: training is cheaper, and features that have seen the whole web are not bent
towards one video game. Only the decoder D learns, by Mask2Former's loss: each layer's queries are matched to the classes that are in
the image; matched queries learn class and mask, the others learn "no object". Augmentation: scale, crop, colour jitter, flip.

Healthy if the loss falls in the first hundred steps and the previews' second column begins to look like the third."""
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import common
from common import CLASSES, DATA, RUN, Stop, preset

# ---------------------------------------------------------------------------- constants
SOURCE = preset(toy=f"folder:{DATA}/toy/game_train", gta="gta", synthia="synthia", cityscapes="cityscapes")
OUT = f"{RUN}/03_train_source"
ENCODER = preset(toy="local-dir:tests/toy/weights/clip", paper="convnext_large_d_320/laion2b_s29b_b131k_ft_soup")   # also RN50-quickgelu/openai, RN101-quickgelu/openai
FREEZE_ENCODER = True                             # False: Table 5's trainable encoder
ENCODER_LR = 0.1                                  # times LR, if the encoder trains (official)
DIM = preset(toy=64, paper=256)                   # width of the decoder
QUERIES = preset(toy=24, paper=100)
LAYERS = preset(toy=3, paper=6)                   # Mask2Former: 9, with a feed-forward of 2,048
HIDDEN = preset(toy=128, paper=512)
PIXEL_LAYERS = 3                                  # of the pixel decoder; Mask2Former: 6 of deformable attention
ITERATIONS = preset(toy=600, gta=40_000, synthia=30_000, cityscapes=10_000)         # paper 4.1; official Cityscapes warm-up: 5,000
BATCH = preset(toy=16, paper=8)                   # paper 4.1
LR = preset(toy=1.5e-3, paper=1e-5, cityscapes=1e-4)                                # paper 4.1
SCHEDULE = preset(toy="poly", paper="constant", synthia="poly")                     # official; the paper does not say
WARMUP = preset(toy=50, paper=0)                  # steps
WEIGHT_DECAY = 0.05                               # paper 4.1
GRAD_CLIP = preset(toy=1.0, paper=0.01)           # global norm; 0.01 is Mask2Former's
CROP = preset(toy=(128, 256), paper=(768, 768))   # rows, columns; paper 4.1
SCALE = preset(toy=(0.75, 1.5), paper=(0.5, 2.0)) # paper 4.1
RARE = 0.0                                        # temperature of rare class sampling of source images (DAFormer: 0.01); 0 = all alike, as the paper
POINTS = preset(toy=512, paper=12_544)            # points a mask in the losses: Mask2Former's 112 x 112
SEED = 0
PARTS = 1                                         # a batch in so many parts, to the same result: less memory, a second forward pass of the decoder
HALF = False                                      # bfloat16 autocast; the official code trains in float32
WORKERS = preset(toy=0, paper=8)                  # threads that read and augment; on two cores a third thread only disturbs
LOG_EVERY = preset(toy=20, paper=50)
SAVE_EVERY = preset(toy=100, paper=1_000)
KEEP_EVERY = 0                                    # keep a model to score every so many steps, OUT/step_NNNNNN.safetensors; 0 = only the last


def preview(path, encoder, decoder, batches, device):
    """image | prediction | truth of a few source crops."""
    images, labels = batches
    guess = common.predict(encoder, decoder.eval(), images.to(device)).argmax(1).to(torch.uint8).cpu().numpy()
    decoder.train()
    rows = [np.concatenate([x.permute(1, 2, 0).numpy(), common.colourise(p), common.colourise(y.numpy().astype(np.uint8))], 1) for x, p, y in zip(images, guess, labels)]
    with common.whole(path) as part:
        Image.fromarray(np.concatenate(rows)).save(part, "PNG")


def main():
    run = common.Run(globals(), "model.safetensors")
    if run.finished():
        return
    if BATCH < 1 or ITERATIONS < 1:
        raise Stop(f"BATCH={BATCH}, ITERATIONS={ITERATIONS}: both must be at least 1")
    common.toy_data(SOURCE)
    source = common.pairs(SOURCE, "train")
    encoder = common.Encoder(ENCODER, FREEZE_ENCODER)
    device = common.device()
    torch.manual_seed(SEED)
    decoder = common.Decoder(encoder.channels, len(CLASSES), DIM, QUERIES, LAYERS, HIDDEN, PIXEL_LAYERS)
    encoder.to(device), decoder.to(device)
    trained = [decoder] if FREEZE_ENCODER else [decoder, encoder]
    optimizer = common.make_optimizer(decoder, WEIGHT_DECAY, None if FREEZE_ENCODER else encoder, ENCODER_LR)
    run.start()
    assert not FREEZE_ENCODER or not any(p.requires_grad for p in encoder.parameters()), "expected a frozen encoder (paper 3.1), got gradients"

    facts = {"seed": SEED, "stage": "03_train_source", "constants": run.constants}
    saved = {"decoder": decoder, "optimizer": optimizer, **({} if FREEZE_ENCODER else {"encoder": encoder})}
    checkpoint = Path(OUT) / "checkpoint.pt"
    first = common.resume(checkpoint, saved)
    run.rewind(first)
    print(f"{len(source)} labelled images, {BATCH} a step, {ITERATIONS} steps = {ITERATIONS * BATCH / len(source):.1f} epochs; "
          f"{sum(p.numel() for m in trained for p in m.parameters()) / 1e6:.2f} M of {sum(p.numel() for m in (encoder, decoder) for p in m.parameters()) / 1e6:.2f} M parameters train; on {device}")

    order, pick = common.dealt(BATCH), common.sampler(source, SOURCE, SEED, RARE, Path(OUT) / "classes.npy")

    def batch(step):
        return common.source_batch(source, SOURCE, step, BATCH, SEED, CROP, SCALE, encoder.fill, pick)

    for step, (images, labels) in zip(range(first, ITERATIONS), common.ahead(batch, range(first, ITERATIONS), WORKERS)):
        common.set_learning_rate(optimizer, LR, step, ITERATIONS, WARMUP, SCHEDULE)
        *predictions, finish = common.in_parts(encoder, decoder, images.to(device, non_blocking=True), PARTS, HALF, order)        # D(E(x)), before the first layer and after each
        loss, terms = common.mask_loss(*predictions, common.gather(labels.to(device, non_blocking=True), order), POINTS, common.seeded(SEED, step, 5))      # eq. 1
        optimizer.zero_grad(set_to_none=True)
        loss.backward(), finish()
        norm = nn.utils.clip_grad_norm_([p for m in trained for p in m.parameters()], GRAD_CLIP)
        common.stop_unless_finite(step, loss, norm, checkpoint, lambda: [source[pick(step * BATCH + i)][0] for i in range(BATCH)])
        optimizer.step()

        done = step + 1
        run.progress(done, ITERATIONS, LOG_EVERY, {"loss": loss.item(), **terms}, BATCH)
        if done % SAVE_EVERY == 0 and done < ITERATIONS:
            common.save_checkpoint(checkpoint, {"step": done, **{name: thing.state_dict() for name, thing in saved.items()}})
        if KEEP_EVERY and done % KEEP_EVERY == 0 and done < ITERATIONS:
            common.save_model(Path(OUT) / f"step_{done:06d}.safetensors", encoder, decoder, iteration=done, **facts)
    preview(Path(OUT) / "preview.png", encoder.eval(), decoder, tuple(x[:4] for x in batch(ITERATIONS)), device)
    run.finish()
    common.save_model(run.result, encoder, decoder, iteration=ITERATIONS, **facts)      # last: its presence means finished
    if run.leads:
        checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    common.launch(globals())
