"""Checkpoints that do not depend on the parallel layout: format, save, load, verify, report, retention."""
