"""How fast networks are evaluated and trained, as ratios to what they cannot do without.

    python benchmarks/speed.py --out=DIR
    python benchmarks/speed.py --out=DIR --networks=resnet20 --parts=grid,step
    python benchmarks/speed.py --out=DIR --smoke

Everything that is compared is measured in one run, in turns, after compilation; a side counts with
its fewest seconds. Images and weights are random, no time depends on them, and no data set is
needed. Networks, INRs and recipes are those of configs/resnet20.py and configs/resnet56.py, in
float32 on CPUs; what generation costs is measured by inr_kinds.py. The parts:

    grid        evaluation of many networks, against the floor, the sum of their dense forward
                passes one by one
    step        a training step, against its bare forward and backward passes and against a step of
                plain SGD on the network itself

Writes speed.json and speed.md to --out after each part.
"""

import dataclasses
import functools
import pathlib
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from neumeta_jax.commands import command_line
from neumeta_jax.commands.command_line import run
from neumeta_jax.core import hypernetwork as hyper, losses
from neumeta_jax.core.update import inr_update, phase_inputs, start_phase
from neumeta_jax.data import datasets
from neumeta_jax.data.preprocessing import Images
from neumeta_jax.errors import check
from neumeta_jax.evaluation import timing
from neumeta_jax.evaluation.evaluator import Evaluator
from neumeta_jax.files import provenance, storage
from neumeta_jax.networks import cifar_resnet
from neumeta_jax.networks.cifar_resnet import Params, ResNetHypernetwork
from neumeta_jax.networks.cifar_spec import ResNetSpec, morph
from neumeta_jax.report.tables import table
from neumeta_jax.runs.config import Experiment, from_config
from neumeta_jax.runs.loop import Steps, default_steps_per_call
from neumeta_jax.runs.teacher import TeacherRecipe, teacher_init, teacher_update

