"""Compares a fine-tuning step with PEFT in torch: tokens per second and peak memory on this CPU.

  python -m benchmarks.peft_step --out=peft_step.json

SmolLM2-135M-Instruct, LoRA of rank 8 on all seven maps, AdamW with clipping, loss on answer tokens.
Both sides have the same weights, rows and precision. First one process compares loss and gradients
of both sides. Then every case starts one process per side. All sides compile and warm up before the
first is timed, and they are timed in turn, so that noise of the machine affects all of them. The
CPU seconds of all threads are reported too, because other programs disturb them less. Memory is the
peak resident set of a side's process, including loading and compilation.

The sides are in `peft_sides.py`. `PEFT, answers` computes logits at answer tokens only, as our loss
does; PEFT's loss computes all logits.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time

from benchmarks import peft_sides

SIDES = {
  "LoRA": "qlora_jax, LoRA r8",
  "Queryable": "qlora_jax, Queryable",
  "PEFT": "PEFT, LoRA r8",
  "PEFT answers": "PEFT, answers",
}
WARM = 2  # untimed steps


def child(options) -> None:
  """A child process: answers on standard output.

  'compare' and 'limit' print one line of JSON. A side reads numbers of steps from standard input,
  prints the time of each, and at the end of the input its peak memory.
  """
  if options.child == "compare":
    print(json.dumps(peft_sides.compare(options)), flush=True)
    return
  if options.child == "limit":
    print(
      json.dumps(
        {
          "flops_per_token": {
            shape: peft_sides.flops_per_token(options, shape) for shape in options.shape.split(",")
          },
          "products": peft_sides.products(options.precision),
        }
      ),
      flush=True,
    )
    return
  side = peft_sides.make(options.child, options)
  losses = [side.step() for _ in range(WARM)]  # compiles, and fills the allocators
  print(json.dumps({"losses": losses}), flush=True)
  for line in sys.stdin:
    began, spent = time.perf_counter(), time.process_time()
    for _ in range(int(line)):
      side.step()
    print(
      json.dumps(
        {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - spent}
      ),
      flush=True,
    )
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  print(json.dumps({"peak_bytes": peak}), flush=True)


class Process:
  """A child process of the benchmark."""

  def __init__(self, name: str, weights: str, precision: str, shape: str):
    command = [
      sys.executable,
      "-m",
      "benchmarks.peft_step",
      f"--child={name}",
      f"--weights={weights}",
      f"--precision={precision}",
      f"--shape={shape}",
    ]
    self.pipe = subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env={**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"},
    )

  def read(self) -> dict:
    line = self.pipe.stdout.readline()
    if not line:
      raise SystemExit(f"a measuring process ended with code {self.pipe.wait()}")
    return json.loads(line)

  def steps(self, count: int) -> tuple[float, float]:
    """Runs `count` steps; returns wall seconds and CPU seconds of all threads, per step."""
    print(count, file=self.pipe.stdin, flush=True)
    times = self.read()
    return times["seconds"] / count, times["cpu_seconds"] / count

  def end(self) -> int:
    """Ends the process; returns its peak memory in bytes."""
    self.pipe.stdin.close()
    return self.read()["peak_bytes"]


def measure(options, precision: str, shape: str) -> dict:
  """Seconds per step of every turn, peak memory and first losses of every side.

  Raises:
    AssertionError: the first losses of the sides differ.
  """
  sides = options.sides.split(",")
  running = {side: Process(side, options.weights, precision, shape) for side in sides}
  # Waits until all sides are ready.
  first = {side: process.read()["losses"] for side, process in running.items()}
  times = {side: [] for side in sides}
  for turn in range(options.turns):
    for side in sides if turn % 2 == 0 else reversed(sides):
      times[side].append(running[side].steps(options.steps))
  results = {
    side: {
      "seconds": [wall for wall, _ in times[side]],
      "cpu_seconds": [cpu for _, cpu in times[side]],
      "losses": first[side],
      "peak_bytes": process.end(),
    }
    for side, process in running.items()
  }
  # All sides start as the base, because B = 0.
  starts = [losses[0] for losses in first.values()]
  tolerance = 1e-4 if precision == "float32" else 0.02
  assert max(starts) - min(starts) < tolerance * min(starts), f"first losses differ: {first}"
  return results


def table(report: dict) -> str:
  """A Markdown table: medians, and their ratios to PEFT's step."""
  lines = [
    "| precision | rows | side | tokens/s | of PEFT | of the limit | CPU seconds per step"
    " | peak memory, MiB | of PEFT |",
    "| --- " * 9 + "|",
  ]
  for case in report["cases"]:
    rows, length = map(int, case["shape"].split("x"))
    rate = {k: rows * length / statistics.median(v["seconds"]) for k, v in case["sides"].items()}
    for side, result in case["sides"].items():
      peak, peft_peak = result["peak_bytes"], case["sides"]["PEFT"]["peak_bytes"]
      lines.append(
        f"| {case['precision']} | {rows} × {length} | {SIDES[side]} | {rate[side]:.0f}"
        f" | {rate[side] / rate['PEFT']:.2f} | {rate[side] / case['limit']:.2f}"
        f" | {statistics.median(result['cpu_seconds']):.2f}"
        f" | {peak / 2**20:.0f} | {peak / peft_peak:.2f} |"
      )
  return "\n".join(lines)


