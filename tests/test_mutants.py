"""The list of planted faults fits the code; `python -m tests.mutants` plants them."""

import dataclasses

import pytest

from tests import mutants, planted_faults, planted_faults_of_adapters


def test_every_fault_can_be_planted_and_names_tests_that_exist():
  assert mutants.problems(planted_faults.FAULTS) == []
  assert len(planted_faults.FAULTS) >= 48


@pytest.mark.parametrize(
  ("change", "says"),
  [
    ({"old": "text that no file has"}, "0 times"),
    ({"old": "\n"}, "times in"),
    ({"new": planted_faults.FAULTS[0].old}, "changes nothing"),
    ({"tests": ("tests/test_absent.py",)}, "there is no tests/test_absent.py"),
    ({"tests": (f"{planted_faults_of_adapters.REFERENCES}::test_absent",)}, "::test_absent"),
  ],
)
def test_a_fault_that_cannot_be_planted_is_named(change, says):
  fault = dataclasses.replace(planted_faults.FAULTS[0], **change)
  (problem,) = mutants.problems([fault])
  assert fault.name in problem and says in problem


def test_a_fault_dies_where_a_test_fails_and_survives_where_all_pass(tmp_path, monkeypatch):
  """On a checkout of one module and one test that asks too little."""
  (tmp_path / "code.py").write_text("def double(x):\n  return 2 * x\n")
  (tmp_path / "test_code.py").write_text(
    "import importlib.util\n\n\ndef test_double():\n"
    "  spec = importlib.util.spec_from_file_location('own', 'code.py')\n"
    "  module = importlib.util.module_from_spec(spec)\n  spec.loader.exec_module(module)\n"
    "  assert module.double(2) == 4\n"
  )
  faults = [
    planted_faults.Fault("tripled", "code.py", "2 * x", "3 * x", ("test_code.py",)),
    planted_faults.Fault("squared", "code.py", "2 * x", "x * x", ("test_code.py",)),
  ]
  monkeypatch.setattr(mutants, "ROOT", tmp_path)
  monkeypatch.setattr(mutants, "_copy", lambda target: tmp_path)
  results = mutants.run(faults, tmp_path / "results.json")
  assert [results[name]["outcome"] for name in ("tripled", "squared")] == ["died", "survived"]
  assert results["tripled"]["by"].endswith("test_code.py::test_double")
  assert (tmp_path / "code.py").read_text() == "def double(x):\n  return 2 * x\n"
  monkeypatch.setattr(mutants, "_plant", None)  # planting again would now fail
  assert mutants.run(faults, tmp_path / "results.json") == results
  assert "1 of 2 planted faults die." in "\n".join(mutants.table(results))
