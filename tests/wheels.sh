#!/bin/sh
# Gather wheels for a machine with a GPU and without a network, on which Python 3.12, torch,
# torchvision, timm, transformers, accelerate, safetensors, scipy, pillow, pytest, tqdm and
# matplotlib are installed already.
#
#     sh tests/wheels.sh [FOLDER]          where there is a network; into wheels/, about 9 MB
#     pip install --no-index --no-deps wheels/*.whl          there, with the folder copied
#
# importlib_metadata (with lazy-importer and zipp) belongs to diffusers, ftfy (with wcwidth) to
# open_clip_torch. pip takes the wheels of the system on which it runs: gather on Linux for Linux.
set -eu
pip download --no-deps --python-version 3.12 --only-binary=:all: --dest "${1:-wheels}" \
    diffusers open_clip_torch segment_anything \
    ftfy wcwidth importlib_metadata lazy-importer zipp
ls -l "${1:-wheels}"
