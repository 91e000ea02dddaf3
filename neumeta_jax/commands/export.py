"""Writes one network of a trained INR as a file that other tools load.

    neumeta export --workdir=DIR --width=0.5 --format=onnx --out=half.onnx
    neumeta export --workdir=DIR --widths=4,0,8,8,16 --format=torch --out=a.pt
    neumeta export --workdir=DIR --spec=best.json --format=stablehlo --normalize --out=b.stablehlo

The formats are safetensors, torch (a state_dict), onnx, stablehlo and litert; the last three hold
the computation. Batches are of any size. Images are normalised by the caller, or are the uint8
pixels of an image file with --normalize, which puts the normalisation into the graph.

--int8 rounds the weights to 8 bits, with a scale for each output channel, in all but torch.
--int8=full lets the quantiser of onnxruntime (onnx) or LiteRT (litert) round the activations too,
over the ranges that they take on training images; the file is compared with the float32 network
then, within a wider tolerance.

Every file is read back, run on images of the run's data set, or on random ones where that is not on
this machine, and compared before it takes its name. onnx, stablehlo and litert need packages of the
extra: pip install 'neumeta-jax[export]'.
"""

import os
import pathlib
from collections.abc import Sequence

from absl import flags

from neumeta_jax.commands import command_line, setup
from neumeta_jax.errors import UsageError, check
from neumeta_jax.evaluation import quantize
from neumeta_jax.evaluation.morphs import check_widths, load_morph, morph_to_dict, note_range
from neumeta_jax.export import formats
from neumeta_jax.export.network import Network, Normalization, draw
from neumeta_jax.networks.families import Family
from neumeta_jax.runs.workdir import TrainedRun, open_run

FLAGS: command_line.Flags = {
    **command_line.WORKDIR,
    "width": (float, None, "Kept fraction of all hidden channels, up to 1.5."),
    "widths": (list, None, "Hidden channels of each generated block; 0 skips the block."),
    "spec": (str, None, "A JSON file with widths, spec and blocks of one network."),
    "format": (tuple(formats.FORMATS), None, "Of the file."),
    "out": (str, "", "The file to write."),
    "normalize": (bool, False, "Put the normalisation into the graph, which then takes pixels."),
    "int8": (str, None, "Weights in 8 bits; =full: activations too (onnx and litert)."),
    "num_images": (int, 256, "Images of the data set to compare on, at most."),
    "tolerance": (
        float,
        None,
        f"Largest relative logit error to accept; default {formats.TOLERANCE:g}, "
        f"{formats.FULL_INT8_TOLERANCE:g} with --int8=full.",
    ),
    **command_line.NUM_SAMPLES,
    **command_line.DATA_DIR,
}


def main(argv: Sequence[str]) -> None:
    argv = ["--int8=weights" if arg in ("--int8", "-int8") else arg for arg in argv]
    config, options = command_line.parse(argv, FLAGS, config_required=False)
    _check_options(options)
    setup.quiet_logging()
    setup.configure_jax()
    opened = open_run(config, options)
    family = opened.hypernetwork
    widths = _chosen_widths(family, options)
    experiment, splits, origin = _images(opened, options)
    images = splits.validation_images if len(splits.validation_images) else splits.test_images
    images = images[: options.num_images]

    noise = experiment.noise(options.num_samples or experiment.evaluation.num_samples)
    spec, tree = draw(family, opened.params, widths, **noise)
    shown = ",".join(map(str, widths))
    print(
        f"{spec.title} of {experiment.name} with widths {shown}: "
        f"{spec.num_params:,} parameters, {spec.num_macs / 1e6:.2f} M multiply-adds"
    )
    note_range(experiment.hypernetwork, experiment.recipe, widths)
    info = {"dataset": experiment.name, "morph": morph_to_dict(family, widths)}
    preprocessing = experiment.preprocessing
    normalization = Normalization(preprocessing.mean, preprocessing.std)
    network = Network(spec, tree, normalization, info)
    equivalence = formats.export(
        options.out,
        network,
        images,
        format=options.format,
        normalize=options.normalize,
        int8=options.int8,
        calibration=splits.train_images[: formats.NUM_CALIBRATION_IMAGES],
        tolerance=options.tolerance,
    )
    first = formats.FORMATS[options.format].channels_first
    shape = f"{spec.image_size}, {spec.image_size}"
    shape = f"{spec.channels}, {shape}" if first else f"{shape}, {spec.channels}"
    kind, what = ("uint8", "pixels") if options.normalize else ("float32", "normalised")
    size = os.path.getsize(options.out)
    print(
        f"wrote {options.out} ({options.format}, {size:,} bytes), which takes {kind}[batch, "
        f"{shape}], {what}"
    )
    mean, std = (" ".join(f"{x:.6g}" for x in values) for values in normalization)
    print(f"normalisation: mean {mean}, std {std} of images in [0, 1]")
    if options.int8 == "weights":
        rounded = network._replace(params=quantize.quantize(tree))
        found = formats.compare(rounded.logits(images), network.logits(images))
        print(f"int8 weights against float32 ones: {found}")
    print(f"equivalence: {equivalence} {origin}")


def _check_options(options: flags.FlagValues) -> None:
    for name in ("workdir", "format", "out"):
        check(getattr(options, name), f"An export needs --{name}; see --help.")
    given = [f"--{n}" for n in ("width", "widths", "spec") if getattr(options, n) is not None]
    check(
        len(given) == 1,
        "An export needs one of --width, --widths and --spec, got "
        f"{' and '.join(given) or 'none of them'}.",
    )
    command_line.check_at_least(options, num_images=1, num_samples=1)
    check(
        options.tolerance is None or options.tolerance > 0,
        f"--tolerance must be above 0, got {options.tolerance}.",
    )
    format = formats.check_format(options.format, normalize=options.normalize, int8=options.int8)
    suffixes = {format.suffix for format in formats.FORMATS.values()}
    check(
        pathlib.Path(options.out).suffix not in suffixes - {format.suffix},
        f"A file of --format={options.format} ends in {format.suffix}, got {options.out}, which is "
        "the name of another format; change one of them.",
    )
    formats.check_writable(options.out)


def _chosen_widths(family: Family, options: flags.FlagValues) -> tuple[int, ...]:
    if options.width is not None:
        return tuple(family.widths(options.width).tolist())
    if options.spec is not None:
        return load_morph(options.spec, family)
    try:
        widths = [int(width) for width in options.widths]
    except ValueError:
        raise UsageError(
            f"--widths takes integers with commas between, got {','.join(options.widths)!r}."
        ) from None
    return check_widths(family, widths)


def _images(opened: TrainedRun, options: flags.FlagValues):
    """(the experiment, its data, where images to compare on come from)."""
    full = options.int8 == "full"
    try:
        # Images to compare on may be any; those that ranges are measured on are the run's.
        experiment, splits = opened.load(other_data=not full)
    except (FileNotFoundError, ImportError):
        if options.data_dir or full:
            raise
        experiment, splits = opened.without_data(options.num_images)
        origin = f"at random, as {experiment.name} is not here; --data_dir=DIR says where"
        return experiment, splits, origin
    split = "validation" if len(splits.validation_images) else "test"
    return experiment, splits, f"of the {split} split of {experiment.name}"
