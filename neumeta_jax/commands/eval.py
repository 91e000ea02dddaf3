"""Evaluates networks of every size drawn from a trained INR, or checks a teacher's file.

neumeta eval --workdir=/tmp/digits
neumeta eval --workdir=/tmp/digits --split=validation --width_ratios=1,0.5 --out=/tmp/other
neumeta eval --workdir=/tmp/digits --figures --random_ratios=20
neumeta eval --workdir=/tmp/digits --spec=/tmp/digits/search/max_macs=60000/best.json
neumeta eval --workdir=/tmp/digits --random_networks=200
neumeta eval --workdir=/tmp/digits --skipped_blocks=0,1
neumeta eval --workdir=/tmp/digits --report --int8
neumeta eval --teacher=FILE --config=resnet56 --config.data.dir=DIR
"""

import pathlib

from neumeta_jax.commands import command_line, evaluations, setup
from neumeta_jax.data import sources
from neumeta_jax.errors import UsageError, check
from neumeta_jax.evaluation import choices
from neumeta_jax.evaluation.evaluator import evaluation_split
from neumeta_jax.evaluation.morphs import load_morph
from neumeta_jax.networks import cifar_import
from neumeta_jax.runs.backbone import fold_and_order
from neumeta_jax.runs.config import for_teacher, load_data
from neumeta_jax.runs.workdir import open_run

FLAGS: command_line.Flags = {
    **command_line.WORKDIR,
    "teacher": (str, "", "A trained PyTorch network to check."),
    "split": (("test", "validation"), None, "Default: the config's."),
    "width_ratios": (list, None, "Comma-separated; default: the config's."),
    "figures": (bool, False, "Write against_macs and sweep (.png, .csv) too."),
    "report": (
        bool,
        False,
        "Write report.html too, a page to look at it all; implies --figures. With --skipped_blocks "
        "it has those depths too, with --int8 those accuracies.",
    ),
    "int8": (bool, False, "Evaluate the grid with weights in 8 bits too, beside float32."),
    "sweep_ratios": (
        list,
        None,
        "Widths of the sweep that --figures draws; default: 24 from 0.1 to 1.25.",
    ),
    "random_ratios": (
        int,
        None,
        "After the grid, evaluate this many widths at random from the trained range.",
    ),
    "random_networks": (
        int,
        None,
        "Evaluate this many networks with a random width in each block against uniform ones.",
    ),
    "skipped_blocks": (
        list,
        None,
        "Evaluate the grid without the last blocks of each stage too, such as 0,1,2 of them.",
    ),
    "seed": (int, 0, "Of --random_ratios and --random_networks."),
    "spec": (
        list,
        None,
        "JSON files of networks, such as a search's best.json, comma-separated; evaluates these in "
        "place of the grid, unless --width_ratios or --figures asks for that too.",
    ),
    "out": (
        str,
        "",
        "The folder for tables and figures; default: the work directory, where no file of another "
        "evaluation is replaced.",
    ),
    **command_line.SAMPLES,
    **command_line.DATA_DIR,
}


def main(argv):
    config, options = command_line.parse(argv, FLAGS, config_required=False)
    setup.quiet_logging()
    setup.configure_jax()
    if options.teacher:
        check_teacher(config, options)
    elif options.workdir:
        check_workdir(config, options)
    else:
        raise UsageError("neumeta eval needs --workdir=DIR, or --teacher=FILE with --config.")


def check_teacher(config, options):
    """Prints what a teacher's file holds and its accuracy at each step of the preparation."""
    check(config, "--teacher=FILE needs --config=FILE, for data and images.")
    others = sorted(FLAGS.keys() - {"teacher", "split", "data_dir"})
    given = ", --".join(name for name in others if options[name].present)
    check(
        not given,
        f"--{given} and --teacher were given together, but a file of a teacher is checked alone; "
        "leave one of them out.",
    )
    if options.data_dir:
        config["data"]["dir"] = options.data_dir
    path, split = options.teacher, options.split or "test"
    dataset, splits = load_data(config)
    file = sources.local_teacher(path)
    spec, variables = cifar_import.load_teacher(file, image_size=dataset.image_size)
    print(f"{path}: ResNet{spec.depth}, {spec.num_classes} classes, {spec.shortcut} shortcuts")
    print(f"spec {spec.to_dict()}")
    print(f"{spec.num_params:,} parameters folded, {spec.num_macs / 1e6:.2f} M multiply-adds")
    experiment = for_teacher(config, dataset, spec)
    images, labels = evaluation_split(splits, split)
    print(f"{dataset.name}, {split} split, {len(labels)} images")
    fold_and_order(experiment, variables, images, labels, splits.train_images)


def check_workdir(config, options):
    """Evaluates a work directory and writes tables and figures into it, or into --out."""
    opened = open_run(config, options)
    specs = {path: load_morph(path, opened.hypernetwork) for path in options.spec or ()}
    given, sweep = parse_ratios(options)
    skipped = choices.parse_skipped(options.skipped_blocks)
    out = pathlib.Path(options.out or opened.workdir)
    experiment, splits = opened.load(other_data=out.resolve() != opened.workdir.resolve())
    asked = {name: getattr(options, name) for name in ("split", "num_samples", "strategy")}
    evaluator = evaluations.make_evaluator(experiment, opened.params, splits, **asked)
    family, trained, seed = experiment.hypernetwork, experiment.trained_range, options.seed
    ratios = given or experiment.evaluation.width_ratios
    entries = []

    def add(write, networks, *what):
        name = write.__name__.removeprefix("write_")
        entries.append(evaluations.Entry(name, networks, write, what))

    if given or sweep or options.int8 or not specs:
        add(evaluations.write_grid, choices.at_ratios(family, ratios), ratios)
    if options.int8:
        add(evaluations.write_int8, choices.at_ratios(family, ratios), ratios)
    if sweep:
        add(evaluations.write_sweep, choices.at_ratios(family, sweep), ratios, sweep)
    depths = choices.depth_networks(family, skipped, ratios)
    if depths:
        add(evaluations.write_depths, list(depths.values()), depths)
    if options.random_ratios is not None:
        drawn = choices.draw_width_ratios(trained, options.random_ratios, seed)
        add(evaluations.write_random_ratios, choices.at_ratios(family, drawn), drawn)
    if specs:
        add(evaluations.write_specs, list(specs.values()), specs)
    if options.random_networks is not None:
        drawn = choices.draw_networks(family, trained, options.random_networks, seed)
        uniform = choices.uniform_networks(family, trained)
        add(evaluations.write_random_networks, [*uniform, *drawn], drawn)
    if options.report:
        add(evaluations.write_report, (), ratios, sweep, depths, options.int8)
    evaluations.evaluate(evaluations.Target(opened.workdir, out, experiment, evaluator), entries)


def parse_ratios(options):
    """(those of --width_ratios, those of the sweep of --figures, increasing); () for none."""
    figures, values = options.figures or options.report, options.sweep_ratios
    check(
        figures or not values,
        f"--sweep_ratios needs --figures or --report, got {','.join(values or ())} without; add "
        "one.",
    )
    sweep = choices.parse_width_ratios(values, flag="--sweep_ratios")
    sweep = tuple(sorted(set(sweep or choices.SWEEP_RATIOS))) if figures else ()
    return choices.parse_width_ratios(options.width_ratios), sweep
