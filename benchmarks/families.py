"""One INR of each family of networks against its teacher cut to a width and tuned there.

    python benchmarks/families.py --out=results/families [--families=vgg,vit]
    python benchmarks/families.py --out=results/families --name=cifar100 --data_dir=FOLDER_OR_NPZ \\
        --families=vgg_cifar100,vit_cifar100

For each preset of `configs/own.py`: what train.py makes of it, and for every width the first
channels of the same teacher, in the same order of importance, tuned alone on as many images as the
INR has seen, with the same labels and soft labels. Writes NAME.json and .csv with test accuracies,
in which other families are kept; the rate of the tuning is the best of those given on the
validation images.
"""

import argparse
import contextlib
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
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

FAMILIES = ("mlp", "vgg", "mobilenet", "resnet", "mixer", "vit")
RATIOS = (1.0, 0.75, 0.5, 0.25)


def tuned(
    experiment: Experiment, teacher: Any, splits: Any, sizes: Sequence[Any], rate: float
) -> list[Any]:
    """The teacher cut to each of `sizes` and tuned on as many images as the INR's recipe takes.

    Sizes are {group: width}. Each is tuned alone; what they share are the images and the teacher's
    soft labels.
    """
    family, recipe = experiment.hypernetwork.network.family, experiment.recipe
    params = [elastic.slice_params(family.groups, teacher, widths) for widths in sizes]
    steps = round(recipe.epochs * len(splits.train_labels) / recipe.batch_size)
    frozen = {path: path in family.groups.frozen for path in hyper.flat(params[0])}
    optimizer = optax.chain(
        optax.adamw(optax.cosine_decay_schedule(rate, steps), weight_decay=recipe.weight_decay),
        optax.masked(optax.set_to_zero(), [hyper.nested(frozen)] * len(sizes)),
    )
    images, labels = jnp.asarray(splits.train_images), jnp.asarray(splits.train_labels)

    @jax.jit
    def step(params, state, key, images, labels):
        num_classes = experiment.spec.num_classes
        x, y = experiment.preprocessing.train(key, images, labels, num_classes)
        soft = experiment.hypernetwork.network.apply(teacher, x)

        def loss(params, widths):
            logits = elastic.apply_at(family, params, x, widths)
            distillation = losses.distillation(logits, soft, temperature=recipe.temperature)
            ce = losses.cross_entropy(logits, y)
            return recipe.ce_weight * ce + recipe.distillation_weight * distillation

        gradients = [jax.grad(loss)(*one) for one in zip(params, sizes, strict=True)]
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state, rng, key = optimizer.init(params), np.random.default_rng(0), jax.random.key(0)
    per_epoch = len(labels) // recipe.batch_size
    for number in range(steps):
        if number % per_epoch == 0:
            order = rng.permutation(len(labels))
        start = number % per_epoch * recipe.batch_size
        rows = order[start : start + recipe.batch_size]
        key_of_step = jax.random.fold_in(key, number)
        params, state = step(params, state, key_of_step, images[rows], labels[rows])
    return params


def accuracy(experiment: Experiment, params: Any, widths: dict[str, int], split: Any) -> float:
    family = experiment.hypernetwork.network.family

    @jax.jit
    def predict(params, images):
        x = experiment.preprocessing.evaluate(images)
        return elastic.apply_at(family, params, x, widths).argmax(-1)

    images, labels = split
    starts = range(0, len(images), experiment.evaluation.batch_size)
    batches = (images[start : start + starts.step] for start in starts)
    found = [np.asarray(predict(params, batch)) for batch in batches]
    return float(np.mean(np.concatenate(found) == labels))


def measure(
    name: str, folder: pathlib.Path, rates: list[float], options: list[str]
) -> Iterator[list[dict[str, Any]]]:
    """A row for each width of one family, again after each rate that they are tuned at."""
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
    chosen = [[int(width) for width in hypernetwork.widths(ratio)] for ratio in RATIOS]
    sizes = [hypernetwork.by_name(widths) for widths in chosen]
    full = accuracy(experiment, teacher, sizes[0], test)
    for ratio, numbers, widths in zip(RATIOS, chosen, sizes, strict=True):
        tree = hyper.generate(hypernetwork, opened.params, np.array(numbers))
        ours = elastic.slice_params(hypernetwork.groups, tree, widths)
        sliced = elastic.slice_params(hypernetwork.groups, teacher, widths)
        rows.append(
            {
                "family": name,
                "width_ratio": ratio,
                "num_params": hypernetwork.num_params(numbers),
                "num_macs": hypernetwork.num_macs(numbers),
                "teacher": full,
                "sliced": accuracy(experiment, sliced, widths, test),
                "sliced_and_tuned": None,
                "rate": None,
                "one_inr": accuracy(experiment, ours, widths, test),
                "train_minutes": round(minutes, 2),
            }
        )
    yield rows
    best = [0.0] * len(sizes)
    for rate in rates:
        networks = tuned(experiment, teacher, splits, sizes, rate)
        for n, (row, params, widths) in enumerate(zip(rows, networks, sizes, strict=True)):
            score = accuracy(experiment, params, widths, validation)
            if score > best[n]:
                best[n], row["rate"] = score, rate
                row["sliced_and_tuned"] = accuracy(experiment, params, widths, test)
            print({k: round(v, 4) if type(v) is float else v for k, v in row.items()}, flush=True)
        yield rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--name", default="families", help="Of the files that are written.")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--rates", default="3e-3,1e-3", help="Of the tuning.")
    parser.add_argument("--data_dir", help="Folder or .npz of the data set, if not the digits.")
    parser.add_argument("--workdir", type=pathlib.Path, help="Where runs live and are resumed.")
    parser.add_argument("--smoke", action="store_true", help="Seconds of everything.")
    options = parser.parse_args()
    given = ["--config.train.epochs=1", "--config.teacher.epochs=1"] if options.smoke else []
    given += [f"--config.data.dir={options.data_dir}"] if options.data_dir else []
    rates = [float(rate) for rate in options.rates.split(",")]
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.name}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    runs, rows = before.get("runs", {}), before.get("rows", [])
    with contextlib.ExitStack() as stack:
        workdir = options.workdir or stack.enter_context(tempfile.TemporaryDirectory())
        for name in options.families.split(","):
            start = time.perf_counter()
            kept = [row for row in rows if row["family"] != name]
            for found in measure(name, pathlib.Path(workdir) / name, rates, given):
                rows = [*kept, *found]
                runs[name] = {
                    "command": " ".join(["python", *sys.argv]),
                    "versions": provenance.versions(),
                    "minutes": round((time.perf_counter() - start) / 60, 1),
                }
                storage.write_json(path, {"runs": runs, "rows": rows})
                storage.write_csv(path.with_suffix(".csv"), storage.as_table(rows))


if __name__ == "__main__":
    main()
