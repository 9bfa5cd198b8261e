"""The config's group `cluster`: options for Slurm and Google Cloud; no result depends on it.

This file imports neither JAX nor submitit, so that config files can import it fast.
"""

import re
import shutil

import ml_collections
from ml_collections import config_dict

from qlora_jax import errors

_SLURM = ("sbatch", "squeue", "scontrol")
TPU_WAYS = ("vm", "queued", "xpk")
_DURATION = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


def default() -> ml_collections.ConfigDict:
  """The group with its defaults; None leaves the choice to the cluster."""
  cluster = ml_collections.ConfigDict()
  cluster.slurm = dict(
    time="1:00:00",  # as sbatch --time: minutes, H:M:S, D-H or D-H:M:S
    nodes=1,
    tasks_per_node=1,  # processes of one training; with GPUs one per GPU
    gpus_per_node=0,
    cpus_per_task=1,
    signal_seconds=90,  # before the time limit: save and requeue
    requeues=100,  # maximum number of requeues of a job, after preemption or its time limit
    setup=(),  # shell lines before Python starts, such as ("module load cuda",)
    sbatch=(),  # further options, such as ("--reservation=night",)
  )
  for name in ("partition", "account", "qos", "constraint"):
    cluster.slurm[name] = config_dict.placeholder(str)
  cluster.slurm.memory_gb = config_dict.placeholder(float)  # of a node
  cluster.tpu = dict(
    way="vm",  # vm: gcloud TPU-VM, queued: queued resources, xpk: GKE
    name="qlora-jax",
    accelerator="v5litepod-8",  # of one slice; xpk's --tpu-type
    slices=1,
    spot=False,
    delete=False,  # deletes the TPU-VM after the training
    python="python3.11",
    setup=("sudo apt-get update -q", "sudo apt-get install -yq python3.11-venv"),
    # Installed on every worker; with () the workers use `python` without an environment.
    packages=("requirements.txt", "requirements-data.txt", "requirements-llm.txt"),
  )
  # version: runtime of the TPU-VM; topology, cluster, image: for xpk; the others: Google Cloud.
  for name in ("version", "project", "zone", "bucket", "cluster", "topology", "image", "network"):
    cluster.tpu[name] = config_dict.placeholder(str)
  return cluster


def split(
  config: ml_collections.ConfigDict,
) -> tuple[ml_collections.ConfigDict, ml_collections.ConfigDict]:
  """(config without its group `cluster`, that group); studies do not store where they ran."""
  trained = config.copy_and_resolve_references()
  trained.unlock()
  cluster = trained.get("cluster") or default()
  if "cluster" in trained:
    del trained["cluster"]
  return trained.lock(), cluster


def minutes(text: str) -> int:
  """The whole minutes of a time limit in sbatch's format, rounded up.

  Raises:
    errors.UserError: the text is no time, or less than a minute.
  """
  matched = _DURATION.fullmatch(str(text).strip())
  if not matched:
    raise errors.UserError(
      f"cluster.slurm.time: {text!r} is not a time; use minutes, H:M:S, D-H or D-H:M:S"
    )
  days, *parts = matched.groups()
  numbers = [int(part) for part in parts if part is not None]
  if days is not None:  # D-H[:M[:S]]
    hours, minute, second = [*numbers, 0, 0][:3]
  elif len(numbers) == 3:  # H:M:S
    hours, minute, second = numbers
  else:  # M[:S]
    hours, (minute, second) = 0, [*numbers, 0][:2]
  seconds = ((int(days or 0) * 24 + hours) * 60 + minute) * 60 + second
  if seconds < 60:
    raise errors.UserError(f"cluster.slurm.time: {text!r} is under a minute; use at least 1")
  return -(-seconds // 60)


def check_slurm(slurm: ml_collections.ConfigDict) -> None:
  """Raises a UserError that names the first invalid option."""
  minutes(slurm.time)
  for name in ("nodes", "tasks_per_node", "cpus_per_task"):
    if slurm[name] < 1:
      raise errors.UserError(f"cluster.slurm.{name}: {slurm[name]} is not a number of at least 1")
  for name in ("gpus_per_node", "requeues", "signal_seconds"):
    if slurm[name] < 0:
      raise errors.UserError(f"cluster.slurm.{name}: {slurm[name]} is below 0")
  tasks = slurm.nodes * slurm.tasks_per_node
  if tasks > 1 and slurm.gpus_per_node not in (0, slurm.tasks_per_node):
    raise errors.UserError(
      f"cluster.slurm.tasks_per_node: {slurm.tasks_per_node} for {slurm.gpus_per_node} GPUs per"
      f" node; several processes need one GPU each: use {slurm.gpus_per_node}"
    )
  if slurm.memory_gb is not None and slurm.memory_gb <= 0:
    raise errors.UserError(f"cluster.slurm.memory_gb: {slurm.memory_gb} is not above 0")
  for option in slurm.sbatch:
    if not re.fullmatch(r"--[a-z][\w-]*(=.*)?", option):
      raise errors.UserError(
        f"cluster.slurm.sbatch: {option!r} is not an option; write it as '--name=value'"
      )


def require_slurm() -> None:
  """Raises a UserError if a command of Slurm is not on the path."""
  missing = [name for name in _SLURM if shutil.which(name) is None]
  if missing:
    raise errors.UserError(
      f"--cluster=slurm: {missing[0]} is not on the path; run this on a login node of the Slurm"
      " cluster, or use --cluster=local"
    )
