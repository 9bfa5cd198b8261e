"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
  """A mistake in a config, a file or a command that its user can mend.

  The message is one line that names the field or file, says what was wrong and what would be
  right. `launch.py` prints it without a traceback and exits with code 2.
  """
