"""A plan as tables on the terminal."""

from typing import Any

from rich import box, console, table

from qlora_jax.planning import hardware, plan

_KINDS = {
  "base": "frozen weights",
  "adapter": "trained weights",
  "optimizer": "AdamW's two moments",
  "batch": "tokens, masks, answer places",
  "activations": "kept for the gradient",
  "temporaries": "everything else at the peak",
}
_RESOURCES = {
  "compute": "products",
  "memory": "HBM",
  "ici": "network of a slice",
  "dcn": "between slices",
}


def show(found: dict[str, Any], out: console.Console) -> None:
  """Prints a plan."""
  sizes = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
  adapter = found["adapter"]
  out.print(
    f"{found['slices']} x {found['topology']}, {found['chips']} chips: {sizes};"
    f" {found['rows']} x {found['length']} tokens in {found['micro_batches']} part(s);"
    f" remat {found['remat']}; {found['blocks']} blocks of {found['layers_per_block']} layers;"
    f" {adapter['method']} R {adapter['rank']}"
    + (f" M {adapter['atoms']} k {adapter['top_k']}" if adapter["family"] == "queryable" else ""),
    highlight=False,
    soft_wrap=True,
  )
  out.print(_memory(found))
  if found["collectives"]:
    out.print(_collectives(found))
  out.print(_work(found))
  host, compiled = found["host_memory"], found["compile"]
  how = "not compiled: memory is estimated, collectives and their time are left out"
  if found["compiled"]:
    how = (
      f"compiled in {compiled['compile_seconds']:.0f} s (traced in"
      f" {compiled['trace_seconds']:.0f} s, {compiled['host_peak_bytes'] / 1e9:.1f} GB)"
    )
  out.print(
    f"host: at most {host['needed'] / hardware.GIB:.0f} of {host['limit'] / hardware.GIB:.0f} GiB"
    f" for {host['chips']} chips; {how}",
    highlight=False,
    soft_wrap=True,
  )
  out.print(plan.verdict(found), highlight=False, soft_wrap=True)


def _memory(found) -> table.Table:
  hbm = found["hbm"]
  shown = _table("HBM a chip", ("GiB", "right"), ("", "left"))
  for name, size in hbm["kinds"].items():
    told = _KINDS[name]
    if hbm["activations_are_estimated"] and name in ("activations", "temporaries"):
      told += (
        " (estimated)"
        if not found["compiled"]
        else (" (estimated: the compiler tells the sum only)")
      )
    shown.add_row(name, f"{size / hardware.GIB:.2f}", told)
  shown.add_section()
  shown.add_row(
    "total",
    f"{hbm['needed'] / hardware.GIB:.2f}",
    f"of {hbm['limit'] / hardware.GIB:.2f}: {'fits' if found['fits'] else 'does not fit'}",
  )
  return shown


def _collectives(found) -> table.Table:
  shown = _table("collectives a step", ("times", "right"), ("GiB a chip", "right"))
  for kind, each in found["collectives"].items():
    shown.add_row(kind, f"{each['count']:,}", f"{each['bytes'] / hardware.GIB:.2f}")
  return shown


def _work(found) -> table.Table:
  work, times = found["flops"], found["step_time"]
  shown = _table("a step", ("", "right"), ("", "left"))
  shown.add_row("model FLOPs", f"{work['model']:.3g}", "analytic, without recomputation")
  shown.add_row("hardware FLOPs", f"{work['hardware']:.3g}", f"with remat {found['remat']}")
  share = 100 * work["routing"] / work["model"]
  shown.add_row("routing", f"{work['routing']:.3g}", f"{share:.3f} % of the model FLOPs")
  if times is None:
    return shown
  shown.add_section()
  for name, told in _RESOURCES.items():
    shown.add_row(name, f"{times[name]:.3f} s", told)
  shown.add_row(
    "step",
    f"{times['estimate']:.3f} s",
    f"overlapped, bound by {times['bound']}; {times['serial']:.3f} s if nothing overlaps",
  )
  shown.add_row(
    "MFU",
    f"{100 * times['mfu']:.0f} %",
    f"assuming {100 * times['assumed_utilisation']:.0f} % of the published peak in products",
  )
  shown.add_row("tokens a second", f"{times['tokens_per_second']:,.0f}", "all chips together")
  return shown


def _table(title: str, *columns: tuple[str, str]) -> table.Table:
  made = table.Table(box=box.SIMPLE, pad_edge=False)
  made.add_column(title)
  for name, justify in columns:
    made.add_column(name, justify=justify)
  return made
