"""Trains one INR from which every size of a network can be drawn.

    neumeta train --config=digits --workdir=/tmp/digits
    neumeta train --config=resnet20:depth --workdir=/tmp/resnet20 --config.train.epochs=2
    neumeta train --config=FILE.py --dry_run
    neumeta train --config=digits --workdir=/tmp/digits --tensorboard --profile=100:110

The same command continues an interrupted run. `--config=RECIPE:PRESET` or `--config=FILE.py:PRESET`
says what is trained, `--config.field=value` overrides a field, `--dry_run` says what would happen.
Several hosts train together with `--distributed` or `--coordinator_address`, see `runs/hosts.py`.
"""

import json
import time

from neumeta_jax.commands import command_line, evaluations, setup
from neumeta_jax.errors import check
from neumeta_jax.files import provenance
from neumeta_jax.runs import (
    backbone as backbones,
    config as configs,
    diagnosis,
    hosts,
    inr,
    logs,
    part,
    plan,
    workdir,
)

HOSTS: command_line.Flags = {
    "distributed": (
        bool,
        False,
        "This is one of several processes, on every worker of a TPU pod or under Slurm or MPI.",
    ),
    "coordinator_address": (
        str,
        None,
        "HOST:PORT of the first process, elsewhere than on a TPU pod.",
    ),
    "num_processes": (int, None, "How many there are."),
    "process_id": (int, None, "Which one this is, from 0."),
}
FLAGS: command_line.Flags = {
    "workdir": (str, "", "Where the run lives; created if absent."),
    "dry_run": (bool, False, "Describe the run and exit."),
    "tensorboard": (
        bool,
        False,
        "Write all metrics to DIR/tensorboard too, for tensorboard --logdir=DIR/tensorboard.",
    ),
    "profile": (
        str,
        "",
        "START:STOP, steps of the INR's training of which DIR/profile gets a trace for a browser.",
    ),
    **HOSTS,
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
    if options.tensorboard:
        logs.check_tensorboard()
    setup.quiet_logging()
    setup.configure_jax()
    with hosts.joined(**{name: getattr(options, name) for name in HOSTS}):
        run(config, options)


def run(config, options):
    started = time.perf_counter()
    print("  ".join(f"{name} {version}" for name, version in provenance.versions().items()))

    dataset, splits = configs.load_data(config)
    experiment = configs.from_config(config, dataset)
    if options.workdir:
        workdir.check_claim(options.workdir, config)
    given = plan.check_start(experiment, splits, options.workdir)
    profile = None
    if options.profile:
        num_steps = inr.phases(experiment, splits)[-1].stop
        profile = part.Profile.parse(options.profile, num_steps)
    if options.dry_run:
        print(json.dumps(config, indent=1))
    print(plan.describe(experiment, dataset, splits, estimate_time=options.dry_run), flush=True)
    if options.dry_run:
        return

    with workdir.open_workdir(
        options.workdir, config, experiment.fingerprint, tensorboard=options.tensorboard
    ) as opened:
        # Import or train the teacher, fold its batch norm, put its channels in order.
        backbone = backbones.prepare_backbone(opened, experiment, splits)
        # Fit the INR to the teacher, then add block after block at random widths.
        params = inr.train_inr(opened, experiment, splits, backbone, given, profile)
        path = inr.save_result(opened, experiment, params)
    if not hosts.is_first():
        return
    print(f"wrote {path} (sha256 {provenance.file_digest(path)[:16]})")
    idle = inr.find_idle(experiment, params, splits)
    for line in diagnosis.describe_idle(experiment.hypernetwork, idle):
        print(line)
    evaluator = evaluations.make_evaluator(experiment, params, splits)
    ratios = experiment.evaluation.width_ratios
    target = evaluations.Target(path.parent, path.parent, experiment, evaluator)
    evaluations.write_grid(target, ratios)
    print(f"done in {provenance.format_seconds(time.perf_counter() - started)}")
