"""How fast networks are generated, evaluated and trained, as ratios to what they cannot do without.

    python benchmarks/speed.py --out=DIR
    python benchmarks/speed.py --out=DIR --networks=resnet20 --parts=generation,grid
    python benchmarks/speed.py --out=DIR --smoke

Everything that is compared is measured in one run, in turns, after compilation; a side counts with
its fewest seconds. Images and weights are random, no time depends on them, and no data set is
needed. Networks, INRs and recipes are those of configs/resnet20.py and configs/resnet56.py, in
float32 on CPUs. The parts:

    startup     from the start of train.py to the end of its first step, with an empty and with a
                filled compilation cache
    devices     the training step of train.py with each core of the CPU as a device of its own,
                against all cores as one device
    generation  one network from the default INR, and from the papers' MLPs, against the forward
                pass of that network over 10,000 images
    grid        evaluate_grid of many networks, against the floor, the sum of their dense forward
                passes one by one, and beside the papers' way: full size, masked, one by one
    strategies  loop, map and vmap on networks of one shape, at several batch sizes
    step        a training step, against its bare forward and backward passes and against a step of
                plain SGD on the network itself
    flops       FLOP/s of forward pass and training step, against the machine's matrix product

Writes speed.json and speed.md to --out after each part.
"""

import argparse
import collections
import contextlib
import dataclasses
import datetime
import functools
import importlib.util
import json
import os
import pathlib
import re
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from neumeta_jax import (
    checkpoint,
    data,
    evaluation,
    experiment as lab,
    hypernetwork as hyper,
    losses,
    resnet,
    training,
)
from neumeta_jax.architecture import ResNetSpec, cifar_resnet, morph
from neumeta_jax.command_line import UsageError, run
from neumeta_jax.hypernetwork import Hypernetwork
from neumeta_jax.inr import INR, PerTensorMLP, describe_inr
from neumeta_jax.resnet import Params

ROOT = pathlib.Path(__file__).resolve().parent.parent
TRAIN = ROOT / "train.py"
CONFIGS = {"resnet20": "resnet20.py", "resnet56": "resnet56.py", "tiny": "resnet20.py"}
PARTS = ("startup", "devices", "generation", "grid", "strategies", "step", "flops")
TEST_IMAGES = 10_000
PAPERS_INR = PerTensorMLP(hidden_width=256, num_layers=4, num_frequencies=16, activation="relu")
PAPERS_SAMPLES = 100
STARTUP_TARGET = 6.0
NUM_CLASSES = 100
MIB = 2**20

