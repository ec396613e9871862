"""Tasks, one small file each: see `benchmarks.task`."""
