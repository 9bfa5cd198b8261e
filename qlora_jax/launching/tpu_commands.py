"""The gcloud and xpk commands that run `launch.py` on Cloud TPUs; `tpu.py` prints or executes them.

`vm` and `queued` start TPU-VMs, copy this package to every worker, install it and run the same
command on all; `xpk` submits the command to a GKE cluster as a workload. On every worker the
command is `python launch.py` without `--cluster`, which finds the other workers automatically.
"""

import dataclasses
import pathlib
import re
import shlex

import ml_collections

from qlora_jax import errors

POLL_SECONDS = 15.0
ROOT = pathlib.Path(__file__).parents[2]
_HOME = "qlora_jax"  # folder of the package in a worker's home directory
_BUCKET = "bucket"  # mount point of the bucket, in the folder of the package
_SENT = ("launch.py", "qlora_jax", "configs", "experiments", "pyproject.toml")
# Types whose size counts TensorCores, two per chip; the size of the other types counts chips.
_CORES = ("v2", "v3", "v4", "v5p")
_RUNTIMES = {
  "v2": "tpu-ubuntu2204-base",
  "v3": "tpu-ubuntu2204-base",
  "v4": "tpu-ubuntu2204-base",
  "v5litepod": "v2-alpha-tpuv5-lite",
  "v5p": "v2-alpha-tpuv5",
  "v6e": "v2-alpha-tpuv6e",
}
_TPUS = ("gcloud", "compute", "tpus")
_GCSFUSE = (
  "command -v gcsfuse >/dev/null || { curl -fsSL"
  " https://packages.cloud.google.com/apt/doc/apt-key.gpg |"
  " sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null;"
  ' echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc]'
  ' https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |'
  " sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null;"
  " sudo apt-get update -q; sudo apt-get install -yq gcsfuse; }"
)

_Command = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Step:
  """Commands that run side by side.

  Attributes:
    why: one line on their purpose.
    commands: one per slice, or one.
    until: the first command is repeated until it prints this; '' runs the commands once.
    unless: the step is skipped if this command succeeds.
  """

  why: str
  commands: tuple[_Command, ...]
  until: str = ""
  unless: _Command = ()

  def shown(self) -> str:
    """The step as lines of shell."""
    lines = [shlex.join(command) for command in self.commands]
    if self.until:
      lines = [f'until [ "$({lines[0]})" = {self.until} ]; do sleep {POLL_SECONDS:g}; done']
    if self.unless:
      lines[0] = f"{shlex.join(self.unless)} >/dev/null 2>&1 || {lines[0]}"
    if len(lines) > 1:
      lines = [f"{line} &" for line in lines] + ["wait"]
    return "\n".join([f"# {self.why}", *lines])