# Flags of numbers: default, value of --smoke, smallest value, what it says.
NUMBERS = {
    "repeats": (5, 1, 1, "times that everything but the grid is measured"),
    "batch_size": (1000, 16, 1, "images of a forward pass"),
    "num_networks": (64, 4, 1, "of the grid, all different"),
    "num_images": (2000, 24, 1, "of the grid"),
    "grid_repeats": (2, 1, 1, "times that the grid is measured"),
    "floor_networks": (0, 3, 0, "of the grid that the floor compiles and measures, 0 for all; "
                                "scaled by multiply-adds to all of them"),
    "papers_networks": (3, 1, 1, "evaluated the papers' way; scaled to num_networks"),
    "papers_samples": (5, 2, 1, "of the papers' 100 noisy samples that are drawn; scaled"),
    "strategy_networks": (4, 2, 2, "of one shape"),
    "map_images": (8, 2, 1, "on which map is measured on a CPU, where it is slow"),
    "train_batch": (0, 4, 0, "images of a training step, 0 for the config's"),
    "micro_batch": (-1, 0, -1, "of a training step, 0 for none, -1 for the config's"),
    "startup_images": (50_000, 200, 10, "in the data set that train.py loads"),
    "startup_repeats": (2, 1, 1, "starts with a filled compilation cache"),
    "device_steps": (30, 5, 3, "of each training with one and several devices"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table: `value` against `reference`, both in `unit`.

    `target` is the largest ratio that was asked for, None where nothing was.
    """

    network: str
    part: str
    what: str
    against: str
    value: float
    reference: float
    unit: str = "s"
    target: float | None = None

    @property
    def ratio(self) -> float:
        return self.value / self.reference


@dataclasses.dataclass
class Findings:
    """What a part found: lines of the table, and what is no ratio."""

    rows: list[Row] = dataclasses.field(default_factory=list)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


# --- measuring -------------------------------------------------------------------------------


def take_turns(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Fewest seconds of each function over `rounds`, after a first call of each that is not timed.

    The functions return what is to be waited for. Every second round goes backwards, so that a
    machine that becomes slower or faster favours none.
    """
    for function in functions.values():
        jax.block_until_ready(function())
    times = collections.defaultdict(list)
    for number in range(rounds):
        for name in list(functions)[:: -1 if number % 2 else 1]:
            times[name].append(timed(functions[name]))
    return {name: min(times[name]) for name in functions}


def timed(function: Callable, *args: Any) -> float:
    started = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - started


def compiled(function: Any, *args: Any) -> tuple[Any, float]:
    """`function`, jitted or not, compiled for `args`, and the seconds that this took."""
    started = time.perf_counter()
    jitted = function if hasattr(function, "lower") else jax.jit(function)
    return jitted.lower(*args).compile(), time.perf_counter() - started


@functools.cache
def compilations() -> list[tuple[str, float]]:
    """(name, seconds) of each program that XLA compiles, from the first call on."""
    found: list[tuple[str, float]] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append((str(kwargs.get("fun_name", "?")), duration_secs))

    jax.monitoring.register_event_duration_secs_listener(listen)
    return found


def temporary_bytes(program: Any) -> int:
    """Memory of a compiled program besides its arguments and results; 0 where it is not known."""
    with contextlib.suppress(Exception):  # not every backend has it
        return int(program.memory_analysis().temp_size_in_bytes)
    return 0


def reset_peak_memory() -> bool:
    """Lets the process's maximum resident set start anew; only Linux can."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory(part: str, reset: bool) -> dict[str, str]:
    """The largest resident set, and the devices' own count where they keep one."""
    outside = part in OUTSIDE
    who = resource.RUSAGE_CHILDREN if outside else resource.RUSAGE_SELF
    unit = 1 if sys.platform == "darwin" else 1024
    size = resource.getrusage(who).ru_maxrss * unit / MIB
    note = "" if reset or outside else " (since the process started)"
    found = {"peak resident memory": f"{size:,.0f} MiB{note}"}
    if not outside:  # which leaves the devices to train.py
        peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.devices()]
        if any(peaks):
            peak = max(filter(None, peaks)) / MIB
            found["peak device memory"] = f"{peak:,.0f} MiB (since the process started)"
    return found


# --- what is measured ------------------------------------------------------------------------


def load_config(network: str) -> dict[str, Any]:
    """The config of a network as nested dicts."""
    path = ROOT / "configs" / CONFIGS[network]
    spec = importlib.util.spec_from_file_location("speed_config", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config().to_dict()
    if network == "tiny":
        config["network"] |= {"depth": 14, "stage_widths": (4, 6, 8)}
    return config


def image_size(network: str) -> int:
    return 8 if network == "tiny" else 32


def random_images(rng: np.random.Generator, number: int, size: int) -> tuple[Any, Any]:
    """uint8[number, size, size, 3] and labels of all classes where there are enough."""
    images = rng.integers(0, 256, (number, size, size, 3), np.uint8)
    return images, np.arange(number, dtype=np.int32) % NUM_CLASSES


@dataclasses.dataclass
class Case:
    """A network with the INR and the recipe of its config, and random data for it."""

    name: str
    args: argparse.Namespace
    experiment: lab.Experiment
    dataset: data.Dataset
    backbone: Params

    @property
    def family(self) -> Hypernetwork:
        return self.experiment.hypernetwork

    @property
    def spec(self) -> ResNetSpec:
        return self.experiment.spec

    def target(self, **targets: float) -> float | None:
        """What was asked for of this network, if anything was."""
        return targets.get(self.name)

    @functools.cached_property
    def params(self) -> Params:
        """Those of the config's INR, as they are at the first step."""
        return init_params(self.family, self.backbone, self.experiment.recipe)

    @functools.cached_property
    def forward(self) -> tuple[Callable[[], Any], float]:
        """The full-size network on `batch_size` images, and the seconds of its compilation."""
        shape = (self.args.batch_size, *self.dataset.train_images.shape[1:])
        images = jax.random.normal(jax.random.key(1), shape, self.experiment.preprocessing.dtype)
        program, seconds = compiled(
            lambda params, x: resnet.apply(self.spec, params, x), self.backbone, images
        )
        return lambda: program(self.backbone, images), seconds

    @functools.cached_property
    def step(self) -> "Step":
        return make_step(self)


def make_case(name: str, args: argparse.Namespace) -> Case:
    config = load_config(name)
    config["dtype"] = "float32" if jax.default_backend() == "cpu" else config["dtype"]
    recipe = config["train"]
    if args.train_batch:
        recipe["batch_size"] = args.train_batch
    if args.micro_batch >= 0:
        recipe["micro_batch"] = args.micro_batch
    sizes = 1 if recipe["share_images"] else 1 + recipe["num_random_sizes"]
    per_call = recipe["batch_size"] * sizes * training.default_steps_per_call()
    rng = np.random.default_rng(0)
    train = random_images(rng, max(per_call, NUM_CLASSES), image_size(name))
    test = random_images(rng, args.num_images, image_size(name))
    dataset = data.make_dataset(config["data"]["name"], *train, *test, num_classes=NUM_CLASSES)
    experiment = lab.from_config(config, dataset)
    backbone = jax.jit(resnet.init_params, static_argnums=1)(jax.random.key(0), experiment.spec)
    return Case(name, args, experiment, dataset, backbone)


def init_params(family: Hypernetwork, backbone: Params, recipe: training.InrRecipe) -> Params:
    """The INR at the backbone's weights where it has a closed form, else at random.

    Second moments are those of channels that correlate by a half.
    """
    moments = None
    if family.inr.needs_moments:
        widths = {family.spec.blocks[n].name: family.spec.hidden_widths[n] for n in family.blocks}
        moments = {name: 0.5 * (np.eye(w + 1) + 1).astype("f") for name, w in widths.items()}
    init = functools.partial(
        hyper.init, alpha=recipe.alpha_init, from_backbone=family.inr.needs_moments
    )
    return jax.jit(init, static_argnums=1)(jax.random.key(0), family, backbone, moments=moments)


def is_noisy(inr: INR) -> bool:
    """Whether samples that are drawn with a key differ, so that averaging them means something."""
    fields = describe_inr(inr)
    return fields.get("noise_scale", 0) > 0 or fields.get("max_cell", 1) > 1


def draw_widths(family: Hypernetwork, number: int) -> np.ndarray:
    """int32[number, blocks] of width ratios uniform in [0.25, 1], no two rows equal.

    Ratios that round to a network that is there are drawn again, because `evaluate_grid` evaluates
    equal networks once; fewer rows where the family has no more.
    """
    rng = np.random.default_rng(0)
    rows: dict[tuple[int, ...], None] = {}
    for _ in range(1000 * number):
        if len(rows) == number:
            break
        rows[tuple(family.widths(rng.uniform(0.25, 1.0)).tolist())] = None
    return np.array(list(rows), np.int32)


# --- generation ------------------------------------------------------------------------------


def measure_generation(case: Case) -> Findings:
    found = Findings()
    forward, seconds = case.forward
    found.facts["compilation, forward pass"] = f"{seconds:.1f} s"
    functions = {"forward": forward}
    kinds = {"default INR": case.family.inr, "papers' INR, an MLP per tensor": PAPERS_INR}
    for label, inr in kinds.items():
        family = dataclasses.replace(case.family, inr=inr)
        recipe = case.experiment.recipe
        params = case.params if inr == case.family.inr else init_params(
            family, case.backbone, recipe
        )  # fmt: skip
        widths = jnp.asarray(family.widths(0.75))
        program, seconds = compiled(
            lambda p, w, family=family: hyper.generate(family, p, w), params, widths
        )
        functions[label] = functools.partial(program, params, widths)
        found.facts[f"compilation, {label}"] = f"{seconds:.1f} s"
        found.facts[f"parameters, {label}"] = f"{hyper.num_inr_params(params):,}"
    times = take_turns(functions, case.args.repeats)
    batch = case.args.batch_size
    found.facts["forward pass"] = (
        f"full size, {batch:,} images measured and scaled to {TEST_IMAGES:,}"
    )
    targets = (case.target(resnet56=0.01), case.target(resnet56=0.03))
    for label, target in zip(kinds, targets, strict=True):
        found.rows.append(
            Row(
                case.name,
                "generation",
                f"one network from the {label}",
                f"its forward pass over {TEST_IMAGES:,} images",
                times[label],
                times["forward"] * TEST_IMAGES / batch,
                target=target,
            )
        )
    return found


# --- grid ------------------------------------------------------------------------------------


def measure_grid(case: Case) -> Findings:
    args, family, spec = case.args, case.family, case.spec
    preprocessing = case.experiment.preprocessing
    images, labels = case.dataset.test_images, case.dataset.test_labels
    widths = draw_widths(family, args.num_networks)
    number = len(widths)

    def grid():
        return evaluation.evaluate_grid(
            family, case.params, widths, images, labels, preprocessing, batch_size=args.batch_size
        )

    jax.block_until_ready(case.params)
    before = len(compilations())
    started = time.perf_counter()
    result = grid()
    cold = time.perf_counter() - started
    programs = compilations()[before:]

    # The floor: dense trees that are ready, images on the device, batches as `evaluate_grid` has
    # them, and nothing but forward passes.
    num_batches = -(-len(images) // args.batch_size)
    batches = [
        jax.device_put(pair)
        for pair in zip(
            np.array_split(images, num_batches), np.array_split(labels, num_batches), strict=True
        )
    ]

    @functools.partial(jax.jit, static_argnums=0)
    def count(spec, tree, images, labels):
        logits = resnet.apply(spec, tree, preprocessing.evaluate(images))
        return jnp.sum(jnp.argmax(logits, axis=-1) == labels)

    def forward(spec, tree):
        return sum(int(n) for n in [count(spec, tree, *batch) for batch in batches])

    generate = jax.jit(lambda params, row: hyper.generate(family, params, row))
    macs = np.array([morph(spec, family.blocks, row).num_macs for row in widths.tolist()])
    chosen = evenly_spaced(np.argsort(macs), args.floor_networks or number)
    dense = []
    for n in chosen:
        tree = jax.device_get(generate(case.params, jnp.asarray(widths[n])))
        small, tree = resnet.slice_params(spec, tree, family.blocks, widths[n].tolist())
        dense.append((small, jax.device_put(tree)))
    counts = [forward(*network) for network in dense]  # compiles
    scale = macs.sum() / macs[chosen].sum()

    papers = {
        "default INR": family,
        "papers' INR": dataclasses.replace(family, inr=PAPERS_INR),
    }
    samplers = {label: make_sampler(case, family) for label, family in papers.items()}
    full = [
        jax.block_until_ready(generate(case.params, jnp.asarray(widths[n])))
        for n in evenly_spaced(np.argsort(macs), args.papers_networks)
    ]
    forward(spec, full[0])

    times = collections.defaultdict(list)
    half = len(dense) // 2
    for _ in range(args.grid_repeats):
        first = timed(lambda: [forward(*network) for network in dense[:half]])
        times["warm"].append(timed(grid))
        second = timed(lambda: [forward(*network) for network in dense[half:]])
        times["floor"].append((first + second) * float(scale))
        times["masked"].append(timed(lambda: [forward(spec, t) for t in full]) / len(full))
        for label, (sample, factor) in samplers.items():
            times[label].append(timed(sample) * factor)
    fewest = {name: min(values) for name, values in times.items()}

    found = Findings()
    floor = f"floor: {number} dense forward passes one by one"

    def add(what, value, against=floor, reference=fewest["floor"], **more):
        found.rows.append(Row(case.name, "grid", what, against, value, reference, **more))

    warm = f"evaluate_grid of {number} networks, compiled"
    add(warm, fewest["warm"], target=case.target(resnet20=1.25))
    add(f"evaluate_grid of {number} networks, with compilations", cold)
    for label in samplers:
        samples = PAPERS_SAMPLES if is_noisy(papers[label].inr) else 1
        value = number * (fewest[label] + fewest["masked"])
        what = f"papers' way, {label}, {samples} sample{'s' if samples > 1 else ''} a network"
        add(what, value)
        add(what, value, warm, fewest["warm"])
    padded = sum(
        len(b.members) * morph(spec, family.blocks, b.container).num_macs for b in result.buckets
    )
    add(
        "multiply-adds an image at the shapes of the buckets",
        padded / 1e6,
        "at the networks' own",
        float(macs.sum()) / 1e6,
        unit="M",
    )
    names = collections.Counter(name for name, _ in programs)
    found.facts |= {
        "images": f"{len(images):,} in batches of {len(batches[0][1]):,}",
        "buckets": len(result.buckets),
        "programs compiled": ", ".join(f"{n} {name}" for name, n in sorted(names.items())),
        "compilation": f"{sum(seconds for _, seconds in programs):.1f} s in XLA",
        "strategy": f"{result.strategy}: {result.reason}",
        "floor": f"{len(dense)} of {number} networks measured"
        + (", scaled by multiply-adds" if len(dense) < number else ""),
        "papers' way": f"{len(full)} networks measured, scaled; of {PAPERS_SAMPLES} samples "
        f"{min(args.papers_samples, PAPERS_SAMPLES)}",
        "networks whose number of correct images differs from the floor's": int(
            np.sum(result.num_correct[chosen] != counts)
        ),
    }
    return found


def evenly_spaced(order: np.ndarray, number: int) -> np.ndarray:
    """`number` entries of `order`, spread over it, or all where there are no more."""
    places = (np.arange(number) + 0.5) * len(order) / number
    return order[np.unique(places.astype(int))] if number < len(order) else order


def make_sampler(case: Case, family: Hypernetwork) -> tuple[Callable[[], Any], float]:
    """Generation of a network as the papers do it, compiled, and the factor on its seconds.

    Where the INR has noise, a few of the 100 samples are drawn.
    """
    params = case.params
    if family.inr != case.family.inr:
        params = init_params(family, case.backbone, case.experiment.recipe)
    samples, key = 1, None
    if is_noisy(family.inr):
        samples, key = min(case.args.papers_samples, PAPERS_SAMPLES), jax.random.key(2)
    widths = jnp.asarray(family.widths(0.75))
    program, _ = compiled(
        lambda p, w, k: hyper.generate(family, p, w, key=k, num_samples=samples),
        params,
        widths,
        key,
    )
    jax.block_until_ready(program(params, widths, key))
    factor = PAPERS_SAMPLES / samples if key is not None else 1.0
    return lambda: program(params, widths, key), factor


# --- strategies ------------------------------------------------------------------------------


def one_bucket(family: Hypernetwork, number: int) -> np.ndarray:
    """int32[number, blocks]: different networks about three quarters as wide as the full one."""
    rows = np.tile(family.widths(0.75), (number, 1))
    for n in range(1, number):
        rows[n, n % rows.shape[1]] -= n // rows.shape[1] + 1
    return np.unique(np.maximum(rows, 1), axis=0)


def measure_strategies(case: Case) -> Findings:
    args = case.args
    on_cpu = jax.default_backend() == "cpu"
    sizes = args.batch_sizes or ([256] if on_cpu else [256, 1000, 2500, 10_000])
    widths = one_bucket(case.family, args.strategy_networks)
    size = case.spec.image_size
    images, labels = random_images(np.random.default_rng(0), max(sizes), size)
    found = Findings()
    found.facts["networks"] = f"{len(widths)} of one shape; whole calls, generation included"

    def measure(strategies, number, batch_size):
        def call(strategy):
            return evaluation.evaluate_grid(
                case.family,
                case.params,
                widths,
                images[:number],
                labels[:number],
                case.experiment.preprocessing,
                strategy=strategy,
                max_buckets=1,
                batch_size=batch_size,
            )

        functions = {}
        for strategy in strategies:
            try:
                call(strategy)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                found.facts[f"{strategy}, batches of {batch_size:,}"] = "out of memory"
            else:
                functions[strategy] = functools.partial(call, strategy)
        times = take_turns(functions, args.repeats)
        for strategy, seconds in times.items():
            speed = f"{len(widths) * number / seconds:,.0f} images/s"
            found.facts[f"{strategy}, batches of {batch_size:,}, {number:,} images"] = speed
            if strategy != "loop" and "loop" in times:
                found.rows.append(
                    Row(
                        case.name,
                        "strategies",
                        f"{strategy}, {number:,} images in batches of {batch_size:,}",
                        "loop",
                        seconds,
                        times["loop"],
                    )
                )
        return times

    loops = {}
    for batch_size in sizes:
        strategies = ("loop", "vmap") if on_cpu else ("loop", "map", "vmap")
        loops[batch_size] = measure(strategies, max(sizes), batch_size).get("loop")
    if on_cpu:
        measure(("loop", "map"), min(args.map_images, max(sizes)), args.map_images)
    first, *others = sizes
    for batch_size in others:
        if loops[batch_size] and loops[first]:
            found.rows.append(
                Row(
                    case.name,
                    "strategies",
                    f"loop, {max(sizes):,} images in batches of {batch_size:,}",
                    f"loop in batches of {first:,}",
                    loops[batch_size],
                    loops[first],
                )
            )
    return found


# --- training step ---------------------------------------------------------------------------


@dataclasses.dataclass
class Step:
    """A training step, compiled, and what it is measured against.

    Attributes:
        functions: "step", "bare" and "plain", each of which runs `steps` steps ("bare": one).
        steps: in a call.
        macs: multiply-adds of the forward and backward passes of a step, at the shapes they run in.
        compile_seconds, temporary: of each function.
        sizes: the networks of a step.
    """

    functions: dict[str, Callable[[], Any]]
    steps: int
    macs: int
    compile_seconds: dict[str, float]
    temporary: dict[str, int]
    sizes: list[ResNetSpec]


def make_step(case: Case) -> Step:
    experiment, family, spec = case.experiment, case.family, case.spec
    recipe, preprocessing = experiment.recipe, experiment.preprocessing
    unroll = jax.default_backend() == "cpu"
    steps = training.default_steps_per_call()
    images = training.Images(
        jnp.asarray(case.dataset.train_images), jnp.asarray(case.dataset.train_labels)
    )
    order = jnp.asarray(np.random.default_rng(0).permutation(len(images.labels)), jnp.int32)
    chunk = (np.int32(0), np.int32(steps), jax.random.key(3), images, order, np.int32(0))

    def stateful(call, state, *rest):
        """A function that goes on from where it was, because a step donates its state."""
        program, seconds = compiled(call, state, *chunk, *rest)
        kept = [state]

        def advance():
            state, metrics, _ = program(kept[0], *chunk, *rest)
            kept[0] = state
            return state, metrics

        return advance, program, seconds

    phase = next(
        phase
        for phase in training.phases(family, recipe, num_images=50_000)
        if phase.kind == "train"
    )
    update = training.inr_update(family, recipe, preprocessing, unroll=unroll)
    call = training.chunked(update, images_per_step=recipe.images_per_step, steps_per_call=steps)
    state = training.start_phase(case.params, family, recipe, phase)
    inputs = training.phase_inputs(family, recipe, phase)
    step, step_program, step_seconds = stateful(call, state, case.backbone, inputs)

    teacher_recipe = training.TeacherRecipe(batch_size=recipe.batch_size)
    plain_update = training.teacher_update(spec, teacher_recipe, preprocessing, 10_000)
    plain_call = training.chunked(
        plain_update, images_per_step=recipe.batch_size, steps_per_call=steps
    )
    plain_state = training.teacher_init(jax.random.key(4), spec, teacher_recipe, 10_000)
    plain, plain_program, plain_seconds = stateful(plain_call, plain_state)

    # The shapes that the step runs: where it is written out, its smallest size is dense.
    sizes = [spec] * recipe.num_sizes
    if unroll and recipe.sandwich and recipe.num_random_sizes and recipe.mode == "at_once":
        sizes[1] = morph(spec, family.blocks, training.smallest_widths(family, recipe))
    trees = [
        jax.jit(resnet.init_params, static_argnums=1)(jax.random.key(10 + n), size)
        for n, size in enumerate(sizes)
    ]
    micro = recipe.micro_batch or recipe.batch_size
    groups = 1 if recipe.share_images else recipe.num_sizes
    count = recipe.batch_size // micro
    shape = (groups, count, micro, spec.image_size, spec.image_size, spec.channels)
    x = jax.random.normal(jax.random.key(5), shape, preprocessing.dtype)
    y = jnp.arange(groups * count * micro).reshape(shape[:3]) % spec.num_classes

    def bare(trees, teacher, x, y):
        """Gradients of the losses on logits with respect to weights, nothing else."""

        def loss(tree, size, x, y, targets):
            logits = resnet.apply(size, tree, x)
            value = recipe.ce_weight * losses.cross_entropy(logits, y)
            if targets is not None:
                value += recipe.distillation_weight * losses.distillation(
                    logits, targets, temperature=recipe.temperature
                )
            return value

        targets: list[list[Any]] = [[None] * count] * groups
        if recipe.distillation_weight and recipe.distill_from == "teacher":
            targets = [
                [resnet.apply(spec, teacher, x[g, m]) for m in range(count)] for g in range(groups)
            ]
        found = []
        for n, (size, tree) in enumerate(zip(sizes, trees, strict=True)):
            g = 0 if recipe.share_images else n
            grads = [
                jax.grad(loss)(tree, size, x[g, m], y[g, m], targets[g][m]) for m in range(count)
            ]
            found.append(jax.tree.map(lambda *values: sum(values), *grads))
        return found

    bare_program, bare_seconds = compiled(bare, trees, case.backbone, x, y)
    passes = 3 * sum(size.num_macs for size in sizes) * recipe.batch_size
    if recipe.distillation_weight and recipe.distill_from == "teacher":
        passes += spec.num_macs * recipe.batch_size * groups
    programs = {"step": step_program, "bare": bare_program, "plain": plain_program}
    return Step(
        functions={
            "step": step,
            "bare": lambda: bare_program(trees, case.backbone, x, y),
            "plain": plain,
        },
        steps=steps,
        macs=passes,
        compile_seconds={"step": step_seconds, "bare": bare_seconds, "plain": plain_seconds},
        temporary={name: temporary_bytes(program) for name, program in programs.items()},
        sizes=sizes,
    )


def measure_step(case: Case) -> Findings:
    step, recipe = case.step, case.experiment.recipe
    times = take_turns(step.functions, case.args.repeats)
    seconds = times["step"] / step.steps
    what = f"training step, {len(step.sizes)} sizes of {recipe.batch_size} images"
    bare = "its bare forward and backward passes"
    row = functools.partial(Row, case.name, "step")
    target = case.target(resnet20=1.5, resnet56=1.5)
    found = Findings()
    found.rows += [
        row(what, bare, seconds, times["bare"], target=target),
        row(what, "a step of SGD on the network itself", seconds, times["plain"] / step.steps),
    ]
    if step.temporary["step"] and step.temporary["bare"]:
        memory = (step.temporary[name] / MIB for name in ("step", "bare"))
        found.rows.append(row("temporary memory of the step", bare, *memory, unit="MiB"))
    for name, value in step.compile_seconds.items():
        found.facts[f"compilation, {name}"] = f"{value:.1f} s"
    found.facts["micro-batch"] = recipe.micro_batch or recipe.batch_size
    found.facts["steps per call"] = step.steps
    found.facts["multiply-adds of an image, by size"] = ", ".join(
        f"{size.num_macs / 1e6:.1f} M" for size in step.sizes
    )
    return found


# --- FLOP/s ----------------------------------------------------------------------------------


def measure_flops(case: Case) -> Findings:
    on_cpu = jax.default_backend() == "cpu"
    dtypes = dict.fromkeys(("float32", case.experiment.preprocessing.dtype))
    lengths = (512, 1024, 2048) if on_cpu else (2048, 4096, 8192)
    if case.name == "tiny":
        lengths = (64, 128)
    functions: dict[str, Callable[[], Any]] = {}
    flops: dict[str, float] = {}
    multiply = jax.jit(jnp.matmul)
    for dtype in dtypes:
        for n in lengths:
            matrix = jax.random.normal(jax.random.key(6), (n, n), dtype)
            functions[f"{dtype} {n}"] = functools.partial(multiply, matrix, matrix)
            flops[f"{dtype} {n}"] = 2.0 * n**3
    forward, _ = case.forward
    functions |= {"forward": forward, "step": case.step.functions["step"]}
    flops["forward"] = 2.0 * case.spec.num_macs * case.args.batch_size
    flops["step"] = 2.0 * case.step.macs * case.step.steps
    times = take_turns(functions, case.args.repeats)
    rates = {name: flops[name] / seconds / 1e9 for name, seconds in times.items()}
    best = {
        dtype: max((rates[f"{dtype} {n}"], f"{dtype} {n} x {n}") for n in lengths)
        for dtype in dtypes
    }
    rate, name = best[case.experiment.preprocessing.dtype]
    row = functools.partial(Row, case.name, "flops", against=f"matrix product, {name}")
    found = Findings()
    found.rows += [
        row(what, value=value, reference=rate, unit="GFLOP/s")
        for what, value in (
            (f"forward pass of {case.args.batch_size:,} images", rates["forward"]),
            ("forward and backward passes in a training step", rates["step"]),
        )
    ]
    for dtype, (value, _) in best.items():
        found.facts[f"matrix product, {dtype}"] = f"{value:,.0f} GFLOP/s"
    found.facts["counted"] = (
        "2 FLOPs a multiply-add, a backward pass as two forward passes, at the shapes that run"
    )
    return found


# --- start-up --------------------------------------------------------------------------------


def ends_a_step(line: str) -> bool:
    """Whether a line of train.py says that a training step has ended."""
    return re.search(r"\| step [1-9]\d*/\d+ \| ", line) is not None


def seconds_of_steps(
    command: Sequence[str], environment: Mapping[str, str], *, limit: float = 3600.0
) -> Generator[float]:
    """Seconds from the start of a process to each of its lines that `ends_a_step`.

    The process is stopped when no more are asked for.

    Raises:
        UsageError: if it ends before.
    """
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**environment, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    timer = threading.Timer(limit, process.kill)
    timer.start()
    last = "nothing"
    try:
        assert process.stdout
        for line in process.stdout:
            if ends_a_step(line):
                yield time.perf_counter() - started
            last = line.strip() or last
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()
    raise UsageError(f"{command[1]} must reach a training step, but it ended with {last!r}.")


def seconds_to_first_step(
    command: Sequence[str], environment: Mapping[str, str], *, limit: float = 3600.0
) -> float:
    """The first of `seconds_of_steps`."""
    with contextlib.closing(seconds_of_steps(command, environment, limit=limit)) as steps:
        return next(steps)


def ask_for_platform() -> str:
    """The platform that JAX finds, asked of another process, so that this one holds no device."""
    program = "import jax; print(jax.default_backend())"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    return result.stdout.strip() or "cpu"


def startup_arguments(name: str, args: argparse.Namespace, folder: pathlib.Path) -> list[str]:
    """Arguments of train.py for the config of a network on random images in `folder`."""
    config = load_config(name)
    number = args.startup_images
    path = folder / f"{config['data']['name']}.npz"
    if not path.exists():
        images, labels = random_images(np.random.default_rng(0), number, image_size(name))
        few = max(1, number // 10)
        np.savez(
            path,
            train_images=images,
            train_labels=labels,
            test_images=images[:few],
            test_labels=labels[:few],
        )
    network = config["network"]
    found = [
        f"--config={ROOT / 'configs' / CONFIGS[name]}",
        f"--config.data.dir={path}",
        f"--config.data.num_validation={number // 10}",
        f"--config.network.depth={network['depth']}",
        f"--config.network.stage_widths={tuple(network['stage_widths'])}",
        "--config.log_every=1",
    ]
    if ask_for_platform() == "cpu":
        found.append("--config.dtype=float32")
    if args.train_batch:
        found.append(f"--config.train.batch_size={args.train_batch}")
    if args.micro_batch >= 0:
        found.append(f"--config.train.micro_batch={args.micro_batch}")
    return found


def write_backbone(name: str, args: argparse.Namespace, workdir: pathlib.Path) -> None:
    """A prepared teacher with random weights, without a device."""
    config = load_config(name)
    spec = cifar_resnet(
        config["network"]["depth"],
        num_classes=NUM_CLASSES,
        stage_widths=tuple(config["network"]["stage_widths"]),
        image_size=image_size(name),
        shortcut=config["network"]["shortcut"],
    )
    rng = np.random.default_rng(0)

    def draw(shape):
        fan_in = float(np.prod(shape[:-1]))
        scale = (2 / fan_in) ** 0.5 if len(shape) > 1 else 0.0
        return (scale * rng.normal(size=shape)).astype(np.float32)

    tree = jax.tree.map(draw, resnet.param_shapes(spec), is_leaf=lambda x: isinstance(x, tuple))
    workdir.mkdir(parents=True)
    checkpoint.save_tree(workdir / lab.BACKBONE_FILE, tree, {"spec": spec.to_dict(), "report": {}})


def child_environment(cache: pathlib.Path) -> dict[str, str]:
    """That of a train.py of this checkout, which keeps its compilations in `cache`."""
    old = [entry for entry in [os.environ.get("PYTHONPATH")] if entry]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *old]),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
    }


def measure_devices(name: str, args: argparse.Namespace) -> Findings:
    found = Findings()
    batch = args.train_batch or load_config(name)["train"]["batch_size"]
    several = max(n for n in range(1, lab.num_cores() + 1) if batch % n == 0)
    if several == 1 or ask_for_platform() != "cpu":
        found.facts["not measured"] = "needs a CPU as JAX's platform and two cores"
        return found
    seconds: dict[int, list[float]] = {1: [], several: []}
    with tempfile.TemporaryDirectory(prefix="neumeta-jax-speed-") as temporary:
        folder = pathlib.Path(temporary)
        arguments = startup_arguments(name, args, folder)
        environment = child_environment(folder / "cache")
        for number, count in enumerate((1, several, several, 1)):
            workdir = folder / f"run{number}"
            write_backbone(name, args, workdir)
            line = [sys.executable, str(TRAIN), f"--workdir={workdir}", *arguments]
            environment["JAX_NUM_CPU_DEVICES"] = str(count)
            with contextlib.closing(seconds_of_steps(line, environment)) as steps:
                ends = [next(steps) for _ in range(args.device_steps)]
            seconds[count].append(statistics.median(np.diff(ends)))
    what, reference = f"training step on {several} CPU devices", "on one CPU device"
    row = Row(name, "devices", what, reference, min(seconds[several]), min(seconds[1]))
    found.rows.append(row)
    found.facts["medians"] = "; ".join(
        f"{count}: " + ", ".join(f"{value:.3f} s" for value in values)
        for count, values in seconds.items()
    )
    found.facts["counted"] = (
        f"from the end of one step to that of the next, {args.device_steps} steps of train.py, "
        "each number of devices twice"
    )
    return found


def measure_startup(name: str, args: argparse.Namespace) -> Findings:
    found = Findings()
    with tempfile.TemporaryDirectory(prefix="neumeta-jax-speed-") as temporary:
        folder = pathlib.Path(temporary)
        cache = folder / "cache"
        given = shlex.split(args.startup_args)
        command = given or startup_arguments(name, args, folder)
        environment = child_environment(cache)
        seconds = []
        for number in range(1 + args.startup_repeats):
            workdir = folder / f"run{number}"
            if not given:
                write_backbone(name, args, workdir)
                if number and (folder / "run0" / lab.MOMENTS_FILE).exists():
                    shutil.copy(folder / "run0" / lab.MOMENTS_FILE, workdir)
            line = [sys.executable, str(TRAIN), f"--workdir={workdir}", *command]
            seconds.append(seconds_to_first_step(line, environment))
        files = [path for path in cache.rglob("*") if path.is_file()]
        found.facts["compilation cache"] = (
            f"{len(files)} files, {sum(path.stat().st_size for path in files) / MIB:.1f} MiB"
        )
    cold, *others = seconds
    warm = min(others)
    row = functools.partial(Row, name, "startup", "first training step, filled cache")
    target = None if name == "tiny" or given else 1.0
    found.rows += [
        row("first training step, empty cache", warm, cold),
        row(f"{STARTUP_TARGET:g} s", warm, STARTUP_TARGET, target=target),
    ]
    found.facts["first steps"] = "empty cache {:.1f} s, filled {}".format(
        cold, ", ".join(f"{value:.1f} s" for value in others)
    )
    found.facts["counted"] = (
        "from the start of the process to the end of the first step"
        if given
        else "from the start of the process to the end of the INR's first step: imports, "
        f"{args.startup_images:,} images read; the teacher is there, and after the first start "
        "the moments of its activations"
    )
    return found


# --- the report ------------------------------------------------------------------------------

OUTSIDE = {"startup": measure_startup, "devices": measure_devices}  # in processes of their own
MEASURES = {
    "generation": measure_generation,
    "grid": measure_grid,
    "strategies": measure_strategies,
    "step": measure_step,
    "flops": measure_flops,
}


def markdown(document: Mapping[str, Any]) -> str:
    """The table and what stands beside it, from the contents of speed.json."""
    header = ("network", "part", "what", "against", "ratio", "target", "measured", "reference")
    lines = [header, ("---",) * 4 + ("---:",) * 4]
    for row in document["rows"]:
        target = "" if row["target"] is None else f"<= {row['target']:g}"
        lines.append(
            (
                *(row[name] for name in ("network", "part", "what", "against")),
                f"{row['ratio']:.3g}",
                target,
                f"{row['value']:.4g} {row['unit']}",
                f"{row['reference']:.4g} {row['unit']}",
            )
        )
    blocks = ["\n".join(f"| {' | '.join(line)} |" for line in lines)]
    for part in document["parts"]:
        facts = "\n".join(f"- {name}: {value}" for name, value in part["facts"].items())
        blocks.append(
            f"{part['network']}, {part['part']}, {part['seconds']:.0f} s in all:\n\n{facts}"
        )
    versions = document["versions"]
    packages = ", ".join(f"{k} {v}" for k, v in versions.items() if k != "devices")
    commit = document["commit"] or "not a git checkout"
    changes = " with changes" if document["changed"] else ""
    load = document["load"]
    blocks.append(
        f"`{document['command']}`\n\nCommit {commit}{changes}; {versions.get('devices', '')}, "
        f"{document['cores']} CPU cores; {packages}; {document['started']}, "
        f"{document['wall_seconds']:.0f} s in all. Processes ready to run, a minute's mean: "
        f"{load[0]:.1f} at the start, {load[1]:.1f} at the end, of which this is one or more."
    )
    return "\n\n".join(blocks) + "\n"


class Report:
    """speed.json and speed.md, as far as they are."""

    def __init__(self, out: pathlib.Path, argv: Sequence[str]):
        self.out = out
        self.clock = time.perf_counter()
        self.document: dict[str, Any] = {
            "command": shlex.join(["python", "benchmarks/speed.py", *argv]),
            **lab.checkout(),
            "versions": {},
            "cores": lab.num_cores(),
            "load": [os.getloadavg()[0]] * 2,
            "started": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "wall_seconds": 0.0,
            "rows": [],
            "parts": [],
        }

    def add(self, network: str, part: str, seconds: float, found: Findings) -> None:
        document = self.document
        document["rows"] += [{**dataclasses.asdict(row), "ratio": row.ratio} for row in found.rows]
        document["parts"].append(
            {"network": network, "part": part, "seconds": seconds, "facts": found.facts}
        )
        self.write()
        for row in found.rows:
            print(
                f"{network} {part}: {row.what} / {row.against}: {row.ratio:.3g} "
                f"({row.value:.4g} / {row.reference:.4g} {row.unit})",
                flush=True,
            )

    def write(self) -> None:
        self.document["wall_seconds"] = time.perf_counter() - self.clock
        self.document["load"][1] = os.getloadavg()[0]
        texts = {
            "speed.json": json.dumps(self.document, indent=1) + "\n",
            "speed.md": markdown(self.document),
        }
        for name, text in texts.items():
            partial = self.out / f"{name}.partial"
            partial.write_text(text)
            partial.replace(self.out / name)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[:1].upper()}{message[1:]}; --help lists the flags.")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags, checked; `networks`, `parts` and `batch_sizes` as lists.

    Raises:
        UsageError: for a flag or a value that cannot be.
    """
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", required=True, type=pathlib.Path, help="folder of the results")
    parser.add_argument("--networks", default="resnet20,resnet56", help="names with commas between")
    parser.add_argument("--parts", default=",".join(PARTS), help="names with commas between")
    parser.add_argument("--smoke", action="store_true", help="everything, on a tiny network")
    for name, (default, _, _, text) in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, help=f"{text}; default {default}")
    parser.add_argument(
        "--batch_sizes", default="", help="of strategies, with commas between; default 256 on a "
        "CPU, else 256,1000,2500,10000"
    )  # fmt: skip
    parser.add_argument(
        "--startup_args", default="", help="of train.py, in place of those of the networks"
    )
    args = parser.parse_args(list(argv))
    known = {"networks": [name for name in CONFIGS if name != "tiny"], "parts": PARTS}
    for flag, names in known.items():
        given = [name.strip() for name in getattr(args, flag).split(",") if name.strip()]
        unknown = [name for name in given if name not in names]
        if unknown or not given:
            raise UsageError(
                f"--{flag} must be among {', '.join(names)}, got {', '.join(unknown) or 'none'}."
            )
        setattr(args, flag, [name for name in names if name in given])
    if args.smoke:
        args.networks = ["tiny"]
    for name, (default, smoke, lowest, _) in NUMBERS.items():
        if getattr(args, name) is None:
            setattr(args, name, smoke if args.smoke else default)
        if getattr(args, name) < lowest:
            raise UsageError(f"--{name} must be at least {lowest}, got {getattr(args, name)}.")
    sizes = [size.strip() for size in args.batch_sizes.split(",") if size.strip()]
    if not all(size.isdigit() and int(size) for size in sizes):
        raise UsageError(
            "--batch_sizes takes whole numbers above 0 with commas between, got "
            f"{args.batch_sizes!r}."
        )
    args.batch_sizes = list(dict.fromkeys(map(int, sizes)))
    if args.smoke and not args.batch_sizes:
        args.batch_sizes = [4, 8]
    return args


def main(argv: Sequence[str]) -> None:
    args = parse(argv[1:])
    args.out.mkdir(parents=True, exist_ok=True)
    # A compilation that is read from a cache would be timed as one.
    jax.config.update("jax_enable_compilation_cache", False)
    compilations()
    report = Report(args.out, argv[1:])
    for part in [part for part in args.parts if part in OUTSIDE]:
        # Before this process takes the devices.
        given = part == "startup" and args.startup_args
        for name in ["train.py"] if given else args.networks:
            started = time.perf_counter()
            found = OUTSIDE[part](name, args)
            found.facts |= peak_memory(part, reset=False)
            report.add(name, part, time.perf_counter() - started, found)
    report.document["versions"] = lab.versions()
    for name in args.networks:
        case = None
        for part in args.parts:
            if part in OUTSIDE:
                continue
            case = case or make_case(name, args)
            reset = reset_peak_memory()
            started = time.perf_counter()
            found = MEASURES[part](case)
            found.facts |= peak_memory(part, reset)
            report.add(name, part, time.perf_counter() - started, found)
    report.write()
    print(f"\n{markdown(report.document)}\nwrote {args.out / 'speed.json'} and speed.md")


if __name__ == "__main__":
    run(main)