ROOT = pathlib.Path(__file__).resolve().parent.parent
NETWORKS = ("resnet20", "resnet56")
NUM_CLASSES = 100
# Flags of numbers: default, value of --smoke, what it says.
NUMBERS = {
    "repeats": (5, 1, "times that everything but the grid is measured"),
    "batch_size": (1000, 16, "images of a forward pass"),
    "num_networks": (64, 4, "of the grid, all different"),
    "num_images": (2000, 24, "of the grid"),
    "grid_repeats": (2, 1, "times that the grid is measured"),
    "train_batch": (0, 4, "images of a training step, 0 for the config's"),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table: `value` against `reference`, both in `unit`."""

    network: str
    part: str
    what: str
    value: float
    against: str
    reference: float
    unit: str = "s"

    @property
    def ratio(self) -> float:
        return self.value / self.reference


Findings = tuple[list[Row], dict[str, Any]]  # lines of the table, and what is no ratio


# --- what is measured ------------------------------------------------------------------------


def load_config(network: str) -> dict[str, Any]:
    """The config of a network as nested dicts."""
    tiny = network == "tiny"
    arguments = ["", f"--config={ROOT}/configs/{'resnet20' if tiny else network}.py"]
    config, _ = command_line.parse(arguments, {}, config_required=True)
    if tiny:
        config["network"] |= {"depth": 14, "stage_widths": (4, 6, 8)}
        config["train"] |= {"num_random_sizes": 1}
    return config


def random_images(rng: np.random.Generator, number: int, size: int) -> tuple[Any, Any]:
    """uint8[number, size, size, 3] and labels of all classes where there are enough."""
    images = rng.integers(0, 256, (number, size, size, 3), np.uint8)
    return images, np.arange(number, dtype=np.int32) % NUM_CLASSES


@dataclasses.dataclass
class Case:
    """A network with the INR and the recipe of its config, and random data for it."""

    name: str
    args: flags.FlagValues
    experiment: Experiment
    dataset: datasets.Dataset
    backbone: Params

    @property
    def family(self) -> ResNetHypernetwork:
        return self.experiment.hypernetwork

    @property
    def spec(self) -> ResNetSpec:
        return self.experiment.spec

    @functools.cached_property
    def params(self) -> Params:
        """The INR at the backbone's weights where it has a closed form, else at random.

        Second moments are those of channels that correlate by a half.
        """
        needed = self.family.inr.needs_moments
        blocks = (self.spec.blocks[n] for n in self.family.blocks)
        moments = {
            f"{block.name}/conv2/kernel": 0.5 * (np.eye(block.hidden_width + 1) + 1).astype("f")
            for block in blocks
        }
        alpha = self.experiment.recipe.alpha_init
        init = functools.partial(hyper.init, alpha=alpha, from_backbone=needed)
        return jax.jit(init, static_argnums=1)(
            jax.random.key(0), self.family, self.backbone, moments=moments if needed else None
        )


def make_case(name: str, args: flags.FlagValues) -> Case:
    config = load_config(name)
    config["dtype"] = "float32" if jax.default_backend() == "cpu" else config["dtype"]
    recipe = config["train"]
    if args.train_batch:
        recipe |= {"batch_size": args.train_batch, "micro_batch": 0}
    sizes = 1 if recipe["share_images"] else 1 + recipe["num_random_sizes"]
    per_call = recipe["batch_size"] * sizes * default_steps_per_call()
    rng = np.random.default_rng(0)
    image_size = 8 if name == "tiny" else 32
    train = random_images(rng, max(per_call, NUM_CLASSES), image_size)
    test = random_images(rng, args.num_images, image_size)
    dataset = datasets.make_dataset(config["data"]["name"], *train, *test, num_classes=NUM_CLASSES)
    experiment = from_config(config, dataset)
    backbone = jax.jit(cifar_resnet.init_params, static_argnums=1)(
        jax.random.key(0), experiment.spec
    )
    return Case(name, args, experiment, dataset, backbone)


def draw_widths(family: ResNetHypernetwork, number: int) -> np.ndarray:
    """int32[number, blocks] of width ratios uniform in [0.25, 1], no two rows equal.

    Ratios that round to a network that is there are drawn again, because an evaluator evaluates
    equal networks once; fewer rows where the family has no more.
    """
    rng = np.random.default_rng(0)
    rows: dict[tuple[int, ...], None] = {}
    for _ in range(1000 * number):
        if len(rows) == number:
            break
        rows[tuple(family.widths(rng.uniform(0.25, 1.0)).tolist())] = None
    return np.array(list(rows), np.int32)


# --- grid ------------------------------------------------------------------------------------


def measure_grid(case: Case) -> Findings:
    args, family = case.args, case.family
    preprocessing = case.experiment.preprocessing
    images, labels = case.dataset.test_images, case.dataset.test_labels
    widths = draw_widths(family, args.num_networks)
    number = len(widths)

    def evaluate():
        data = images, labels, preprocessing
        evaluator = Evaluator(family, case.params, *data, batch_size=args.batch_size)
        plan = evaluator.plan(widths)
        return plan, evaluator.score(plan)[0]

    cold, (plan, num_correct) = timing.timed(evaluate)

    # The floor: dense trees that are ready, images on the device, batches as the evaluator has
    # them, and nothing but forward passes.
    num_batches = -(-len(images) // args.batch_size)
    parts = (np.array_split(x, num_batches) for x in (images, labels))
    batches = [jax.device_put(pair) for pair in zip(*parts, strict=True)]

    @functools.partial(jax.jit, static_argnums=0)
    def count(spec, tree, images, labels):
        logits = cifar_resnet.apply(spec, tree, preprocessing.evaluate(images))
        return jnp.sum(jnp.argmax(logits, axis=-1) == labels)

    def forward(spec, tree):
        return sum(int(n) for n in [count(spec, tree, *batch) for batch in batches])

    generate = jax.jit(lambda params, row: hyper.generate(family, params, row))
    dense = []
    for row in widths:
        tree = jax.device_get(generate(case.params, jnp.asarray(row)))
        small, tree = family.dense(tree, row.tolist())
        dense.append((small, jax.device_put(tree)))
    counts = [forward(*network) for network in dense]

    times = timing.fewest(
        {
            "warm": lambda: evaluate()[1],
            "floor": lambda: [forward(*network) for network in dense],
        },
        args.grid_repeats,
    )

    row = functools.partial(Row, case.name, "grid")
    floor = f"floor: {number} dense forward passes one by one", times["floor"]
    padded = sum(
        len(part.members) * family.num_macs(part.job.container) / 1e6 for part in plan.parts
    )
    macs = float(family.num_macs(widths).sum()) / 1e6
    what = "multiply-adds an image at the shapes of the buckets"
    rows = [
        row(f"Evaluator of {number} networks, compiled", times["warm"], *floor),
        row(f"Evaluator of {number} networks, with compilations", cold, *floor),
        row(what, padded, "at the networks' own", macs, "M"),
    ]
    differing = "networks whose number of correct images differs from the floor's"
    return rows, {
        "images": f"{len(images):,} in batches of {len(batches[0][1]):,}",
        "buckets": len(plan.parts),
        "strategy": f"{plan.strategy}: {plan.reason}",
        differing: int(np.sum(num_correct != counts)),
    }


# --- training step ---------------------------------------------------------------------------


@dataclasses.dataclass
class Step:
    """A training step, compiled, and what it is measured against.

    Attributes:
        functions: "step", "bare" and "plain", each of which runs `steps` steps ("bare": one).
        steps: in a call.
        compile_seconds: of each function.
        sizes: the networks of a step.
    """

    functions: dict[str, Callable[[], Any]]
    steps: int
    compile_seconds: dict[str, float]
    sizes: list[ResNetSpec]


def make_step(case: Case) -> Step:
    experiment, family, spec = case.experiment, case.family, case.spec
    recipe, preprocessing = experiment.recipe, experiment.preprocessing
    unroll = jax.default_backend() != "tpu"
    steps = default_steps_per_call()
    images = Images(jnp.asarray(case.dataset.train_images), jnp.asarray(case.dataset.train_labels))
    order = jnp.asarray(np.random.default_rng(0).permutation(len(images.labels)), jnp.int32)
    chunk = (np.int32(0), np.int32(steps), jax.random.key(3), images, order, np.int32(0))
    compile_seconds, functions = {}, {}

    def stateful(name, call, state, *rest):
        """A function that goes on from where it was, because a step donates its state."""
        compile_seconds[name], program = timing.compiled(call, state, *chunk, *rest)
        kept = [state]

        def advance():
            kept[0], metrics, _ = program(kept[0], *chunk, *rest)
            return kept[0], metrics

        functions[name] = advance

    phases = recipe.phases(family, num_images=50_000)
    phase = next(phase for phase in phases if phase.loss)
    prepare = functools.partial(preprocessing.train, num_classes=family.spec.num_classes)
    update = inr_update(family, recipe, phase.program, prepare, family.forward, unroll=unroll)
    call = Steps(update, phase.images_per_step, steps).call
    state = start_phase(case.params, family, recipe, phase)
    inputs = phase_inputs(case.params, family, recipe, phase)
    stateful("step", call, state, case.backbone, inputs)

    network, teacher = cifar_resnet.Network(spec), TeacherRecipe(batch_size=recipe.batch_size)
    update = teacher_update(network, teacher, preprocessing, 10_000)
    state = teacher_init(jax.random.key(4), network, teacher, 10_000)
    stateful("plain", Steps(update, recipe.batch_size, steps).call, state)

    # The shapes that the step runs: where it is written out, its smallest size is dense.
    shapes = phase.sizes.shapes if unroll else [None] * len(phase.sizes)
    sizes = [spec if widths is None else morph(spec, family.blocks, widths) for widths in shapes]
    trees = [
        jax.jit(cifar_resnet.init_params, static_argnums=1)(jax.random.key(10 + n), size)
        for n, size in enumerate(sizes)
    ]
    micro = recipe.micro_batch or recipe.batch_size
    groups = 1 if recipe.share_images else recipe.num_sizes
    count = recipe.batch_size // micro
    shape = (groups, count, micro, spec.image_size, spec.image_size, spec.channels)
    x = jax.random.normal(jax.random.key(5), shape, preprocessing.dtype)
    y = jnp.arange(groups * count * micro).reshape(shape[:3]) % spec.num_classes
    distilled = bool(recipe.distillation_weight) and recipe.distill_from == "teacher"

    def bare(trees, teacher, x, y):
        """Gradients of the losses on logits with respect to weights, nothing else."""

        def loss(tree, size, x, y, targets):
            logits = cifar_resnet.apply(size, tree, x)
            value = recipe.ce_weight * losses.cross_entropy(logits, y)
            if distilled:
                value += recipe.distillation_weight * losses.distillation(
                    logits, targets, temperature=recipe.temperature
                )
            return value

        def gradient(tree, size, group, m, targets):
            return jax.grad(loss)(tree, size, x[group, m], y[group, m], targets[group][m])

        targets: list[list[Any]] = [[None] * count] * groups
        if distilled:
            targets = [[cifar_resnet.apply(spec, teacher, batch) for batch in group] for group in x]
        found = []
        for n, (size, tree) in enumerate(zip(sizes, trees, strict=True)):
            group = 0 if recipe.share_images else n
            grads = [gradient(tree, size, group, m, targets) for m in range(count)]
            found.append(jax.tree.map(lambda *values: sum(values), *grads))
        return found

    compile_seconds["bare"], program = timing.compiled(bare, trees, case.backbone, x, y)
    functions["bare"] = lambda: program(trees, case.backbone, x, y)
    return Step(functions, steps, compile_seconds, sizes)


def measure_step(case: Case) -> Findings:
    step, recipe = make_step(case), case.experiment.recipe
    times = timing.fewest(step.functions, case.args.repeats)
    seconds = times["step"] / step.steps
    what = f"training step, {len(step.sizes)} sizes of {recipe.batch_size} images"
    row = functools.partial(Row, case.name, "step", what, seconds)
    rows = [
        row("its bare forward and backward passes", times["bare"]),
        row("a step of SGD on the network itself", times["plain"] / step.steps),
    ]
    seconds_of = step.compile_seconds.items()
    return rows, {
        **{f"compilation, {name}": f"{value:.1f} s" for name, value in seconds_of},
        "micro-batch": recipe.micro_batch or recipe.batch_size,
        "steps per call": step.steps,
        "multiply-adds of an image, by size": ", ".join(
            f"{size.num_macs / 1e6:.1f} M" for size in step.sizes
        ),
    }


# --- the report ------------------------------------------------------------------------------

MEASURES = {"grid": measure_grid, "step": measure_step}
PARTS = tuple(MEASURES)


def markdown(document: Mapping[str, Any]) -> str:
    """The table and what stands beside it, from the contents of speed.json."""
    cells = [
        {name: row[name] for name in ("network", "part", "what", "against")}
        | {
            "ratio": f"{row['ratio']:.3g}",
            "measured": f"{row['value']:.4g} {row['unit']}",
            "reference": f"{row['reference']:.4g} {row['unit']}",
        }
        for row in document["rows"]
    ]
    blocks = [table(cells, left=4)]
    for part in document["parts"]:
        facts = "\n".join(f"- {name}: {value}" for name, value in part["facts"].items())
        head = f"{part['network']}, {part['part']}, {part['seconds']:.0f} s in all"
        blocks.append(f"{head}:\n\n{facts}")
    commit = document["commit"] or "not a git checkout"
    changes = " with changes" if document["changed"] else ""
    versions = ", ".join(f"{name} {value}" for name, value in document["versions"].items())
    blocks.append(
        f"`{document['command']}`\n\nCommit {commit}{changes}; {document['cores']} CPU cores; "
        f"{versions}; {document['wall_seconds']:.0f} s in all."
    )
    return "\n\n".join(blocks) + "\n"


FLAGS: command_line.Flags = {
    "out": (str, "", "Folder of the results."),
    "networks": (list, list(NETWORKS), "Names with commas between."),
    "parts": (list, list(PARTS), "Names with commas between."),
    "smoke": (bool, False, "Everything, on a tiny network."),
    **{name: (int, None, f"{text}; default {n}.") for name, (n, _, text) in NUMBERS.items()},
}


def parse(argv: Sequence[str]) -> flags.FlagValues:
    """The flags, checked; UsageError for one or a value that cannot be."""
    _, args = command_line.parse(argv, FLAGS, config_required=False)
    check(args.out, "--out=DIR is required; the results go there.")
    for flag, names in (("networks", NETWORKS), ("parts", PARTS)):
        given = getattr(args, flag)
        unknown = ", ".join(name for name in given if name not in names)
        check(not unknown, f"--{flag} must be among {', '.join(names)}, got {unknown}.")
        setattr(args, flag, [name for name in names if name in given])
    if args.smoke:
        args.networks = ["tiny"]
    for name, (default, smoke, _) in NUMBERS.items():
        if getattr(args, name) is None:
            setattr(args, name, smoke if args.smoke else default)
        command_line.check_at_least(args, **{name: min(default, 1)})
    return args


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    # A compilation that is read from a cache would be timed as one.
    jax.config.update("jax_enable_compilation_cache", False)
    started = time.perf_counter()
    document: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/speed.py", *argv[1:]]),
        **provenance.checkout(),
        "versions": provenance.versions(),
        "cores": provenance.num_cores(),
        "rows": [],
        "parts": [],
    }
    for name in args.networks:
        case = make_case(name, args)
        for part in args.parts:
            seconds, (rows, facts) = timing.timed(MEASURES[part], case)
            document["rows"] += [{**dataclasses.asdict(row), "ratio": row.ratio} for row in rows]
            about = {"network": name, "part": part, "seconds": seconds, "facts": facts}
            document["parts"].append(about)
            document["wall_seconds"] = time.perf_counter() - started
            storage.write_json(out / "speed.json", document)
            storage.write_text(out / "speed.md", markdown(document))
            print(f"{name}, {part}: {seconds:.0f} s", flush=True)
    print(f"\n{markdown(document)}\nwrote {out / 'speed.json'} and speed.md")


if __name__ == "__main__":
    run(main)
