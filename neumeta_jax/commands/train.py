"""Trains one INR from which every size of a network can be drawn.

    neumeta train --config=digits --workdir=/tmp/digits
    neumeta train --config=resnet20:depth --workdir=/tmp/resnet20 --config.train.epochs=2
    neumeta train --config=FILE.py --dry_run

The same command continues an interrupted run. `--config=RECIPE:PRESET` or `--config=FILE.py:PRESET`
says what is trained, `--config.field=value` overrides a field, `--dry_run` says what would happen.
Several hosts train together with `--distributed` or `--coordinator_address`, see `runs/hosts.py`.
"""

import json
import pathlib
import time

from neumeta_jax.commands import command_line
from neumeta_jax.errors import check
from neumeta_jax.files.provenance import format_seconds
from neumeta_jax.runs import diagnosis, evaluations, experiment as lab, hosts

FLAGS: command_line.Flags = {
    "workdir": (str, "", "Where the run lives; created if absent."),
    "dry_run": (bool, False, "Describe the run and exit."),
    **hosts.FLAGS,
}


def main(argv):
    config, options = command_line.parse(argv, FLAGS, config_required=True)
    check(
        "baseline" not in config,
        "A config with the section baseline is for neumeta compare, got it in neumeta train, which "
        "would train by another recipe; use that command.",
    )
    check(
        options.workdir or options.dry_run,
        "--workdir=DIR is required; the run is kept and resumed there.",
    )
    lab.quiet_logging()
    lab.configure_jax()
    with hosts.joined(options):
        run(config, options)


def run(config, options):
    started = time.perf_counter()
    print("  ".join(f"{name} {version}" for name, version in lab.versions().items()))

    dataset, splits = lab.load_data(config)
    experiment = lab.from_config(config, dataset)
    if options.workdir:
        lab.check_claim(options.workdir, config)
    given = lab.check_start(experiment, splits, options.workdir)
    if options.dry_run:
        print(json.dumps(config, indent=1))
        print(lab.describe(experiment, dataset, splits, estimate_time=True))
        return
    print(lab.describe(experiment, dataset, splits), flush=True)

    with lab.open_workdir(options.workdir, config, experiment.fingerprint) as workdir:
        # Import or train the teacher, fold its batch norm, put its channels in order.
        backbone = lab.prepare_backbone(workdir, experiment, splits)
        # Fit the INR to the teacher, then add block after block at random widths.
        params = lab.train_inr(workdir, experiment, splits, backbone, given)
        path = lab.save_result(workdir, experiment, params)
    if not hosts.is_first():
        return
    print(f"wrote {path} (sha256 {lab.file_digest(path)[:16]})")
    idle = lab.find_idle(experiment, params, splits)
    for line in diagnosis.describe_idle(experiment.hypernetwork, idle):
        print(line)
    evaluator = evaluations.make_evaluator(experiment, params, splits)
    ratios = experiment.evaluation.width_ratios
    evaluations.evaluate_and_write(
        pathlib.Path(options.workdir), experiment, evaluator, width_ratios=ratios
    )
    print(f"done in {format_seconds(time.perf_counter() - started)}")
