"""02: which sampler a model gets, that its pictures are those of the library, and that whatever
stops or grows a run, every picture comes out as if one run had painted all."""
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import common
from conftest import fresh
from standins import (BETAS, DIFFUSION, PROMPTS, FakePipeline, Job, WithoutGuidance, scheduler,
                      tiny_sd, tiny_sd3)


def load(folder, **constants):
    """02's pipeline and call arguments for a folder, 64 x 64 pixels, two steps"""
    stage = fresh("02_generate")
    vars(stage).update({"STEPS": 2, "SIZE": (64, 64)} | constants)
    return stage.load_pipeline(str(folder))


def noise(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# ---------------------------------------------------------------------------- real pipelines
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_stable_diffusion_paints_as_the_official_call(tmp_path, prediction):
    """Euler read from the model's scheduler folder, guidance 7.5 (generate_txt_im.py)."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
    folder = tiny_sd(tmp_path / "sd", prediction)
    pipe, options = load(folder, GUIDANCE=7.5)
    ours = pipe(prompt=PROMPTS[:2], generator=noise(3, 4), **options).images
    euler = EulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    assert pipe.scheduler.config.prediction_type == euler.config.prediction_type == prediction
    official = StableDiffusionPipeline.from_pretrained(folder, scheduler=euler)
    wanted = official(PROMPTS[:2], num_inference_steps=2, guidance_scale=7.5, height=64, width=64,
                      generator=noise(3, 4)).images
    assert all(np.array_equal(a, b) for a, b in zip(ours, wanted))
    assert not np.array_equal(ours[0], ours[1])


def test_a_flow_matching_model_follows_its_own_sampler(tmp_path):
    """x <- x + (next sigma - sigma) v, with guidance v = u + g (c - u); sigma is 1, 0.001, 0."""
    folder = tiny_sd3(tmp_path / "sd3")
    pipe, options = load(folder, GUIDANCE=3.)
    ours = np.asarray(pipe(prompt=PROMPTS[:1], generator=noise(3), **options).images[0], int)
    assert type(pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"

    with torch.no_grad():
        text, none, pooled, pooled_none = pipe.encode_prompt(PROMPTS[:1], None, None)
        side = 64 // pipe.vae_scale_factor
        x = torch.randn(1, 4, side, side, generator=noise(3)[0])
        for sigma, after in ((1., .001), (.001, 0.)):
            u, c = (pipe.transformer(x, *given, torch.tensor([1000 * sigma])).sample
                    for given in ((none, pooled_none), (text, pooled)))
            x = x + (after - sigma) * (u + 3 * (c - u))
        image = pipe.vae.decode(x / pipe.vae.config.scaling_factor + .1).sample
    image = (image[0].permute(1, 2, 0) / 2 + .5).clamp(0, 1) * 255
    assert np.abs(ours - image.round().numpy()).max() <= 1


# ---------------------------------------------------------------------------- how one is loaded
@pytest.fixture
def fake(monkeypatch):
    """fake(pipeline) makes diffusers load that pipeline -> the list of arguments of each load"""
    def install(pipeline, missing=()):
        loads = []

        def from_pretrained(name, variant=None, **more):
            loads.append({"variant": variant, **more})
            if variant in missing:
                raise ValueError("no such modeling files are available")
            return pipeline
        import diffusers
        monkeypatch.setattr(diffusers.AutoPipelineForText2Image, "from_pretrained", from_pretrained)
        return loads
    return install


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@pytest.mark.parametrize("name, more", [
    ("FlowMatchEulerDiscreteScheduler", {}),            # SD3, FLUX, Qwen-Image, Z-Image
    ("FlowMatchHeunDiscreteScheduler", {}), ("FlowMatchLCMScheduler", {}),
    ("DPMSolverMultistepScheduler", FLOW), ("UniPCMultistepScheduler", FLOW),       # Sana
    ("EDMEulerScheduler", {})])                         # Playground 2.5: another noise scale
def test_a_sampler_that_euler_can_not_replace_stays(fake, name, more):
    own = scheduler(name, **more)
    fake(FakePipeline(own))
    assert load("owner/name")[0].scheduler is own


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler",
                                  "EulerAncestralDiscreteScheduler", "UniPCMultistepScheduler"])
def test_other_samplers_become_euler_with_their_settings(fake, name):
    fake(FakePipeline(scheduler(name, prediction_type="v_prediction", **BETAS)))
    euler = load("owner/name")[0].scheduler
    assert type(euler).__name__ == "EulerDiscreteScheduler"
    assert euler.config.prediction_type == "v_prediction" and euler.config.beta_end == .012


def test_guidance_is_obeyed_or_refused(fake):
    fake(FakePipeline())
    for value in (0, 4.):
        assert load("owner/name", GUIDANCE=value)[1]["guidance_scale"] == value
    fake(WithoutGuidance())
    assert set(load("owner/name", GUIDANCE=0)[1]) == {"num_inference_steps", "height", "width"}
    ignores = FakePipeline()                            # Qwen-Image takes the argument all the same
    ignores.unet.config = {"guidance_embeds": False}
    for pipeline in (WithoutGuidance(), ignores):
        fake(pipeline)
        with pytest.raises(common.Stop, match="owner/name has no guidance: set GUIDANCE=0"):
            load("owner/name", GUIDANCE=3)


@pytest.mark.parametrize("dtype, missing, tried", [
    ("float16", (), ["fp16"]), ("float16", ("fp16",), ["fp16", None]), ("bfloat16", (), [None])])
def test_on_a_gpu_the_half_size_files_are_tried_first(fake, monkeypatch, dtype, missing, tried):
    monkeypatch.setattr(common, "device", lambda: torch.device("cuda"))
    pipeline = FakePipeline(dtype=getattr(torch, dtype))
    loads = fake(pipeline, missing)
    load("owner/name", DTYPE=dtype)
    assert [row["variant"] for row in loads] == tried
    assert all(row["dtype"] == pipeline.unet.dtype for row in loads)
    assert pipeline.unet.weight.is_contiguous(memory_format=torch.channels_last)
    assert pipeline.device.type == "cuda"


def test_a_library_that_ignores_the_dtype_is_noticed(fake, monkeypatch):
    monkeypatch.setattr(common, "device", lambda: torch.device("cuda"))
    fake(FakePipeline(dtype=torch.float32))
    with pytest.raises(common.Stop, match="diffusers ignores DTYPE=float16: update it"):
        load("owner/name", DTYPE="float16")


@pytest.mark.parametrize("gone", ["", "tokenizer", "text_encoder", "model_index.json"])
def test_a_model_that_is_not_there_or_lacks_a_part_is_named(say, job, tmp_path, capfd, gone):
    folder = tmp_path / "model"
    if gone:
        shutil.copytree(DIFFUSION, folder)
        (folder / gone).rename(tmp_path / "gone")
    message = say("02_generate", f"--DIFFUSION={folder}", f"--PROMPTS={job.prompts}", "--STEPS=1")
    assert message.startswith(f"02_generate.py: DIFFUSION={folder} c")      # could not, cannot
    assert len(message.splitlines()) == 2 and "ERROR" not in capfd.readouterr().err


# ---------------------------------------------------------------------------- runs
@pytest.fixture
def job(tmp_path):
    return Job(tmp_path / "job")


@pytest.fixture
def whole(tmp_path):
    """Seven images, painted by one run"""
    job = Job(tmp_path / "whole")
    job.run(N_IMAGES=7)
    return job


def test_image_i_has_prompt_i_mod_p_and_seed_plus_i(job):
    batches = job.run(SEED=10)
    assert batches == [PROMPTS[:2], [PROMPTS[2], PROMPTS[0]], PROMPTS[1:2]]
    for i, row in enumerate(job.index()):
        assert row == {"file": f"{i:05d}_p{i % 3:04d}.png", "prompt": PROMPTS[i % 3],
                       "seed": 10 + i}
        assert Image.open(job.out / row["file"]).getpixel((1, 1))[1] == 10 + i      # its seed
    assert len(job.index()) == len(job.pictures()) == 5
    assert job.run(SEED=10) == []                       # it is finished


@pytest.mark.parametrize("damage", [
    lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-30])],
    ids=["missing", "cut off"])
def test_a_picture_that_is_lost_is_painted_in_its_group_though_the_index_stands(whole, damage):
    before = whole.pictures()
    damage(whole.out / "00003_p0000.png")
    assert whole.run(N_IMAGES=7) == [[PROMPTS[2], PROMPTS[0]]] and whole.pictures() == before


def test_more_or_fewer_images_may_be_asked_for_in_the_same_folder(job, whole):
    job.run(N_IMAGES=3)
    assert len(job.index()) == len(job.pictures()) == 3
    assert len(job.run(N_IMAGES=7)) == 3                # the batch that was cut, and two new ones
    assert job.pictures() == whole.pictures() and job.index() == whole.index()
    (job.out / "00006_p0000.png").unlink()
    assert job.run(N_IMAGES=2) == []                    # it is none of the two, which are for 04
    assert job.index() == whole.index()


def test_shards_paint_what_one_run_paints(job, whole, capsys):
    assert len(job.run(N_IMAGES=7, SHARD="1/2")) == 2
    assert not (job.out / "index.jsonl").exists()
    assert "2/2 batches | 00006_p0000.png" in capsys.readouterr().out
    assert len(job.run(N_IMAGES=7, SHARD="0/2")) == 2
    assert job.pictures() == whole.pictures() and job.index() == whole.index()


def test_a_process_of_torchrun_paints_its_share(job, whole, monkeypatch):
    monkeypatch.setattr(common, "device", lambda: torch.device("cpu"))      # needs no meeting
    monkeypatch.setattr(common, "PROCESSES", 3)
    for rank, painted in ((0, 2), (2, 1), (1, 1)):
        monkeypatch.setattr(common, "RANK", rank)
        assert not (job.out / "index.jsonl").exists()
        assert len(job.run(N_IMAGES=7)) == painted
    assert job.pictures() == whole.pictures() and job.index() == whole.index()
    assert job.run(N_IMAGES=9, SHARD="2/3") == []           # new are batches 3 and 4
    assert (job.out / "index.jsonl").exists()


@pytest.mark.parametrize("prompts", [
    ["a photo of a train in the rain", *PROMPTS[1:]], [*PROMPTS, "a photo of a dog in a town"],
    PROMPTS[:2]])
def test_prompts_that_changed_are_noticed_before_anything_is_painted(job, prompts):
    job.run(N_IMAGES=4)
    before = job.pictures()
    job.prompts.write_text("\n".join(prompts), encoding="utf-8")
    with pytest.raises(common.Stop, match=r"made with PROMPTS .digest.=.*--OUT=\S+_prompts"):
        job.run(N_IMAGES=9)
    assert job.pipeline.batches == [] and job.pictures() == before


@pytest.mark.parametrize("gpu, dtype, remedy", [
    (True, "float16", "--DTYPE=bfloat16 or float32"), (True, "float32", "another --DIFFUSION"),
    (False, "float16", "another --DIFFUSION")])         # on a CPU it is float32 already
def test_a_picture_of_one_colour_is_not_saved(job, monkeypatch, gpu, dtype, remedy):
    class Black(FakePipeline):
        def __call__(self, **more):
            output = super().__call__(**more)
            output.images[1] = Image.new("RGB", (16, 16))
            return output
    monkeypatch.setattr(common, "device", lambda: torch.device("cuda" if gpu else "cpu"))
    with pytest.raises(common.Stop, match=f"blank image: try {remedy}, in another --OUT"):
        job.run(pipeline=Black(), DTYPE=dtype)
    assert not job.pictures()
    assert job.run(DTYPE="bfloat16") and job.pictures()     # nothing was made with the other one


def test_a_model_that_paints_another_size_is_refused(job):
    class Square(FakePipeline):
        def __call__(self, **more):
            return super().__call__(**more | {"width": 24})
    with pytest.raises(common.Stop, match=r"paints \(16, 24\), not SIZE=.*--SIZE=16,24"):
        job.run(pipeline=Square())
    assert not job.pictures()


# ---------------------------------------------------------------------------- whose picture it is
@pytest.mark.parametrize("write", [
    lambda path: Image.new("RGB", (5, 5)).save(path, "PNG"),
    lambda path: Image.new("RGB", (16, 16)).save(path, "JPEG"),
    lambda path: path.write_text("my notes"), lambda path: path.write_bytes(b"")],
    ids=["of 5 x 5", "JPEG", "text", "empty"])
@pytest.mark.parametrize("n", [5, 7])                       # a finished run, and one that goes on
def test_a_strangers_file_is_neither_taken_for_a_picture_nor_replaced(job, write, n):
    job.run()
    before, path = job.pictures(), job.out / "00003_p0000.png"
    write(path)
    strange = path.read_bytes()
    with pytest.raises(common.Stop, match="00003_p0000.png was not painted here(?s:.*)move it"):
        job.run(N_IMAGES=n)
    assert path.read_bytes() == strange and job.pipeline.batches == []
    path.unlink()
    assert job.run() == [[PROMPTS[2], PROMPTS[0]]] and job.pictures() == before


def kill(out):
    raise KeyboardInterrupt


@pytest.mark.parametrize("event, error, message, batches", [
    (kill, KeyboardInterrupt, None, 2),
    (shutil.rmtree, common.Stop, "out was removed meanwhile: run the same command again", 4),
    (lambda out: (out / "00000_p0000.png").unlink(), common.Stop,
     "what was painted was removed meanwhile: run the same command again", 1)],
    ids=["killed", "folder removed", "picture removed"])
def test_a_run_that_was_stopped_or_lost_files_goes_on(job, whole, event, error, message, batches):
    class Disturbed(FakePipeline):
        def __call__(self, **more):
            if len(self.batches) == 2:
                event(job.out)
            return super().__call__(**more)
    with pytest.raises(error, match=message):
        job.run(N_IMAGES=7, pipeline=Disturbed())
    assert not (job.out / "index.jsonl").exists()
    assert len(job.run(N_IMAGES=7)) == batches
    assert job.pictures() == whole.pictures() and job.index() == whole.index()


# ---------------------------------------------------------------------------- prompts, preview
def test_a_file_of_prompts_from_any_editor_is_read(job):
    job.prompts.write_bytes(b"\xef\xbb\xbf  a photo of a car in town \r\n\r\nb\r\nb\r\n")
    assert job.run(N_IMAGES=3) == [["a photo of a car in town", "b"], ["b"]]


@pytest.mark.parametrize("write, words", [
    (lambda path: path.write_bytes(b""), "prompts.txt is empty"),
    (lambda path: path.write_bytes(b"\n  \n"), "prompts.txt is empty"),
    (lambda path: path.write_bytes("a café".encode("latin-1")), "prompts.txt cannot be read"),
    (lambda path: path.write_text('[\n "a photo of a car in town"\n]'), r"has the line \['\['\]"),
    (lambda path: path.write_bytes(b"a" * 2_000_000), "has a line of 2,000,000 characters"),
    pytest.param(lambda path: os.mkfifo(path), "no file .*prompts.txt", marks=pytest.mark.skipif(
        not hasattr(os, "mkfifo"), reason="needs named pipes"))],
    ids=["empty", "blank", "latin-1", "JSON", "2 MB", "a pipe"])
def test_a_file_without_prompts_is_refused(job, write, words):
    job.prompts.unlink()
    write(job.prompts)
    with pytest.raises(common.Stop, match=f"{words}.*\n.*one prompt per line"):
        job.run()
    assert not job.out.exists()


def test_the_preview_takes_any_prompt(job):
    job.prompts.write_text("a photo of a $5 car in $ and \\frac{1}{2}^ weather " + "very " * 40)
    job.run(preview=True, N_IMAGES=7)                   # rows of five and of two
    assert Image.open(job.out / "preview.png").width > 1000


# ---------------------------------------------------------------------------- messages
@pytest.mark.parametrize("error, words", [
    (torch.OutOfMemoryError(), "GPU's memory is full"), (MemoryError(), "machine's memory is full"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "machine's memory is full")])
def test_full_memory_is_called_so(say, fake, job, error, words):
    class Large(FakePipeline):
        def __call__(self, prompt, guidance_scale, **more):
            raise error
    fake(Large())
    message = say("02_generate", f"--PROMPTS={job.prompts}", f"--OUT={job.out}")
    assert words in message and "hub" not in message and len(message.splitlines()) == 1
