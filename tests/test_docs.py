"""Every command and every program of README.md and docs/, in the order in which they stand."""

import contextlib
import io
import logging
import os
import re
import shlex
import shutil
import sys
import tomllib

import pytest
import test_data as data_files
from networks import ROOT, compiled_once, load_module, random_params

from neumeta_jax import __main__ as dispatcher
from neumeta_jax.data import sources
from neumeta_jax.export import torch_state
from neumeta_jax.networks import cifar_import, cifar_spec
from neumeta_jax.runs import backbone, inr

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CI = (ROOT / ".ci" / "run").read_text().replace('"', "").replace("install -q", "install")
NETWORK = """
import flax.linen as nn


class MyNet(nn.Module):
    width: int
    num_classes: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.width)(x.reshape(len(x), -1)))
        return nn.Dense(self.num_classes)(x)
"""
# What makes a command short, by a word of it.
SHORT = {
    "--config=digits": "--config=digits:smoke",
    "--config=configs/digits.py": "--config=configs/digits.py:smoke",
    "--config=resnet20": "--config=resnet20:smoke --config.train.epochs=0.1 "
    "--config.train.fixed_ratios=0.5 --config.train.num_random_sizes=2 "
    "--config.inr.width_terms=0.5",
    "--config=own:vgg": "--config=own:vgg --config.teacher.epochs=1 --config.train.epochs=1",
    "--config=own": "--config=own --config.teacher.epochs=1 --config.train.epochs=1",
    "--config=resnet56": "--config=resnet56 --config.data.num_validation=50",
    "--config=configs/resnet56.py": "--config=configs/resnet56.py --config.data.num_validation=50",
    "--config=baselines:slimmable": "--config=baselines:slimmable --config.data.num_validation=50",
    "--workdir=cifar100-resnet56": "--workdir=cifar100-resnet56 --split=test",  # four images
    "--profile=100:110": "--profile=2:4",
    "--budget=0.5": "--budget=0.001",
    "--num_candidates=100": "--num_candidates=12 --population=4 --num_images=40",
    "--num_candidates=50": "--num_candidates=12 --population=4 --num_images=40",
    "--random_networks=20": "--random_networks=3",
    "--width_ratios=1,0.5": "--width_ratios=0.5 --calls=1 --batch_sizes=2",
}
# Run by .ci/run, where each of them must stand.
ELSEWHERE = ("python examples/", "pytest")
EXTRAS = {*tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]}


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands(page):
    """The command lines of a page, one by one."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            parts = [line] if line.startswith("gcloud") else line.split("#")[0].split("&&")
            yield from (" ".join(part.split()) for part in parts if part.strip())


@pytest.fixture(scope="module", autouse=True)
def one_compilation_for_all_runs():
    with compiled_once():
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with stand-ins of what `neumeta fetch` fetches, images by class, and a network."""
    folder = tmp_path_factory.mktemp("inputs")
    arrays = data_files.random_arrays(num_classes=100, num_train=2400)
    files = data_files.cifar_files("cifar100", "python", arrays)
    data_files.write_tar(folder / "cifar-100-python.tar.gz", files)
    for depth in (20, 56):
        spec = cifar_spec.resnet_spec(depth, num_classes=100)
        tensors = cifar_import.to_tensors(spec, random_params(spec))
        (name,) = sources.SOURCES[f"cifar100-resnet{depth}-teacher"].files
        (folder / name).write_bytes(torch_state.to_torch(tensors))
    load_module("examples/own_data.py").write_images(folder / "IMAGES")
    (folder / "my_module.py").write_text(NETWORK)
    return folder


def run(command, inputs, folder):
    """Runs a command in this process; the work it does is as short as `SHORT` makes it."""
    command = command.replace("/tmp", str(folder)).replace("IMAGES", str(inputs / "IMAGES"))
    words = []
    for part in shlex.split(command):
        words += SHORT[part].split() if part in SHORT else [part]
    if words[:1] == ["python"] and words[1] in ("train.py", "eval.py"):
        words = ["neumeta", words[1].removesuffix(".py"), *words[2:]]
    assert words[0] == "neumeta", f"nobody runs {command!r}"
    with contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging, "basicConfig", lambda **options: None)
        patch.setattr(backbone, "NUM_MOMENT_IMAGES", 100)
        patch.setattr(inr, "NUM_IDLE_IMAGES", 100)
        try:
            dispatcher.main(words)
        except SystemExit as stop:
            assert not stop.code, f"{command} ended with {stop.code}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_run_in_the_order_in_which_they_stand(
    page, inputs, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    os.symlink(ROOT / "configs", tmp_path / "configs")
    for name in ("docs", "results"):  # which commands write to
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.setattr(sys, "path", [str(inputs), *sys.path])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def download(url, path, digest):
        shutil.copyfile(inputs / path.name, path)

    monkeypatch.setattr(sources, "_download", download)
    for command in commands(page):
        inner = re.search(r'--command="cd neumeta-jax && (.*)"', command)
        if command.startswith("pip install"):
            assert {*re.findall(r"\[(\w+)\]", command)} <= EXTRAS, command
        elif command.startswith(ELSEWHERE):
            assert command.replace('"', "").replace("/tmp/", "$work/") in CI, command
        elif inner:
            dry = " --dry_run" if "train.py" in inner[1] else ""
            run(inner[1].removesuffix("--distributed") + dry, inputs, tmp_path)
        else:
            run(command, inputs, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not re.match(r"https?://", target):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists(), f"{page.name}: {target}"
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.M) if anchor else [""]
            assert anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
