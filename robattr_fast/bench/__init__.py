"""One registry of benchmarks: `robattr-fast bench`, ``python -m benchmarks`` and pytest-benchmark suites show it."""
