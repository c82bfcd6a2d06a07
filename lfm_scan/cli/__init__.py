"""The command line. `--help` and `--version` load neither torch nor ray."""
