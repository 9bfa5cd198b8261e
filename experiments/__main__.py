"""The command of the studies: their results, tables, claims, figures and notebooks.

  python -m experiments                            # lists the studies
  python -m experiments ablations --from=runs/ablations
  python -m experiments depth --workdir=runs/depth --limit=2
  python -m experiments keep --from=runs/stability --results=experiments/results/stability
  python -m experiments documents [--check]        # the tables in the documentation
  python -m experiments figures [NAME ...]         # docs/figures
  python -m experiments notebooks [--check]        # notebooks from the template

The command of a study writes the tables that follow from its runs, and prints tables and claims.
Its figure goes to docs/figures, or beside the results if --results names another folder. A user's
mistake is one line on standard error and exit code 2.
"""

import argparse
import pathlib
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from experiments import committed, comparisons, documents, figures, notebooks, study
from qlora_jax import errors


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    raise errors.UserError(f"{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  arguments = list(sys.argv[1:] if arguments is None else arguments)
  try:
    if not arguments:
      print(overview())
      return 0
    name, *rest = arguments
    if name in ("-h", "--help"):
      print(__doc__)
      return 0
    if name in _COMMANDS:
      return _COMMANDS[name](rest)
    records = study.registry()
    if name not in records:
      known = ", ".join((*records, *_COMMANDS))
      raise errors.UserError(f"{name!r} is no study and no command; use one of {known}")
    run(records[name], rest)
  except errors.UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


def overview() -> str:
  """The studies with their questions, and whether their results are committed."""
  rows = [
    [record.name, record.question, "yes" if record.committed_results.exists else "no"]
    for record in study.registry().values()
  ]
  return comparisons.markdown(["study", "question", "committed results"], rows).rstrip()


def run(record: study.Study, arguments: Sequence[str]) -> None:
  """Trains or keeps what the arguments name, and makes tables, claims and figure of a study."""
  options = _study_parser(record).parse_args(arguments)
  is_committed = options.results is None
  folder = record.committed_results.folder if is_committed else options.results
  if getattr(options, "parts", None):
    committed.keep(options.parts, folder, record.keep_curves)
  if getattr(options, "workdir", None):
    command = shlex.join(["python", "-m", "experiments", record.name, *arguments])
    config = getattr(options, "config", "")
    record.train(study.Work(options.workdir, config, options.limit, folder, command))
  results = committed.Results(folder, record.results)
  if record.summarise is not None:
    record.summarise(results)
  print(record.tables_text(results))
  print(f"### claims\n\n{record.claims_table(results)}")
  figures.draw(record, results, (figures.folder() if is_committed else folder) / record.name)
  print(f"results: {folder}")


def _study_parser(record: study.Study) -> argparse.ArgumentParser:
  parser = _parser(record.name, record.question)
  parser.add_argument("--results", type=pathlib.Path, help="folder of the results")
  if record.train is None:
    _add_parts(parser)
    return parser
  parser.add_argument("--workdir", type=pathlib.Path, help="train first what is missing there")
  parser.add_argument("--limit", type=int, help="train at most so many units of work now")
  if record.config:
    parser.add_argument("--config", default=record.config, help="config file, with :variant")
  return parser


def _add_parts(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--from",
    dest="parts",
    type=pathlib.Path,
    action="append",
    help="work directory of a sweep to keep first; repeat it if machines shared the settings",
  )


def _parser(name: str, about: str) -> argparse.ArgumentParser:
  return _Parser(prog=f"python -m experiments {name}", description=about)


def _keep(arguments: Sequence[str]) -> int:
  parser = _parser("keep", "Copies the results of a sweep, without paths of the machine.")
  parser.add_argument("--results", type=pathlib.Path, help="folder to keep them in")
  _add_parts(parser)
  options = parser.parse_args(arguments)
  if not options.parts or options.results is None:
    raise errors.UserError("--from and --results: give both, the sweep and the folder for it")
  committed.keep(options.parts, options.results, with_curves=True)
  print(f"results: {options.results}")
  return 0


def _documents(arguments: Sequence[str]) -> int:
  parser = _parser("documents", documents.__doc__)
  parser.add_argument("--check", action="store_true", help="write nothing; fail if tables differ")
  if not parser.parse_args(arguments).check:
    documents.write()
    return 0
  pages = documents.out_of_date()
  if pages:
    print(f"tables out of date in {', '.join(pages)}: run python -m experiments documents")
  return int(bool(pages))


def _figures(arguments: Sequence[str]) -> int:
  parser = _parser("figures", figures.__doc__)
  parser.add_argument("name", nargs="*", help="figures to draw; all if none is named")
  for path in figures.write(parser.parse_args(arguments).name):
    print(path)
  figures.write_index(figures.folder())
  return 0


def _notebooks(arguments: Sequence[str]) -> int:
  parser = _parser("notebooks", notebooks.__doc__)
  parser.add_argument("--check", action="store_true", help="write nothing; fail if files differ")
  check = parser.parse_args(arguments).check
  texts = notebooks.files()
  differing = [path for path, text in texts.items() if not _holds(path, text)]
  if not check:
    for path in differing:
      path.write_text(texts[path], encoding="utf-8")
      print(path)
  elif differing:
    names = ", ".join(path.name for path in differing)
    print(f"notebooks out of date: {names}: run python -m experiments notebooks")
  return int(check and bool(differing))


def _holds(path: pathlib.Path, text: str) -> bool:
  return path.is_file() and path.read_text(encoding="utf-8") == text


_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
  "keep": _keep,
  "documents": _documents,
  "figures": _figures,
  "notebooks": _notebooks,
}

if __name__ == "__main__":
  sys.exit(main())
