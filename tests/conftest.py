"""Tests compute with tiny tensors, for which one thread is the fastest; set before torch is imported."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
