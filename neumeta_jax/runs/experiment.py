"""Names of modules that this one was split into, until nobody asks for them here."""
# ruff: noqa: F401

from neumeta_jax.commands.setup import configure_jax, quiet_logging
from neumeta_jax.errors import UsageError
from neumeta_jax.files.provenance import (
    checkout,
    differences,
    file_digest,
    num_cores,
    versions,
)
from neumeta_jax.files.storage import locked
from neumeta_jax.runs.backbone import (
    BACKBONE_FILE,
    NUM_MOMENT_IMAGES,
    check_teacher,
    fold_and_order,
    import_teacher,
    measure_moments,
    prepare as prepare_backbone,
)
from neumeta_jax.runs.config import Experiment, for_teacher, from_config, load_data
from neumeta_jax.runs.inr import find_idle, load_start, save as save_result, train as train_inr
from neumeta_jax.runs.part import Part
from neumeta_jax.runs.plan import check_start, check_steps, describe
from neumeta_jax.runs.workdir import (
    TrainedRun,
    Workdir,
    check_claim,
    check_same_config,
    open_run,
    open_workdir,
    read_config,
)


def phase_key(experiment, number):
    return experiment.key(number)
