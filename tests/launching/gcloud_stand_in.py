"""A stand-in for `gcloud compute tpus` and `gcsfuse`; every TPU worker is a process on this host.

A worker has a separate home directory and environment; the environment identifies the other
workers, as the metadata of a TPU worker does. The program reads two variables: STAND_IN, a
directory, and STAND_IN_WORKERS, the number of workers per slice.
"""

import os
import pathlib
import shutil
import socket
import subprocess
import sys

ROOT = pathlib.Path(os.environ["STAND_IN"])
COUNT = int(os.environ["STAND_IN_WORKERS"])


def free_port():
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def homes(node):
  return sorted((ROOT / "nodes" / node).glob("worker-*"))


def create(node):
  for index in range(COUNT):
    (ROOT / "nodes" / node / f"worker-{index}").mkdir(parents=True)


def ssh(node, command):
  port = free_port()
  workers = [
    subprocess.Popen(
      ["bash", "-c", command],
      cwd=home,
      env={
        # A shared cache, so that not every new worker searches for fonts.
        "XDG_CACHE_HOME": str(pathlib.Path.home() / ".cache"),
        "HOME": str(home),
        "PATH": os.environ["PATH"],
        "STAND_IN": str(ROOT),
        "STAND_IN_WORKERS": str(COUNT),
        "QLORA_JAX_COORDINATOR": f"127.0.0.1:{port}",
        "QLORA_JAX_PROCESSES": str(COUNT),
        "QLORA_JAX_PROCESS": str(index),
      },
      stdout=(home / "stdout").open("a"),
      stderr=(home / "stderr").open("a"),
    )
    for index, home in enumerate(homes(node))
  ]
  codes = [worker.wait() for worker in workers]
  for home in homes(node):
    sys.stderr.write((home / "stderr").read_text()[-2000:])
  return max(codes, key=abs)


def scp(source, target, which):
  if ":" in target:
    node, path = target.split(":")
    for home in homes(node):
      shutil.copy(source, home / path)
  else:
    node, path = source.split(":")
    shutil.copytree(homes(node)[which] / path, pathlib.Path(target) / pathlib.Path(path).name)


def main(arguments):
  with (ROOT / "calls").open("a") as log:
    log.write(" ".join(arguments) + "\n")
  positional = [argument for argument in arguments if not argument.startswith("--")]
  flags = dict(
    argument[2:].partition("=")[::2] for argument in arguments if argument.startswith("--")
  )
  _, _, kind, verb, *rest = positional
  if verb == "create":
    count = int(flags.get("node-count", 1))
    names = [f"{rest[0]}-{index}" for index in range(count)] if count > 1 else rest[:1]
    for name in names:
      create(name)
    (ROOT / rest[0]).touch()
  elif verb == "describe":
    if not (ROOT / rest[0]).exists():
      return 1
    print("ACTIVE")
  elif verb == "scp":
    scp(*rest, int(flags["worker"]) if flags["worker"] != "all" else 0)
  elif verb == "ssh":
    return ssh(rest[0], flags["command"])
  elif verb == "delete":
    (ROOT / rest[0]).unlink()
  else:
    raise SystemExit(f"{kind} {verb}: unknown")
  return 0


if __name__ == "__main__":
  program = pathlib.Path(sys.argv[0]).name
  if program == "gcsfuse":  # --implicit-dirs BUCKET FOLDER
    bucket, folder = ROOT / "buckets" / sys.argv[-2], pathlib.Path(sys.argv[-1])
    bucket.mkdir(parents=True, exist_ok=True)
    folder.rmdir()
    folder.symlink_to(bucket)
  else:
    sys.exit(main(sys.argv[1:]))
