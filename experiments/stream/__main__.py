"""A stream of tasks: forgetting and forward transfer, with frozen atoms and with free ones.

python -m experiments.stream --workdir=runs/stream    # trains what is missing, then writes tables
python -m experiments.stream                         # tables and figure from the committed results
"""

import pathlib

from experiments import command, units
from experiments.stream import figure, tables, train
from qlora_jax.studies import study

RESULTS = pathlib.Path(__file__).parents[1] / "results" / "stream"


def main(arguments: list[str] | None = None) -> None:
  given = command.of_units("stream", __doc__, RESULTS).parse_args(arguments)
  if given.workdir is not None:
    config, points = command.load(given.config)
    study.prepare(given.workdir, config, command.given())
    bench = units.Bench(config, given.workdir, train.unit_count(points), given.limit)
    tables.write(train.run(bench, points), given.results)
  found = tables.read(given.results)
  summary = tables.summarise(found)
  summary.to_csv(given.results / "summary.csv", index=False, float_format="%.6g")
  (given.results / "summary.md").write_text(tables.markdown(summary))
  figure.draw(found, summary, given.results / "stream")
  print(tables.markdown(summary))
  print(f"results: {given.results}")


if __name__ == "__main__":
  command.run(main)
