"""One registry of benchmarks: `robattr-fast bench`, ``python -m benchmarks`` pytest-benchmark suites show it."""
