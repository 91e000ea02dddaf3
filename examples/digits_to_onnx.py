"""From the digits that come with scikit-learn to an ONNX file of any size, run in onnxruntime.

    pip install -e ".[export]" && python examples/digits_to_onnx.py --workdir=/tmp/digits

Trains one INR (two to four minutes on two CPU cores; a finished work directory is used as it is),
draws networks of three widths from it, one of which it never saw in training, writes each as ONNX
with the normalisation in the graph, and classifies the test images with the files alone.
"""

import argparse
import pathlib
import subprocess
import sys

import numpy as np
import onnxruntime

from neumeta_jax.export import formats
from neumeta_jax.export.network import INPUT_NAME, Network, Normalization, draw
from neumeta_jax.networks.saved import load_inr
from neumeta_jax.runs.config import load_data
from neumeta_jax.runs.workdir import read_config

ROOT = pathlib.Path(__file__).resolve().parent.parent
WIDTH_RATIOS = (1.0, 0.5, 0.4)


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("digits"))
    parser.add_argument("--config", default="configs/digits.py", help="FILE[:PRESET]")
    options = parser.parse_args()
    workdir = options.workdir.absolute()
    train = [sys.executable, "train.py", f"--config={options.config}", f"--workdir={workdir}"]
    subprocess.run(train, cwd=ROOT, check=True)

    family, params, info = load_inr(workdir)
    normalization = Normalization(tuple(info["mean"]), tuple(info["std"]))
    _, splits = load_data(read_config(workdir))
    pixels = splits.test_images.transpose(0, 3, 1, 2)  # uint8, NCHW

    for ratio in WIDTH_RATIOS:
        spec, tree = draw(family, params, family.widths(ratio).tolist())
        path = workdir / f"width_{ratio}.onnx"
        equivalence = formats.export(
            path,
            Network(spec, tree, normalization),
            splits.test_images,
            format="onnx",
            normalize=True,
        )
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {INPUT_NAME: pixels})
        accuracy = (np.argmax(np.asarray(logits), axis=1) == splits.test_labels).mean()
        print(
            f"{path.name}: {spec.num_params:,} parameters, {path.stat().st_size:,} bytes, "
            f"{100 * accuracy:.2f} % in onnxruntime; {equivalence}"
        )


if __name__ == "__main__":
    main()
