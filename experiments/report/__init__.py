"""From the runs of a study to its tables, figures and one self-contained page."""

from experiments.report.build import write_report

__all__ = ["write_report"]