def hosts(accelerator: str) -> int:
  """The number of worker machines per slice: v5p-128 has 64 chips on 16.

  Raises:
    errors.UserError: the accelerator is unknown.
  """
  matched = re.fullmatch(r"(v\d+[a-z]*)-(\d+)", accelerator)
  if not matched or matched[1] not in _RUNTIMES or int(matched[2]) < 1:
    raise errors.UserError(
      f"cluster.tpu.accelerator: {accelerator!r} is unknown; use one of"
      f" {', '.join(_RUNTIMES)} with a size, such as v5litepod-16 or v5p-128"
    )
  kind, size = matched[1], int(matched[2])
  if kind in _CORES:
    return max(1, size // 2 // 4)
  return 1 if size <= 8 else size // 4


def plan(
  arguments: list[str], workdir: str, tpu: ml_collections.ConfigDict, archive: str
) -> list[Step]:
  """The steps from an empty project to the results.

  Args:
    arguments: flags of the workers' `launch.py`.
    workdir: of the results; a path in the bucket if there is one.
    tpu: the config's `cluster.tpu`, checked.
    archive: path of the package's archive on this machine.
  """
  if tpu.way == "xpk":
    return [_workload(arguments, workdir, tpu)]
  created, delete = _vm(tpu) if tpu.way == "vm" else _queued(tpu)
  sent = [*_SENT, *(name for name in tpu.packages if name not in _SENT)]
  pack = ("tar", "-czf", archive, "--exclude=__pycache__", "--exclude=experiments/results")
  run = run_line(
    ".venv/bin/python" if tpu.packages else tpu.python,
    arguments,
    f"{_BUCKET}/{workdir.strip('/')}" if tpu.bucket else workdir,
    hosts(tpu.accelerator) * tpu.slices > 1,
  )
  unpack = f"mkdir -p {_HOME} && tar -xzf qlora_jax.tar.gz -C {_HOME} && cd {_HOME}"
  steps = [
    *created,
    Step("this package", ((*pack, "-C", str(ROOT), *sent),)),
    _on_all(tpu, "to every worker", "scp", archive, "NODE:qlora_jax.tar.gz", "--worker=all"),
    _ssh(tpu, "install it", f"{unpack} && {setup_line(tpu)}"),
    _ssh(tpu, "run on every worker", f"cd {_HOME} && {run}"),
  ]
  if not tpu.bucket:
    remote, local = f"{tpu.name}:{_HOME}/{workdir}", str(pathlib.Path(workdir).parent)
    copy = (*_TPUS, "tpu-vm", "scp", "--recurse", remote, local, "--worker=0", *_where(tpu))
    steps.append(Step("the results", (copy,)))
  if tpu.delete:
    steps.append(Step("delete it", (delete,)))
  else:
    warning = f"it still costs money; to delete it: {shlex.join(delete)}"
    steps.append(Step("not deleted", (("echo", warning),)))
  return steps


def _where(tpu: ml_collections.ConfigDict) -> tuple[str, ...]:
  return tuple(f"--{name}={tpu[name]}" for name in ("project", "zone") if tpu[name])


def _creation_options(tpu: ml_collections.ConfigDict) -> tuple[str, ...]:
  spot = ("--spot",) if tpu.spot else ()
  network = (f"--network={tpu.network}",) if tpu.network else ()
  return (*_where(tpu), *spot, *network)


def _runtime(tpu: ml_collections.ConfigDict) -> str:
  return tpu.version or _RUNTIMES[tpu.accelerator.split("-")[0]]


def _vm(tpu: ml_collections.ConfigDict) -> tuple[list[Step], _Command]:
  """The steps that create a TPU-VM, and the command that deletes it."""
  vm, where = (*_TPUS, "tpu-vm"), _where(tpu)
  types = (f"--accelerator-type={tpu.accelerator}", f"--version={_runtime(tpu)}")
  create = (*vm, "create", tpu.name, *types, *_creation_options(tpu))
  created = [Step("the TPU-VM", (create,), unless=(*vm, "describe", tpu.name, *where))]
  return created, (*vm, "delete", tpu.name, "--quiet", *where)


def _queued(tpu: ml_collections.ConfigDict) -> tuple[list[Step], _Command]:
  """The steps that request TPU-VMs and wait for them, and the command that deletes them."""
  queued, where = (*_TPUS, "queued-resources"), _where(tpu)
  nodes = (f"--node-id={tpu.name}",)
  if tpu.slices > 1:
    nodes = (f"--node-count={tpu.slices}", f"--node-prefix={tpu.name}")
  types = (f"--accelerator-type={tpu.accelerator}", f"--runtime-version={_runtime(tpu)}")
  create = (*queued, "create", tpu.name, *nodes, *types, *_creation_options(tpu))
  state = (*queued, "describe", tpu.name, "--format=value(state.state)", *where)
  created = [
    Step("the request", (create,), unless=(*queued, "describe", tpu.name, *where)),
    Step("wait for the TPU-VMs", (state,), until="ACTIVE"),
  ]
  return created, (*queued, "delete", tpu.name, "--force", "--quiet", *where)


def _on_all(tpu: ml_collections.ConfigDict, why: str, verb: str, *arguments: str) -> Step:
  """A command on the TPU-VM of every slice; NODE in the arguments stands for its name."""
  nodes = [tpu.name] if tpu.slices == 1 else [f"{tpu.name}-{i}" for i in range(tpu.slices)]
  return Step(
    why,
    tuple(
      (
        *_TPUS,
        "tpu-vm",
        verb,
        *(argument.replace("NODE", node) for argument in arguments),
        *_where(tpu),
      )
      for node in nodes
    ),
  )


def _ssh(tpu: ml_collections.ConfigDict, why: str, line: str) -> Step:
  return _on_all(tpu, why, "ssh", "NODE", "--worker=all", f"--command={line}")


def setup_line(tpu: ml_collections.ConfigDict) -> str:
  """The preparation of every worker before the training, as one shell line."""
  lines = ["set -e", *tpu.setup]
  if tpu.packages:
    lines.append(f"{tpu.python} -m venv .venv")
    lines += _pip_lines(tpu, ".venv/bin/pip")
  if tpu.bucket:
    lines += [
      _GCSFUSE,
      f"mkdir -p {_BUCKET}",
      f"mountpoint -q {_BUCKET} || gcsfuse --implicit-dirs {shlex.quote(tpu.bucket)} {_BUCKET}",
    ]
  return "; ".join(lines)


def run_line(python: str, arguments: list[str], workdir: str, several: bool) -> str:
  """The training command of every worker, in the package's directory, as one shell line.

  Args:
    python: the interpreter.
    arguments: flags of `launch.py`.
    workdir: of the results.
    several: whether there are several workers.
  """
  command = [python, "launch.py", *arguments, f"--workdir={workdir}"]
  distributed = "QLORA_JAX_DISTRIBUTED=1 " if several else ""
  return f"PYTHONPATH=. {distributed}{shlex.join(command)}"


def _workload(arguments: list[str], workdir: str, tpu: ml_collections.ConfigDict) -> Step:
  """`xpk workload create`: builds an image of this package, or uses `cluster.tpu.image`."""
  lines = ["set -e", *tpu.setup]
  if tpu.image:
    source = [f"--docker-image={tpu.image}"]
  else:
    source = ["--base-docker-image=python:3.11", f"--script-dir={ROOT}"]
    lines += _pip_lines(tpu, "pip")
  lines.append(shlex.join(["python", "launch.py", *arguments, f"--workdir={workdir}"]))
  return Step(
    "the workload",
    (
      (
        "xpk",
        "workload",
        "create",
        f"--workload={tpu.name}",
        f"--cluster={tpu.cluster}",
        *_where(tpu),
        f"--tpu-type={tpu.topology or tpu.accelerator}",
        f"--num-slices={tpu.slices}",
        *(["--spot"] if tpu.spot else []),
        *source,
        "--env=QLORA_JAX_DISTRIBUTED=1",
        "--env=PYTHONPATH=.",
        "--max-restarts=50",
        f"--command={'; '.join(lines)}",
      ),
    ),
  )


def _pip_lines(tpu: ml_collections.ConfigDict, pip: str) -> list[str]:
  lines = []
  for name in tpu.packages:
    pinned = "" if name == "requirements.txt" else " --no-deps --require-hashes"
    lines.append(f"{pip} install -q{pinned} -r {name}")
  return [*lines, f"{pip} install -q {shlex.quote(_jax_for_tpus())}"]


def _jax_for_tpus() -> str:
  requirements = (ROOT / "requirements.txt").read_text()
  return f"jax[tpu]=={re.search(r'^jax==(.*)$', requirements, re.MULTILINE)[1]}"
