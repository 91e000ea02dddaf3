"""Images per second of a training step of configs/resnet56.py:depth on a GPU, beside PyTorch's.

    python benchmarks/gpu/throughput.py --out=DIR
    python benchmarks/gpu/throughput.py --out=/tmp/t --smoke           # small, on any device

Each variant, a batch size and flags of XLA, compiles and runs in a process of its own, one after
the other, because what else is on the device spoils timings, those by which XLA chooses algorithms
included. Compiled programs stay in JAX's compilation cache, so that a run with the variant that was
chosen starts at once. `--minutes` is when the last variant may begin.

PyTorch runs the same four networks and the teacher in bfloat16, channels last, as one CUDA graph:
forward, cross-entropy and soft labels, backward. It neither generates weights nor updates them.
Random images and labels. The last lines are a table; `throughput.json` holds all of it.
"""

import argparse
import dataclasses
import importlib
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

# All sizes, and the depth term alone.
PHASES = ("all blocks", "depth")
GRAPHS = "--xla_gpu_enable_command_buffer=+convolution"
VARIANTS = {  # name: (batch size, XLA flags)
    "256 graphs": (256, GRAPHS),
    "256 graphs concurrent": (
        256,
        f"{GRAPHS} --xla_gpu_command_buffer_scheduling_mode=CONCURRENT",
    ),
    "512 graphs": (512, GRAPHS),
    "256 graphs conv fusion": (256, f"{GRAPHS} --xla_gpu_experimental_enable_conv_fusion=true"),
}
WORKER_S = 150  # more is no use on a device that is lent by the minute
# A program that takes a work directory and a file.
SAVE_COMPACT = (
    "import sys; from neumeta_jax.networks import saved; saved.save_compact(*sys.argv[1:])"
)
ROOT = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Size:
    """Of what is measured: the network, the data set, the steps of a call."""

    depth: int = 56
    images: int = 50_000
    steps: int = 50


SMOKE = Size(depth=20, images=2100, steps=1)


def experiment_of(batch_size: int, size: Size):
    """The experiment of the config on random images, and its splits."""
    import numpy as np

    from neumeta_jax.commands import command_line
    from neumeta_jax.data import datasets
    from neumeta_jax.runs.config import from_config

    fields = {"network.depth": size.depth, "train.batch_size": batch_size}
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    flags = ["", f"--config={ROOT}/configs/resnet56.py:depth", *flags]
    config, _ = command_line.parse(flags, {}, config_required=True)
    rng = np.random.default_rng(0)

    def draw(number):
        images = rng.integers(0, 256, (number, 32, 32, 3), np.uint8)
        return images, rng.integers(0, 100, number).astype(np.int32)

    dataset = datasets.make_dataset("cifar100", *draw(size.images), *draw(100), num_classes=100)
    splits = datasets.split_validation(dataset, num_validation=2000, seed=0)
    return from_config(config, dataset), splits


