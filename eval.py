"""Evaluates networks of every size drawn from a trained INR, or checks a teacher's file.

python eval.py --workdir=/tmp/digits
python eval.py --workdir=/tmp/digits --split=validation --width_ratios=1,0.75,0.5,0.25
python eval.py --workdir=/tmp/digits --figures --random_ratios=20
python eval.py --workdir=/tmp/digits --spec=/tmp/digits/search/best.json
python eval.py --workdir=/tmp/digits --random_networks=200
python eval.py --workdir=/tmp/digits --width_ratios=1,0.75,0.5 --skipped_blocks=0,1
python eval.py --workdir=/tmp/digits --report --int8
python eval.py --teacher=FILE --config=configs/resnet56.py --config.data.dir=DIR
"""

import pathlib

from absl import flags

from neumeta_jax import (
    checkpoint,
    command_line,
    evaluation,
    experiment as lab,
    morphs,
    teacher_import,
)


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", "", "A work directory of train.py.", flag_values=values)
    flags.DEFINE_string("teacher", "", "A trained PyTorch network to check.", flag_values=values)
    flags.DEFINE_enum(
        "split", None, ["test", "validation"], "Default: the config's.", flag_values=values
    )
    flags.DEFINE_list(
        "width_ratios", None, "Comma-separated; default: the config's.", flag_values=values
    )
    flags.DEFINE_bool(
        "figures",
        False,
        "Write against_macs, sweep and weights (.png, .csv) into the work directory too.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "report",
        False,
        "Write report.html too, a page to look at it all; implies --figures. With --skipped_blocks "
        "it has those depths too.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "int8",
        False,
        "Evaluate the grid with weights in 8 bits too, beside float32.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "sweep_ratios",
        None,
        "Widths of the sweep that --figures draws; default: 24 from 0.1 to 1.25.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "random_ratios",
        None,
        "After the grid, evaluate this many widths at random from the trained range.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "random_networks",
        None,
        "Evaluate this many networks with a random width in each block against uniform ones.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "skipped_blocks",
        None,
        "Evaluate the grid without the last blocks of each stage too, such as 0,1,2 of them.",
        flag_values=values,
    )
    flags.DEFINE_integer("seed", 0, "Of --random_ratios and --random_networks.", flag_values=values)
    flags.DEFINE_list(
        "spec",
        None,
        "JSON files of networks, such as a search's best.json, comma-separated; evaluates these in "
        "place of the grid, unless --width_ratios or --figures asks for that too.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "num_samples", None, "Noisy weight samples to average (papers: 100).", flag_values=values
    )
    flags.DEFINE_enum(
        "strategy",
        "auto",
        evaluation.STRATEGIES,
        "How networks are evaluated; auto finds out which is fastest here.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "data_dir",
        "",
        "Where the data lies, if no longer where the run found it.",
        flag_values=values,
    )


def main(argv):
    config, options = command_line.parse(argv, define_flags, config_required=False)
    lab.quiet_logging()
    lab.enable_compilation_cache()
    if options.teacher:
        if not config:
            raise command_line.UsageError(
                "--teacher=FILE needs --config=FILE, for data and images."
            )
        needs_inr = [options.random_ratios, options.random_networks, options.spec]
        needs_inr.append(options.skipped_blocks)
        given = options.figures or options.report or options.int8
        if given or any(value is not None for value in needs_inr):
            raise command_line.UsageError(
                "--figures, --report, --int8, --random_ratios, --random_networks, --skipped_blocks "
                "and --spec need a trained INR, got --teacher; use --workdir."
            )
        if options.data_dir:
            config["data"]["dir"] = options.data_dir
        check_teacher(config, options.teacher, options.split or "test")
    elif options.workdir:
        check_workdir(config, options)
    else:
        raise command_line.UsageError(
            "eval.py needs --workdir=DIR, or --teacher=FILE with --config."
        )


def check_teacher(config, path, split):
    """Prints what a teacher's file holds and its accuracy at each step of the preparation."""
    dataset, splits = lab.load_data(config)
    spec, variables = teacher_import.load_teacher(path, image_size=dataset.image_size)
    print(f"{path}: ResNet{spec.depth}, {spec.num_classes} classes, {spec.shortcut} shortcuts")
    print(f"spec {spec.to_dict()}")
    print(f"{spec.num_params:,} parameters folded, {spec.num_macs / 1e6:.2f} M multiply-adds")
    experiment = lab.for_teacher(config, dataset, spec)
    images = splits.test_images if split == "test" else splits.validation_images
    labels = splits.test_labels if split == "test" else splits.validation_labels
    print(f"{dataset.name}, {split} split, {len(labels)} images")
    lab.fold_and_order(experiment, variables, images, labels, splits.train_images)


def check_workdir(config, options):
    """Evaluates the grid of a work directory and writes tables and figures into it."""
    workdir = pathlib.Path(options.workdir)
    saved = lab.read_config(workdir)
    if config:
        lab.check_same_config(workdir, config)
    hypernetwork, params, _ = checkpoint.load_inr(workdir)
    specs = {path: morphs.load_morph(path, hypernetwork) for path in options.spec or ()}
    if options.data_dir:
        saved["data"]["dir"] = options.data_dir
    ratios = lab.parse_width_ratios(options.width_ratios)
    skipped = morphs.parse_skipped(options.skipped_blocks)
    figures = options.figures or options.report
    sweep_ratios = lab.parse_sweep_ratios(figures, options.sweep_ratios)
    dataset, splits = lab.load_data(saved)
    experiment = lab.from_config(saved, dataset)
    lab.check_same_family(experiment, hypernetwork)
    drawn = ()
    if options.random_ratios is not None:
        drawn = lab.draw_width_ratios(experiment, options.random_ratios, options.seed)
    networks = []
    if options.random_networks is not None:
        networks = morphs.draw_networks(experiment, options.random_networks, options.seed)
    shared = {
        "split": options.split or experiment.eval_split,
        "num_samples": options.num_samples or experiment.eval_samples,
        "strategy": options.strategy,
        "known": {},  # of equal widths only the first is evaluated
    }
    compared = {**shared, "comparison": evaluation.Comparison()}
    run = (workdir, experiment, params, splits)
    depths = []
    if skipped:
        depths = morphs.evaluate_depths(
            *run,
            skipped=skipped,
            width_ratios=ratios or experiment.width_ratios,
            **compared,
        )
    if ratios or sweep_ratios or options.int8 or not specs:
        lab.evaluate_and_write(
            *run,
            width_ratios=ratios or experiment.width_ratios,
            sweep_ratios=sweep_ratios,
            report=options.report,
            others=[evaluation.grid_row(row) for row in depths],
            int8=options.int8,
            **compared,
        )
    if drawn:
        lab.evaluate_random_ratios(*run, ratios=drawn, **compared)
    if specs:
        morphs.evaluate_specs(*run, networks=specs, **compared)
    if networks:
        morphs.evaluate_random_networks(*run, networks=networks, **shared)


if __name__ == "__main__":
    command_line.run(main)
