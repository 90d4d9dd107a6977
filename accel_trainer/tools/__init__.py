"""The command line and what it runs: parity, check, launching."""
