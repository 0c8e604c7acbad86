"""Parts that the benchmarks share: cases, providers, timing, memory, tables and plots."""
