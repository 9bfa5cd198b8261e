"""Numbers on a stream of T tasks, from the matrix L [T, T] of test errors.

L_ij is the error on task j after training on tasks 1 to i, in the order of the stream; b_j is the
error of the frozen base. The transfers are from Lopez-Paz & Ranzato (2017), Gradient Episodic
Memory for Continual Learning (arXiv 1706.08840), eqs. 2-4, with minus the error for the accuracy:
a positive number is good. Intransigence is from Chaudhry et al. (2018), Riemannian Walk for
Incremental Learning (arXiv 1801.10112).
"""

import numpy as np


def average_error(errors: np.ndarray) -> float:
  """mean_j L_Tj, the error over all tasks after the last one (minus their ACC)."""
  return float(np.mean(errors[-1]))


def learned_error(errors: np.ndarray) -> float:
  """mean_j L_jj, the error on each task right after training on it."""
  return float(np.mean(np.diagonal(errors)))


def backward_transfer(errors: np.ndarray) -> float:
  """BWT = mean_{j<T} (L_jj - L_Tj); negative is forgetting."""
  return float(np.mean(np.diagonal(errors)[:-1] - errors[-1, :-1]))


def forward_transfer(errors: np.ndarray, base: np.ndarray) -> float:
  """FWT = mean_{j>1} (b_j - L_(j-1)j), on tasks before their training.

  Args:
    base: b [T], the error of the network before the stream.
  """
  return float(np.mean(base[1:] - np.diagonal(errors, offset=1)))


def intransigence(errors: np.ndarray, alone: np.ndarray) -> float:
  """mean_{j>1} (L_jj - a_j), with a_j [T] the error of the same method trained on task j alone.

  If negative, the tasks before made this one easier to learn. The first task has none before it and
  is left out.
  """
  return float(np.mean(np.diagonal(errors)[1:] - alone[1:]))
