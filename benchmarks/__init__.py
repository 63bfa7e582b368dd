"""How fast it is, against a floor in C and against other tools; see `python -m benchmarks -h`."""