def main(options) -> None:
  began = time.monotonic()
  agreement = Process("compare", options.weights, "float32", "2x64").read()
  gap = abs(agreement["ours"] - agreement["theirs"]) / agreement["theirs"]
  gradients = agreement["gradients"]
  print(
    f"losses agree: {agreement['ours']:.6f} and {agreement['theirs']:.6f} nats over"
    f" {agreement['answers']} answer tokens; gradients differ by at most"
    f" {gradients['lora_A']:.1e} (lora_a) and {gradients['lora_B']:.1e} (lora_b) of their norm",
    flush=True,
  )
  assert gap < 1e-4 and max(gradients.values()) < 1e-3, agreement
  report = {"agreement": agreement, "cases": []}
  for precision in options.precisions.split(","):
    limit = Process("limit", options.weights, precision, options.shapes).read()
    best = max(limit["products"].values())
    for shape, flops in limit["flops_per_token"].items():
      sides = measure(options, precision, shape)
      rate = best / flops
      report["cases"].append(
        {
          "precision": precision,
          "shape": shape,
          "limit": rate,
          "flops_per_token": flops,
          "products": limit["products"],
          "sides": sides,
        }
      )
      print(
        f"{precision} {shape}: limit {rate:.0f} tokens/s, {flops / 1e9:.3f} GFLOP"
        f" per token at {best / 1e9:.0f} GFLOP/s",
        flush=True,
      )
  report["seconds"] = time.monotonic() - began
  print(f"\n{table(report)}\n\n{report['seconds']:.0f} s")
  if options.out:
    pathlib.Path(options.out).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--weights", default="smollm2-135m-instruct", help="name or folder, a Llama")
  parser.add_argument("--shapes", default="4x128,8x256", help="rows x tokens, comma-separated")
  parser.add_argument("--precisions", default="float32,bfloat16")
  parser.add_argument("--sides", default="LoRA,Queryable,PEFT", help=f"some of {', '.join(SIDES)}")
  parser.add_argument("--turns", type=int, default=3, help="number of timings per side")
  parser.add_argument("--steps", type=int, default=1, help="steps per timing")
  parser.add_argument("--out", help="JSON file of all measurements")
  parser.add_argument("--child", help=argparse.SUPPRESS)
  parser.add_argument("--precision", default="float32", help=argparse.SUPPRESS)
  parser.add_argument("--shape", default="4x128", help=argparse.SUPPRESS)
  flags = parser.parse_args()
  if "PEFT" not in flags.sides.split(",") or set(flags.sides.split(",")) - set(SIDES):
    parser.error(f"--sides: give PEFT, and others of {', '.join(SIDES)}")
  child(flags) if flags.child else main(flags)
