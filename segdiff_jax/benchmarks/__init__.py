"""What `segdiff bench` measures: a file for each suite, a generator `run(small)` in each."""
