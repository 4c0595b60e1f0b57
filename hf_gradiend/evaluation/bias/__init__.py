"""Bias benchmarks, one module each: what it measures, how items are read, scored and averaged."""
