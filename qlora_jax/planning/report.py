"""Shows a plan as tables on the terminal."""

from typing import Any

from rich import box, console, table

from qlora_jax.planning import hardware, plan

_KINDS = {
  "base": "frozen weights",
  "adapter": "trained weights",
  "optimizer": "AdamW's two moments",
  "batch": "tokens, masks, answer places",
  "activations": "saved for the gradient",
  "temporaries": "everything else at the peak",
}
_RESOURCES = {
  "compute": "matrix products",
  "memory": "HBM",
  "ici": "network of a slice",
  "dcn": "between slices",
}


def show(step_plan: dict[str, Any], out: console.Console) -> None:
  """Prints a plan in the form of `plan.make`."""
  sizes = " x ".join(f"{axis} {size}" for axis, size in step_plan["mesh"].items())
  adapter = step_plan["adapter"]
  out.print(
    f"{step_plan['slices']} x {step_plan['topology']}, {step_plan['chips']} chips: {sizes};"
    f" {step_plan['rows']} x {step_plan['length']} tokens in {step_plan['micro_batches']} part(s);"
    f" remat {step_plan['remat']};"
    f" {step_plan['blocks']} blocks of {step_plan['layers_per_block']} layers;"
    f" {adapter['family']} R {adapter['rank']}"
    + (f" M {adapter['atoms']} k {adapter['top_k']}" if adapter["family"] == "queryable" else ""),
    highlight=False,
    soft_wrap=True,
  )
  out.print(_memory(step_plan))
  if step_plan["collectives"]:
    out.print(_collectives(step_plan))
  out.print(_work(step_plan))
  host, compiled = step_plan["host_memory"], step_plan["compile"]
  source = "not compiled: memory is estimated, collectives and their time are omitted"
  if step_plan["compiled"]:
    source = (
      f"compiled in {compiled['compile_seconds']:.0f} s (traced in"
      f" {compiled['trace_seconds']:.0f} s, {compiled['host_peak_bytes'] / 1e9:.1f} GB)"
    )
  out.print(
    f"host: at most {host['needed'] / hardware.GIB:.0f} of {host['limit'] / hardware.GIB:.0f} GiB"
    f" for {host['chips']} chips; {source}",
    highlight=False,
    soft_wrap=True,
  )
  out.print(plan.verdict(step_plan), highlight=False, soft_wrap=True)


def _memory(step_plan) -> table.Table:
  hbm = step_plan["hbm"]
  shown = _table("HBM per chip", ("GiB", "right"), ("", "left"))
  for name, size in hbm["kinds"].items():
    description = _KINDS[name]
    if hbm["activations_are_estimated"] and name in ("activations", "temporaries"):
      reason = ": the compiler reports only the sum" if step_plan["compiled"] else ""
      description += f" (estimated{reason})"
    shown.add_row(name, f"{size / hardware.GIB:.2f}", description)
  shown.add_section()
  shown.add_row(
    "total",
    f"{hbm['needed'] / hardware.GIB:.2f}",
    f"of {hbm['limit'] / hardware.GIB:.2f}: {'fits' if step_plan['fits'] else 'does not fit'}",
  )
  return shown


def _collectives(step_plan) -> table.Table:
  shown = _table("collectives per step", ("number", "right"), ("GiB per chip", "right"))
  for kind, total in step_plan["collectives"].items():
    shown.add_row(kind, f"{total['count']:,}", f"{total['bytes'] / hardware.GIB:.2f}")
  return shown


def _work(step_plan) -> table.Table:
  work, times = step_plan["flops"], step_plan["step_time"]
  shown = _table("per step", ("", "right"), ("", "left"))
  shown.add_row("model FLOPs", f"{work['model']:.3g}", "analytic, without recomputation")
  shown.add_row("hardware FLOPs", f"{work['hardware']:.3g}", f"with remat {step_plan['remat']}")
  share = 100 * work["routing"] / work["model"]
  shown.add_row("routing", f"{work['routing']:.3g}", f"{share:.3f} % of the model FLOPs")
  if times is None:
    return shown
  shown.add_section()
  for name, description in _RESOURCES.items():
    shown.add_row(name, f"{times[name]:.3f} s", description)
  shown.add_row(
    "step",
    f"{times['estimate']:.3f} s",
    f"overlapped, bound by {times['bound']}; {times['serial']:.3f} s if nothing overlaps",
  )
  shown.add_row(
    "MFU",
    f"{100 * times['mfu']:.0f} %",
    f"assuming {100 * times['assumed_utilisation']:.0f} % of the published peak in matrix products",
  )
  shown.add_row("tokens per second", f"{times['tokens_per_second']:,.0f}", "on all chips")
  return shown


def _table(title: str, *columns: tuple[str, str]) -> table.Table:
  shown = table.Table(box=box.SIMPLE, pad_edge=False)
  shown.add_column(title)
  for name, justify in columns:
    shown.add_column(name, justify=justify)
  return shown
