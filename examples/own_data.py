"""Images of one's own: a folder of PNG files by class, trained on and exported by the commands.

    python examples/own_data.py --out=/tmp/own_data

Writes scikit-learn's digits as FOLDER/CLASS/*.png, of which a fifth of each class becomes the test
set, trains the few steps of `digits:smoke` on them at another image size, and exports a network of
half the width. Under a minute on two CPU cores, most of it compilation.
"""

import argparse
import pathlib
import subprocess
import sys
from typing import Any

from PIL import Image
from sklearn import datasets


def write_images(folder: pathlib.Path) -> None:
    """FOLDER/CLASS/NUMBER.png of the 1,797 digits, 8x8, values 0..16 in gray."""
    digits: Any = datasets.load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255 / 16).round().astype("uint8")).save(path)


def neumeta(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "neumeta_jax", *arguments], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="images, run and network")
    out = parser.parse_args().out
    write_images(out / "images")
    neumeta(
        "train",
        "--config=digits:smoke",
        f"--workdir={out}/run",
        "--config.data.name=my_digits",
        f"--config.data.dir={out}/images",
        "--config.data.image_size=12",  # scaled to it; 0 takes the images as they are
        "--config.data.num_validation=100",
    )
    neumeta(
        "export",
        f"--workdir={out}/run",
        "--width=0.5",
        "--format=safetensors",
        f"--out={out}/half.safetensors",
    )


if __name__ == "__main__":
    main()
