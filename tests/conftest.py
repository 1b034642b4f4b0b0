"""One thread for every test: the models are tiny, and threads that wait for each other slow a busy machine down."""

import os
import threading

os.environ.setdefault("OMP_NUM_THREADS", "1")               # before torch is imported; subprocesses inherit it

from tqdm import tqdm                                       # noqa: E402

# Its lock is shared with forked children: one that is killed while it holds it would hold up its parent and all later ones.
os.register_at_fork(after_in_child=lambda: tqdm.set_lock(threading.RLock()))
