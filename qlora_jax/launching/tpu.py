"""Runs on Cloud TPUs: the gcloud and xpk commands of a config, printed or executed.

`vm` and `queued` start TPU-VMs, copy this package to every worker, install it and run the same
command on all; `xpk` gives the command to a GKE cluster as a workload. On every worker the command
is `python launch.py` without `--cluster`, which finds the other workers by itself.
"""

import dataclasses
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

import ml_collections

from qlora_jax import errors
from qlora_jax.launching import options

ROOT = pathlib.Path(__file__).parents[2]
_HOME = "qlora_jax"  # below a worker's home directory
_BUCKET = "bucket"  # where the bucket is mounted, below the same
_SENT = ("launch.py", "qlora_jax", "configs", "experiments", "pyproject.toml")
_CORES = ("v2", "v3", "v4", "v5p")  # named by TensorCores, two a chip; the others by chips
_RUNTIMES = {
  "v2": "tpu-ubuntu2204-base",
  "v3": "tpu-ubuntu2204-base",
  "v4": "tpu-ubuntu2204-base",
  "v5litepod": "v2-alpha-tpuv5-lite",
  "v5p": "v2-alpha-tpuv5",
  "v6e": "v2-alpha-tpuv6e",
}
_GCSFUSE = (
  "command -v gcsfuse >/dev/null || { curl -fsSL"
  " https://packages.cloud.google.com/apt/doc/apt-key.gpg |"
  " sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null;"
  ' echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc]'
  ' https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |'
  " sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null;"
  " sudo apt-get update -q; sudo apt-get install -yq gcsfuse; }"
)
_FAILED = ("FAILED", "SUSPENDING", "SUSPENDED", "DELETING")
_POLL = 15.0  # seconds


@dataclasses.dataclass(frozen=True)
class Step:
  """Commands that run side by side, and what for.

  Attributes:
    why: a line about it.
    commands: one a slice, or one.
    until: the first command is asked again until it prints this; '' runs it once.
    unless: if this command succeeds the step is done already.
  """

  why: str
  commands: tuple[tuple[str, ...], ...]
  until: str = ""
  unless: tuple[str, ...] = ()

  def shown(self) -> str:
    """As a shell would take it."""
    lines = [shlex.join(command) for command in self.commands]
    if self.until:
      lines = [f'until [ "$({lines[0]})" = {self.until} ]; do sleep {_POLL:g}; done']
    if self.unless:
      lines[0] = f"{shlex.join(self.unless)} >/dev/null 2>&1 || {lines[0]}"
    if len(lines) > 1:
      lines = [f"{line} &" for line in lines] + ["wait"]
    return "\n".join([f"# {self.why}", *lines])


