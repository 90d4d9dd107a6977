"""A script that fails when it is imported."""

raise RuntimeError("on purpose")
