"""One registry of benchmarks: `robattr-fast bench`, ``python -m benchmarks`` and the pytest-benchmark suites show it."""
