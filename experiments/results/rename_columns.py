"""Gives the tables of studies that earlier versions wrote today's names of columns.

python experiments/results/rename_columns.py FOLDER ...   # every .parquet file below each folder
"""

import pathlib
import sys

import pandas as pd

COLUMNS = {"run_id": "trial_id", "method": "arm", "adapter": "family"}
TABLES = ("results.parquet", "curves.parquet", "routing.parquet", "samples.parquet")


def main(folders: list[str]) -> None:
  for path in sorted(
    path for folder in folders for path in pathlib.Path(folder).rglob("*.parquet")
  ):
    table = pd.read_parquet(path)
    old = [name for name in COLUMNS if name in table]
    if path.name in TABLES and old:
      table.rename(columns=COLUMNS).to_parquet(path, index=False, compression="zstd")
      print(f"{path}: {', '.join(f'{name} -> {COLUMNS[name]}' for name in old)}")


if __name__ == "__main__":
  main(sys.argv[1:])
