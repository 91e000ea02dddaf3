"""One INR of each family of networks against its teacher cut to a width and tuned there.

    python benchmarks/families.py --out=results/families [--families=vgg,vit]

For each family of `configs/own.py`: what train.py makes of it on the digits, and for every width
the first channels of the same teacher, in the same order of importance, tuned alone on as many
images as the INR has seen, with the same labels and soft labels. Writes families.json and .csv with
test accuracies; rates of the tuning are the better of two on the validation images.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from neumeta_jax import elastic
from neumeta_jax.core import hypernetwork as hyper, losses
from neumeta_jax.files import provenance, storage
from neumeta_jax.files.trees import load_tree
from neumeta_jax.networks.saved import load_inr
from neumeta_jax.runs.backbone import BACKBONE_FILE
from neumeta_jax.runs.config import Experiment
from neumeta_jax.runs.workdir import TrainedRun, read_config

FAMILIES = ("mlp", "vgg", "mobilenet", "resnet", "vit")
RATIOS = (1.0, 0.75, 0.5, 0.25)
RATES = (3e-3, 1e-3)


def tuned(
    experiment: Experiment, teacher: Any, splits: Any, widths: dict[str, int], rate: float
) -> Any:
    """The teacher cut to `widths` and tuned on as many images as the INR's recipe takes."""
    family, recipe = experiment.hypernetwork.network.family, experiment.recipe
    params = elastic.slice_params(family.groups, teacher, widths)
    steps = round(recipe.epochs * len(splits.train_labels) / recipe.batch_size)
    frozen = {path: path in family.groups.frozen for path in hyper.flat(params)}
    optimizer = optax.chain(
        optax.adamw(optax.cosine_decay_schedule(rate, steps), weight_decay=recipe.weight_decay),
        optax.masked(optax.set_to_zero(), hyper.nested(frozen)),
    )
    images, labels = jnp.asarray(splits.train_images), jnp.asarray(splits.train_labels)

    @jax.jit
    def step(params, state, key, rows):
        num_classes = experiment.spec.num_classes
        x, y = experiment.preprocessing.train(key, images[rows], labels[rows], num_classes)
        soft = experiment.hypernetwork.network.apply(teacher, x)

        def loss(params):
            logits = elastic.apply_at(family, params, x, widths)
            distillation = losses.distillation(logits, soft, temperature=recipe.temperature)
            ce = losses.cross_entropy(logits, y)
            return recipe.ce_weight * ce + recipe.distillation_weight * distillation

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, rng, key = optimizer.init(params), np.random.default_rng(0), jax.random.key(0)
    per_epoch = len(labels) // recipe.batch_size
    for number in range(steps):
        if number % per_epoch == 0:
            order = rng.permutation(len(labels))
        start = number % per_epoch * recipe.batch_size
        rows = order[start : start + recipe.batch_size]
        params, state = step(params, state, jax.random.fold_in(key, number), rows)
    return params


def accuracy(experiment: Experiment, params: Any, widths: dict[str, int], split: Any) -> float:
    family = experiment.hypernetwork.network.family

    @jax.jit
    def predict(params, images):
        x = experiment.preprocessing.evaluate(images)
        return elastic.apply_at(family, params, x, widths).argmax(-1)

    images, labels = split
    return float(np.mean(np.asarray(predict(params, images)) == labels))


def measure(name: str, folder: pathlib.Path, options: list[str]) -> list[dict[str, Any]]:
    """A row for each width of one family."""
    start = time.perf_counter()
    command = [sys.executable, "train.py", f"--config=configs/own.py:{name}", *options]
    subprocess.run([*command, f"--workdir={folder}"], check=True, stdout=subprocess.DEVNULL)
    minutes = (time.perf_counter() - start) / 60
    opened = TrainedRun(folder, read_config(folder), *load_inr(folder))
    experiment, splits = opened.load()
    teacher, _ = load_tree(folder / BACKBONE_FILE)
    validation = splits.validation_images, splits.validation_labels
    test = splits.test_images, splits.test_labels
    hypernetwork, rows = experiment.hypernetwork, []
    full = hypernetwork.by_name([int(width) for width in hypernetwork.full_widths])
    for ratio in RATIOS:
        chosen = [int(width) for width in hypernetwork.widths(ratio)]
        widths = hypernetwork.by_name(chosen)
        tree = hyper.generate(hypernetwork, opened.params, np.array(chosen))
        ours = elastic.slice_params(hypernetwork.groups, tree, widths)
        sliced = elastic.slice_params(hypernetwork.groups, teacher, widths)
        others = [tuned(experiment, teacher, splits, widths, rate) for rate in RATES]
        scores = [accuracy(experiment, params, widths, validation) for params in others]
        rows.append(
            {
                "family": name,
                "width_ratio": ratio,
                "num_params": hypernetwork.num_params(chosen),
                "num_macs": hypernetwork.num_macs(chosen),
                "teacher": accuracy(experiment, teacher, full, test),
                "sliced": accuracy(experiment, sliced, widths, test),
                "sliced_and_tuned": accuracy(
                    experiment, others[int(np.argmax(scores))], widths, test
                ),
                "one_inr": accuracy(experiment, ours, widths, test),
                "train_minutes": round(minutes, 2),
            }
        )
        print({k: round(v, 4) if type(v) is float else v for k, v in rows[-1].items()}, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--smoke", action="store_true", help="Seconds of everything.")
    options = parser.parse_args()
    short = ["--config.train.epochs=1", "--config.teacher.epochs=1"] if options.smoke else []
    start, rows = time.perf_counter(), []
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.families.split(","):
            rows += measure(name, pathlib.Path(folder) / name, short)
            document = {
                "command": " ".join(["python", *sys.argv]),
                "versions": provenance.versions(),
                "minutes": round((time.perf_counter() - start) / 60, 1),
                "rows": rows,
            }
            storage.write_json(options.out / "families.json", document)
            storage.write_csv(options.out / "families.csv", storage.as_table(rows))


if __name__ == "__main__":
    main()
