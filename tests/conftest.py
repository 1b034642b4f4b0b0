"""One thread for every test: the models are tiny, and threads that wait for each other slow a busy machine down."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")               # before torch is imported; subprocesses inherit it