def worker(batch_size: int, size: Size) -> None:
    """Compiles the steps and prints what it measured."""
    import functools

    import jax
    import jax.numpy as jnp

    from neumeta_jax.commands import setup
    from neumeta_jax.core import hypernetwork as hyper
    from neumeta_jax.core.optimizer import inr_optimizer
    from neumeta_jax.core.update import inr_update, phase_inputs, start_phase
    from neumeta_jax.data.preprocessing import Images
    from neumeta_jax.evaluation import timing
    from neumeta_jax.networks import cifar_resnet
    from neumeta_jax.runs.loop import Steps

    setup.configure_jax()
    experiment, splits = experiment_of(batch_size, size)
    family, recipe = experiment.hypernetwork, experiment.recipe
    images = Images(jnp.asarray(splits.train_images), jnp.asarray(splits.train_labels))
    backbone = cifar_resnet.init_params(jax.random.key(0), family.spec)
    params = hyper.init(jax.random.key(1), family, backbone, alpha=1.0, from_backbone=True)
    phases = recipe.phases(family, num_images=len(splits.train_labels))
    order = jnp.arange(len(splits.train_labels), dtype=jnp.int32)
    key = jax.random.key(2)
    state = start_phase(params, family, recipe, phases[0])
    prepare = functools.partial(experiment.preprocessing.train, num_classes=family.spec.num_classes)

    def runner(name):
        """A function that takes `size.steps` steps of the phase of that name."""
        phase = next(phase for phase in phases if phase.name == name)
        update = inr_update(family, recipe, phase.program, prepare, family.forward, unroll=True)
        call = Steps(update, phase.images_per_step, size.steps).call
        rest = (backbone, phase_inputs(params, family, recipe, phase))

        def run():
            nonlocal state
            zero = jnp.int32(0)
            state, metrics, _ = call(
                state, zero, jnp.int32(size.steps), key, images, order, zero, *rest
            )
            return metrics

        return run

    started = time.perf_counter()
    runs = {name: runner(name) for name in PHASES}
    for run in runs.values():
        jax.block_until_ready(run())
    compile_s = time.perf_counter() - started

    # The parts of a step that are no network: what a faster device would not make faster.
    optimizer = inr_optimizer(recipe)

    @jax.jit
    def optimise(params, opt_state):
        return optimizer.update(params, opt_state, params)

    @jax.jit
    def generate(params, key):
        widths = phases[0].sizes.draw(key)
        trees, pull_back = jax.vjp(
            lambda params: jax.vmap(lambda w: hyper.generate(family, params, w))(widths), params
        )
        return pull_back(trees)

    seconds = timing.fewest(runs, 3)
    step_s, depth_s = (seconds[name] / size.steps for name in PHASES)
    parts = timing.fewest(
        {
            "optimiser": lambda: optimise(state.params, state.opt_state),
            "generation": lambda: generate(state.params, key),
        },
        3,
    )
    found = {
        "batch_size": batch_size,
        "compile_s": round(compile_s, 1),
        "step_ms": 1e3 * step_s,
        "images_per_second": recipe.num_sizes * batch_size / step_s,
        "depth_step_ms": 1e3 * depth_s,
        **{f"{name}_ms": 1e3 * value for name, value in parts.items()},
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    print(json.dumps(found), flush=True)


def torch_worker(batch_size: int, size: Size) -> None:
    """The same networks in PyTorch; prints what it measured."""
    torch: Any = importlib.import_module("torch")
    nn: Any = importlib.import_module("torch.nn")
    functional: Any = importlib.import_module("torch.nn.functional")

    from neumeta_jax.evaluation import timing

    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    torch.backends.cudnn.benchmark = True
    blocks_per_stage = (size.depth - 2) // 6
    generated = range(1, blocks_per_stage)
    last = blocks_per_stage - 1  # the last block of the network is not generated

    def conv(inputs, outputs, stride=1, size=3):
        return nn.Conv2d(inputs, outputs, size, stride, size // 2)

    class Block(nn.Module):
        def __init__(self, inputs, hidden, outputs, stride):
            super().__init__()
            self.conv1, self.conv2 = conv(inputs, hidden, stride), conv(hidden, outputs)
            self.shortcut = conv(inputs, outputs, stride, 1) if stride > 1 else None

        def forward(self, x):
            y = self.conv2(functional.relu(self.conv1(x)))
            return functional.relu((self.shortcut(x) if self.shortcut else x) + y)

    def network(ratio=1.0, skipped=0):
        layers, inputs = [conv(3, 16), nn.ReLU()], 16
        for stage, width in enumerate((16, 32, 64)):
            inner = [n for n in generated if not (stage == 2 and n == last)]
            left_out = inner[len(inner) - skipped :] if skipped else []
            for n in range(blocks_per_stage):
                if n in left_out:
                    continue
                hidden = max(8, round(width * ratio)) if n in inner else width
                layers.append(Block(inputs, hidden, width, 2 if stage and n == 0 else 1))
                inputs = width
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 100)]
        whole = nn.Sequential(*layers, *head).to(device, dtype)
        return whole.to(memory_format=torch.channels_last)

    half = (blocks_per_stage - 1) // 2
    networks = [network(), network(0.25), network(skipped=half), network()]
    teacher = network()
    x = torch.randn(batch_size, 3, 32, 32, device=device, dtype=dtype)
    x = x.to(memory_format=torch.channels_last)
    y = torch.randint(0, 100, (batch_size,), device=device)

    def step():
        with torch.no_grad():
            soft = functional.softmax(teacher(x).float() / 2, -1)
        for one in networks:
            logits = one(x).float()
            log_probabilities = functional.log_softmax(logits / 2, -1)
            distillation = functional.kl_div(log_probabilities, soft, reduction="batchmean")
            loss = functional.cross_entropy(logits, y) + 16 * distillation
            for parameter in one.parameters():
                parameter.grad = None
            loss.backward()

    run, wait = step, lambda: None
    if cuda:
        wait = torch.cuda.synchronize
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        run = graph.replay

    def several():
        for _ in range(size.steps):
            run()
        wait()

    step_s = timing.fewest({"": several}, 3)[""] / size.steps
    found = {
        "batch_size": batch_size,
        "step_ms": 1e3 * step_s,
        "images_per_second": len(networks) * batch_size / step_s,
        "torch": torch.__version__,
    }
    print(json.dumps(found), flush=True)


def environment(xla_flags: str) -> dict[str, str]:
    """Of a process that runs this checkout with more flags of XLA."""
    flags = f"{xla_flags} {os.environ.get('XLA_FLAGS', '')}".strip()
    return os.environ | {
        "XLA_FLAGS": flags,
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="names, with commas between")
    parser.add_argument("--torch_batch_sizes", default="256,512")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    scale = 16 if options.smoke else 1
    if options.worker:
        kind, batch_size = options.worker.split(":")
        run = torch_worker if kind == "torch" else worker
        run(int(batch_size) // scale, SMOKE if options.smoke else Size())
        return

    def measure(kind, batch_size, flags=""):
        job = f"--worker={kind}:{batch_size}"
        command = [sys.executable, __file__, f"--out={options.out}", job]
        command += ["--smoke"] * options.smoke
        pipes = {"stdout": subprocess.PIPE, "text": True, "timeout": WORKER_S}
        try:
            done = subprocess.run(command, env=environment(flags), **pipes)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {WORKER_S} s"}
        lines = done.stdout.strip().splitlines()
        return json.loads(lines[-1]) if lines and not done.returncode else {"failed": str(lines)}

    options.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    found = {}
    for batch_size in [int(n) for n in options.torch_batch_sizes.split(",") if n]:
        found[f"PyTorch {batch_size}"] = measure("torch", batch_size)
    for name in [name for name in options.variants.split(",") if name]:
        if time.perf_counter() - started < 60 * options.minutes:
            found[name] = measure("jax", *VARIANTS[name])
            print(name, found[name], flush=True)
            (options.out / "throughput.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"{'variant':<26}{'images/s':>10}{'ms a step':>11}{'optimiser':>11}{'generation':>11}")
    for name, row in found.items():
        if "failed" in row:
            print(f"{name:<26}failed: {row['failed'][-100:]}")
            continue
        numbers = [row.get(key) for key in ("step_ms", "optimiser_ms", "generation_ms")]
        cells = "".join(f"{'' if n is None else format(n, '.2f'):>11}" for n in numbers)
        print(f"{name:<26}{row['images_per_second']:>10,.0f}{cells}")


if __name__ == "__main__":
    main()