def hosts(accelerator: str) -> int:
  """Worker machines of one slice: v5p-128 has 64 chips on 16.

  Raises:
    errors.UserError: no such accelerator.
  """
  matched = re.fullmatch(r"(v\d+[a-z]*)-(\d+)", accelerator)
  if not matched or matched[1] not in _RUNTIMES or int(matched[2]) < 1:
    raise errors.UserError(
      f"cluster.tpu.accelerator: {accelerator!r} is none; use one of"
      f" {', '.join(_RUNTIMES)} with a size, such as v5litepod-16 or v5p-128"
    )
  kind, size = matched[1], int(matched[2])
  if kind in _CORES:
    return max(1, size // 2 // 4)
  return 1 if size <= 8 else size // 4


def arguments_of_workers(arguments: list[str]) -> list[str]:
  """The flags of `launch.py` that every worker gets: those that do not say where to run."""
  joined: list[str] = []
  for each in arguments:  # `--flag value` becomes `--flag=value`
    if joined and not each.startswith("-") and "=" not in joined[-1]:
      joined[-1] += f"={each}"
    else:
      joined.append(each)
  names = ("cluster", "workdir", "dry_run", "max_parallel", "config.cluster")
  dropped = re.compile(rf"--?(no)?({'|'.join(map(re.escape, names))})([.=].*)?")
  return [each for each in joined if not dropped.fullmatch(each)]


def launch(
  arguments: list[str], workdir: str | None, tpu: ml_collections.ConfigDict, dry_run: bool
) -> None:
  """Prints or executes the commands that run `launch.py` on TPUs.

  Args:
    arguments: what the workers' `launch.py` gets, see `arguments_of_workers`.
    workdir: of the results; a path in the bucket where there is one.
    tpu: the config's `cluster.tpu`.
    dry_run: print only.

  Raises:
    errors.UserError: an option is wrong, a program is missing, or a command failed.
  """
  check(tpu)
  if not workdir:
    raise errors.UserError("--workdir: missing; give a directory for results and checkpoints")
  with tempfile.TemporaryDirectory() as folder:
    archive = "/tmp/qlora_jax.tar.gz" if dry_run else f"{folder}/qlora_jax.tar.gz"
    steps = plan(arguments, workdir, tpu, archive)
    if dry_run:
      print("\n\n".join(step.shown() for step in steps))
      return
    program = "xpk" if tpu.way == "xpk" else "gcloud"
    if shutil.which(program) is None:
      needed = "the Google Cloud CLI" if program == "gcloud" else "`pip install xpk`"
      raise errors.UserError(
        f"--cluster=tpu: {program} is not on the path; install {needed}, or see the commands with"
        " --dry_run"
      )
    for step in steps:
      _execute(step)


def check(tpu: ml_collections.ConfigDict) -> None:
  """Raises a UserError that names the first option that is wrong."""
  if tpu.way not in options.TPU_WAYS:
    raise errors.UserError(
      f"cluster.tpu.way: {tpu.way!r} is none; use one of {', '.join(options.TPU_WAYS)}"
    )
  if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", tpu.name):
    raise errors.UserError(
      f"cluster.tpu.name: {tpu.name!r} is not a name; use up to 40 of a-z, 0-9 and -"
    )
  if tpu.slices < 1:
    raise errors.UserError(f"cluster.tpu.slices: {tpu.slices} is not a number of at least 1")
  if tpu.way == "xpk":
    if not tpu.cluster:
      raise errors.UserError("cluster.tpu.cluster: missing; give the name of the GKE cluster")
    return
  workers = hosts(tpu.accelerator) * tpu.slices
  if tpu.slices > 1 and tpu.way == "vm":
    raise errors.UserError(
      f"cluster.tpu.slices: {tpu.slices} are started together by queued resources only;"
      " use cluster.tpu.way=queued"
    )
  if workers > 1 and not tpu.bucket:
    raise errors.UserError(
      f"cluster.tpu.bucket: missing; {workers} workers save into one directory: give the name of"
      " a Cloud Storage bucket"
    )


def plan(
  arguments: list[str], workdir: str, tpu: ml_collections.ConfigDict, archive: str
) -> list[Step]:
  """The steps from nothing to the results."""
  if tpu.way == "xpk":
    return [_workload(arguments, workdir, tpu)]
  where = [f"--{name}={tpu[name]}" for name in ("project", "zone") if tpu[name]]
  base = ("gcloud", "compute", "tpus")
  nodes = [tpu.name] if tpu.slices == 1 else [f"{tpu.name}-{i}" for i in range(tpu.slices)]
  version = tpu.version or _RUNTIMES[tpu.accelerator.split("-")[0]]
  more = [*where, *(["--spot"] if tpu.spot else [])]
  if tpu.network:
    more.append(f"--network={tpu.network}")

  def on_all(why, verb, *args):
    return Step(
      why,
      tuple(
        (*base, "tpu-vm", verb, *(each.replace("NODE", node) for each in args), *where)
        for node in nodes
      ),
    )

  def ssh(why, line):
    return on_all(why, "ssh", "NODE", "--worker=all", f"--command={line}")

  if tpu.way == "vm":
    created = [
      Step(
        "the TPU-VM",
        (
          (
            *base,
            "tpu-vm",
            "create",
            tpu.name,
            f"--accelerator-type={tpu.accelerator}",
            f"--version={version}",
            *more,
          ),
        ),
        unless=(*base, "tpu-vm", "describe", tpu.name, *where),
      )
    ]
    gone = (*base, "tpu-vm", "delete", tpu.name, "--quiet", *where)
  else:
    several = (
      [f"--node-count={tpu.slices}", f"--node-prefix={tpu.name}"]
      if tpu.slices > 1
      else [f"--node-id={tpu.name}"]
    )
    queued = (*base, "queued-resources")
    created = [
      Step(
        "the request",
        (
          (
            *queued,
            "create",
            tpu.name,
            *several,
            f"--accelerator-type={tpu.accelerator}",
            f"--runtime-version={version}",
            *more,
          ),
        ),
        unless=(*queued, "describe", tpu.name, *where),
      ),
      Step(
        "wait for the TPU-VMs",
        ((*queued, "describe", tpu.name, "--format=value(state.state)", *where),),
        until="ACTIVE",
      ),
    ]
    gone = (*queued, "delete", tpu.name, "--force", "--quiet", *where)
  sent = [*_SENT, *(name for name in tpu.packages if name not in _SENT)]
  run = run_line(
    ".venv/bin/python" if tpu.packages else tpu.python,
    arguments,
    f"{_BUCKET}/{workdir.strip('/')}" if tpu.bucket else workdir,
    hosts(tpu.accelerator) * tpu.slices > 1,
  )
  steps = [
    *created,
    Step(
      "this package",
      (
        (
          "tar",
          "-czf",
          archive,
          "--exclude=__pycache__",
          "--exclude=experiments/results",
          "-C",
          str(ROOT),
          *sent,
        ),
      ),
    ),
    on_all("to every worker", "scp", archive, "NODE:qlora_jax.tar.gz", "--worker=all"),
    ssh(
      "install it",
      f"mkdir -p {_HOME} && tar -xzf qlora_jax.tar.gz -C {_HOME} && cd {_HOME}"
      f" && {setup_line(tpu)}",
    ),
    ssh("run on every worker", f"cd {_HOME} && {run}"),
  ]
  if not tpu.bucket:
    local = str(pathlib.Path(workdir).parent)
    steps.append(
      Step(
        "the results",
        (
          (
            *base,
            "tpu-vm",
            "scp",
            "--recurse",
            f"{tpu.name}:{_HOME}/{workdir}",
            local,
            "--worker=0",
            *where,
          ),
        ),
      )
    )
  if tpu.delete:
    steps.append(Step("delete it", (gone,)))
  else:
    said = f"it goes on costing: {shlex.join(gone)}"
    steps.append(Step("not deleted", (("echo", said),)))
  return steps


def setup_line(tpu: ml_collections.ConfigDict) -> str:
  """What every worker does once before the run, as one shell line."""
  lines = ["set -e", *tpu.setup]
  if tpu.packages:
    lines.append(f"{tpu.python} -m venv .venv")
    for name in tpu.packages:
      alone = "" if name == "requirements.txt" else " --no-deps --require-hashes"
      lines.append(f".venv/bin/pip install -q{alone} -r {name}")
    lines.append(f".venv/bin/pip install -q {shlex.quote(_jax_for_tpus())}")
  if tpu.bucket:
    lines += [
      _GCSFUSE,
      f"mkdir -p {_BUCKET}",
      f"mountpoint -q {_BUCKET} || gcsfuse --implicit-dirs {shlex.quote(tpu.bucket)} {_BUCKET}",
    ]
  return "; ".join(lines)


def run_line(python: str, arguments: list[str], workdir: str, several: bool) -> str:
  """What every worker runs, below the package's directory, as one shell line."""
  command = [python, "launch.py", *arguments, f"--workdir={workdir}"]
  others = "QLORA_JAX_DISTRIBUTED=1 " if several else ""
  return f"PYTHONPATH=. {others}{shlex.join(command)}"


def _workload(arguments: list[str], workdir: str, tpu: ml_collections.ConfigDict) -> Step:
  """`xpk workload create`: builds an image of this package, or takes `cluster.tpu.image`."""
  run = shlex.join(["python", "launch.py", *arguments, f"--workdir={workdir}"])
  lines = ["set -e", *tpu.setup]
  source = ["--base-docker-image=python:3.11", f"--script-dir={ROOT}"]
  if tpu.image:
    source = [f"--docker-image={tpu.image}"]
  else:
    for name in tpu.packages:
      alone = "" if name == "requirements.txt" else " --no-deps --require-hashes"
      lines.append(f"pip install -q{alone} -r {name}")
    lines.append(f"pip install -q {shlex.quote(_jax_for_tpus())}")
  lines.append(run)
  return Step(
    "the workload",
    (
      (
        "xpk",
        "workload",
        "create",
        f"--workload={tpu.name}",
        f"--cluster={tpu.cluster}",
        *(f"--{name}={tpu[name]}" for name in ("project", "zone") if tpu[name]),
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


def _jax_for_tpus() -> str:
  pinned = (ROOT / "requirements.txt").read_text()
  return f"jax[tpu]=={re.search(r'^jax==(.*)$', pinned, re.MULTILINE)[1]}"


def _execute(step: Step) -> None:
  print(step.shown(), file=sys.stderr, flush=True)
  if step.unless and not subprocess.run(step.unless, capture_output=True, check=False).returncode:
    print("there already", file=sys.stderr, flush=True)
    return
  if step.until:
    _wait(step)
    return
  running = [subprocess.Popen(command) for command in step.commands]
  try:
    codes = [process.wait() for process in running]
  except KeyboardInterrupt:
    for process in running:
      process.terminate()
    raise
  for command, code in zip(step.commands, codes, strict=True):
    if code:
      told = shlex.join(command)
      raise errors.UserError(
        f"--cluster=tpu: {told[:200]} ended with {code}; mend what it says and give the command"
        " again"
      )


def _wait(step: Step) -> None:
  command, last = step.commands[0], ""
  while True:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    state = done.stdout.strip()
    if done.returncode or state in _FAILED:
      raise errors.UserError(
        f"--cluster=tpu: the request is {state or 'unknown'}: {done.stderr.strip()[-200:]};"
        " delete it, ask for another zone or later"
      )
    if state == step.until:
      return
    if state != last:
      print(f"{state}, waiting for {step.until}", file=sys.stderr, flush=True)
    last = state
    time.sleep(_POLL)
