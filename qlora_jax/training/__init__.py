"""Training: settings, feed, step, group, loop, study, and what they record."""
