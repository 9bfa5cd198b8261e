"""The progress display: bars on a terminal, clean lines elsewhere, and a restored terminal."""

import io

import pytest

from qlora_jax.training import progress


class _Clock:
  def __init__(self):
    self.now = 0.0

  def __call__(self):
    return self.now


class _Loss:
  """Counts how often it is read, as a device array would be waited for."""

  reads = 0

  def __float__(self):
    type(self).reads += 1
    return 0.09321


def _sweep(stream, plain, clock, steps=100):
  with progress.Display(
    total_trials=10, stream=stream, plain=plain, every_seconds=10.0, clock=clock
  ) as display:
    display.skip("regimes/none", 2)
    with display.cohort("regimes/lora [r=8]", 4, steps) as cohort:
      for step in range(1, steps + 1):
        clock.now += 0.5
        cohort.update(step, loss=_Loss(), rate=12_345.0)
      cohort.note("validation mse 0.093")
    display.log("saved\nresults.parquet")


def test_plain_lines_have_no_control_characters_and_come_every_few_seconds():
  stream = io.StringIO()
  _sweep(stream, True, _Clock())
  lines = stream.getvalue().splitlines()
  assert all(line.isprintable() for line in lines)
  assert lines[0] == "regimes/none: 2 trials finished earlier"
  assert lines[1] == "regimes/lora [r=8]: 4 trials, 100 steps"
  assert lines[2] == (
    "regimes/lora [r=8]: step 20/100 (20 %), loss 0.09321, 12.3k examples/s, 0:40 left, "
    "2 of 10 trials, 1:30 left in all"
  )
  assert sum("step " in line and "loss" in line for line in lines) == 5
  assert lines[-3] == "regimes/lora [r=8], step 100: validation mse 0.093"
  assert lines[-2] == "regimes/lora [r=8]: done in 0:50 (6 of 10 trials, 0:50 left in all)"
  assert lines[-1] == "saved results.parquet"


def test_throttled_updates_do_not_read_the_loss():
  _Loss.reads = 0
  _sweep(io.StringIO(), True, _Clock())
  assert _Loss.reads == 5


def test_live_display_draws_both_bars_and_restores_the_cursor():
  stream = io.StringIO()
  _sweep(stream, False, _Clock())
  text = stream.getvalue()
  assert "trials" in text and "regimes/lora [r=8]" in text
  assert "12.3k examples/s" in text and "left in all" in text
  assert "regimes/lora [r=8], step 100: validation mse 0.093" in text
  assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # cursor hidden, then shown


@pytest.mark.parametrize("plain", [True, False])
def test_interrupt_passes_through_and_does_not_count_the_cohort(plain):
  stream = io.StringIO()
  with (
    pytest.raises(KeyboardInterrupt),
    progress.Display(total_trials=4, stream=stream, plain=plain) as display,
    display.cohort("a", 4, 10) as cohort,
  ):
    cohort.update(1)
    raise KeyboardInterrupt
  assert display._trials == 0
  assert "done in" not in stream.getvalue()
  assert stream.getvalue().count("\x1b[?25l") == stream.getvalue().count("\x1b[?25h")


def test_resumed_cohort_times_only_the_steps_of_this_process():
  clock, stream = _Clock(), io.StringIO()
  with (
    progress.Display(2, unit="tokens", stream=stream, plain=True, clock=clock) as display,
    display.cohort("a", 2, 100, start_step=50) as cohort,
  ):
    for step in range(51, 101):
      clock.now += 1.0
      cohort.update(step)
  lines = stream.getvalue().splitlines()
  assert lines[0] == "a: 2 trials, 100 steps, from step 50"
  assert lines[1] == "a: step 60/100 (60 %), 0:40 left, 0 of 2 trials, 0:40 left in all"
  assert lines[-1] == "a: done in 0:50 (2 of 2 trials)"


@pytest.mark.parametrize(
  ("terminal", "term", "plain"),
  [(True, "xterm", False), (True, "dumb", True), (False, "xterm", True)],
)
def test_plain_is_chosen_by_the_stream_and_the_terminal(monkeypatch, terminal, term, plain):
  monkeypatch.setenv("TERM", term)
  stream = io.StringIO()
  stream.isatty = lambda: terminal
  assert progress.Display(total_trials=1, stream=stream)._plain is plain


def test_a_display_without_trials_or_steps_does_not_divide_by_zero():
  stream = io.StringIO()
  with progress.Display(total_trials=0, stream=stream, plain=True) as display:
    with display.cohort("none", 0, 0) as cohort:
      cohort.update(0)
    assert display._trials == 0 and not stream.getvalue()  # preparation is shown when it takes long
    with display.cohort("one", 1, 0) as cohort:
      cohort.update(0)
    assert display._trials == 1
  assert "one: done in 0:00" in stream.getvalue()


def test_the_time_left_leaves_out_what_was_finished_earlier():
  clock, stream = _Clock(), io.StringIO()
  with progress.Display(10, stream=stream, plain=True, clock=clock, earlier_trials=6) as display:
    display.skip("a", 2)
    with display.cohort("b", 2, 10) as cohort:
      clock.now += 20.0
      cohort.update(10)
    # 2 of the 4 trials that nobody had trained took 20 s, although 4 are still to be passed.
    assert "b: done in 0:20 (4 of 10 trials, 0:20 left in all)" in stream.getvalue()
    display.skip("c", 4)
    assert display._seconds_left() == 20
