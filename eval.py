"""Evaluates networks of every size drawn from a trained INR, or checks a teacher's file.

python eval.py --workdir=/tmp/digits
python eval.py --workdir=/tmp/digits --split=validation --width_ratios=1,0.5 --out=/tmp/validation
python eval.py --workdir=/tmp/digits --figures --random_ratios=20
python eval.py --workdir=/tmp/digits --spec=/tmp/digits/search/max_macs=60000/best.json
python eval.py --workdir=/tmp/digits --random_networks=200
python eval.py --workdir=/tmp/digits --skipped_blocks=0,1
python eval.py --workdir=/tmp/digits --report --int8
python eval.py --teacher=FILE --config=configs/resnet56.py --config.data.dir=DIR
"""

import pathlib

from neumeta_jax.commands import command_line
from neumeta_jax.data import sources
from neumeta_jax.errors import UsageError
from neumeta_jax.evaluation import grid, morphs
from neumeta_jax.networks import cifar_import
from neumeta_jax.runs import evaluations, experiment as lab

FLAGS: command_line.Flags = {
    **command_line.WORKDIR,
    "teacher": (str, "", "A trained PyTorch network to check."),
    "split": (("test", "validation"), None, "Default: the config's."),
    "width_ratios": (list, None, "Comma-separated; default: the config's."),
    "figures": (
        bool,
        False,
        "Write against_macs, sweep and weights (.png, .csv) too.",
    ),
    "report": (
        bool,
        False,
        "Write report.html too, a page to look at it all; implies --figures. With --skipped_blocks "
        "it has those depths too.",
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
    **grid.SAMPLE_FLAGS,
    **command_line.DATA_DIR,
}


def main(argv):
    config, options = command_line.parse(argv, FLAGS, config_required=False)
    lab.quiet_logging()
    lab.configure_jax()
    if options.teacher:
        if not config:
            raise UsageError("--teacher=FILE needs --config=FILE, for data and images.")
        others = FLAGS.keys() - {"teacher", "split", "data_dir"}
        if given := sorted(name for name in others if options[name].present):
            raise UsageError(
                f"--{', --'.join(given)} and --teacher were given together, but a file of a "
                "teacher is checked alone; leave one of them out."
            )
        if options.data_dir:
            config["data"]["dir"] = options.data_dir
        check_teacher(config, options.teacher, options.split or "test")
    elif options.workdir:
        check_workdir(config, options)
    else:
        raise UsageError("eval.py needs --workdir=DIR, or --teacher=FILE with --config.")


def check_teacher(config, path, split):
    """Prints what a teacher's file holds and its accuracy at each step of the preparation."""
    dataset, splits = lab.load_data(config)
    spec, variables = cifar_import.load_teacher(
        sources.local_teacher(path), image_size=dataset.image_size
    )
    print(f"{path}: ResNet{spec.depth}, {spec.num_classes} classes, {spec.shortcut} shortcuts")
    print(f"spec {spec.to_dict()}")
    print(f"{spec.num_params:,} parameters folded, {spec.num_macs / 1e6:.2f} M multiply-adds")
    experiment = lab.for_teacher(config, dataset, spec)
    images, labels = grid.evaluation_split(splits, split)
    print(f"{dataset.name}, {split} split, {len(labels)} images")
    lab.fold_and_order(experiment, variables, images, labels, splits.train_images)


def check_workdir(config, options):
    """Evaluates the grid of a work directory and writes tables and figures into it."""
    opened = lab.open_run(config, options)
    specs = {path: morphs.load_morph(path, opened.hypernetwork) for path in options.spec or ()}
    ratios = evaluations.parse_width_ratios(options.width_ratios)
    skipped = morphs.parse_skipped(options.skipped_blocks)
    figures = options.figures or options.report
    sweep_ratios = evaluations.parse_sweep_ratios(figures, options.sweep_ratios)
    out = pathlib.Path(options.out or opened.workdir)
    experiment, splits = opened.load(other_data=out.resolve() != opened.workdir.resolve())
    drawn = ()
    if options.random_ratios is not None:
        drawn = evaluations.draw_width_ratios(experiment, options.random_ratios, options.seed)
    networks = []
    if options.random_networks is not None:
        networks = morphs.draw_networks(experiment, options.random_networks, options.seed)
    width_ratios = ratios or experiment.evaluation.width_ratios
    depths, cells = morphs.depth_networks(experiment, skipped, width_ratios)
    evaluator = evaluations.make_evaluator(
        experiment,
        opened.params,
        splits,
        split=options.split,
        num_samples=options.num_samples,
        strategy=options.strategy,
    )
    if not (ratios or sweep_ratios or options.int8 or not specs):
        width_ratios = ()
    at = opened.hypernetwork.widths
    planned = {
        "grid": [at(ratio) for ratio in width_ratios],
        "sweep": [at(ratio) for ratio in sweep_ratios],
        "random_ratios": [at(ratio) for ratio in drawn],
        "depths": depths,
        "specs": list(specs.values()),
        "random_networks": networks and [*morphs.uniform_networks(experiment), *networks],
    }
    planned = {name: some for name, some in planned.items() if some}
    evaluations.check_free(
        out,
        planned,
        split=evaluator.split,
        num_samples=evaluator.options["num_samples"],
        data=experiment.fingerprint,
    )

    run = out, experiment, evaluator
    rows = morphs.evaluate_depths(*run, depths, cells) if depths else []
    if width_ratios:
        evaluations.evaluate_and_write(
            opened.workdir,
            experiment,
            evaluator,
            width_ratios=width_ratios,
            sweep_ratios=sweep_ratios,
            report=options.report,
            others=[grid.grid_row(row) for row in rows],
            int8=options.int8,
            out=out,
        )
    if drawn:
        evaluations.evaluate_random_ratios(*run, drawn)
    if specs:
        morphs.evaluate_specs(*run, specs)
    if networks:
        morphs.evaluate_random_networks(*run, networks)


if __name__ == "__main__":
    command_line.run(main)
