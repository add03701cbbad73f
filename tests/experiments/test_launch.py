"""Launch recipes ask for as many devices as their mesh has, with arguments that a run accepts."""

import math
import re
import shlex
from pathlib import Path

import pytest
import yaml
from absl import flags

from experiments import settings
from experiments.run import resolve

LAUNCH = Path(__file__).parents[2] / "experiments/launch"


def slurm(text):
    nodes, each = (int(re.search(rf"#SBATCH --{key}=(\d+)", text)[1]) for key in ("nodes", "gpus-per-node"))
    tasks = int(re.search(r"#SBATCH --ntasks-per-node=(\d+)", text)[1])
    assert tasks == each  # JAX gives each process the GPU of its local number
    return nodes * each, nodes * tasks, text


def gke(text):
    (job,) = yaml.safe_load(text)["spec"]["replicatedJobs"]
    hosts, pod = job["template"]["spec"]["parallelism"], job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert hosts == job["template"]["spec"]["completions"]
    assert hosts * chips == math.prod(map(int, topology.split("x")))
    return job["replicas"] * hosts * chips, job["replicas"] * hosts, shlex.join(container["command"])


def sky(text):
    task = yaml.safe_load(text)
    each = int(task["resources"]["accelerators"].rpartition(":")[2])
    return task["num_nodes"] * each, task["num_nodes"], task["run"]


@pytest.mark.parametrize(
    ("file", "read"), [("slurm.sbatch", slurm), ("gke_jobset.yaml", gke), ("skypilot.yaml", sky)]
)
def test_a_recipe_starts_a_run_that_fits_its_machines(file, read):
    devices, processes, script = read((LAUNCH / file).read_text())
    command = re.search(r"-m experiments\.pretrain((?:\\\n|.)*)", script)[1].replace("\\\n", " ")
    arguments = [a for a in shlex.split(command) if not a.startswith("--workdir=")]
    run = resolve(settings.parse(["program", *arguments], "tiny", flags.FlagValues()).config)
    mesh = run.mesh
    assert mesh.pipeline * mesh.data * mesh.expert == devices
    rows = mesh.data * mesh.expert
    assert run.data.shards % min(rows, processes) == 0  # of the parts of a batch that processes load
