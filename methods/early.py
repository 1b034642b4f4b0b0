"""The best weights of a run that --patience may end early: kept while it trains, then put back."""

import shutil

from methods import torch

BEST = "best"  # a folder in the run's own; a file of weights for each step that was the best so far


def keep_weights(run, step: int) -> None:
    """With --patience, write the weights that are trained.

    All of them stay until the end, since a run that is resumed may go on from before the last.
    """
    from safetensors.torch import save_file
    if run.cfg.patience:
        found = {name: p.detach() for name, p in run.model.named_parameters() if p.requires_grad}
        (run.folder / BEST).mkdir(exist_ok=True)
        run.guard.first(lambda: save_file(found, run.folder / BEST / f"{step}.safetensors"))


def restore_weights(run, step: int) -> None:
    """Put back the weights of a step."""
    from safetensors.torch import load_file
    found = load_file(run.folder / BEST / f"{step}.safetensors")
    with torch.no_grad():
        for name, p in run.model.named_parameters():
            if p.requires_grad:
                p.copy_(found[name])
    run.guard.sum({"restored": 1})  # no process goes on to remove what another still reads


def discard_weights(run) -> None:
    """Remove what was kept, once the result is saved: until then a stopped run needs it."""
    shutil.rmtree(run.folder / BEST, ignore_errors=True)
