"""eval.open_model with this room's kinds of files, and the fast code of extras/fast on top."""

from eval import extra, pick_device
from extras.formats.peft import open_adapter
from extras.formats.weights import open_model


def open_all(cfg, adapter="", folder="", trainable=False):
    """The model in `folder`, or the one that --model names, with an adapter over it."""
    device, dtype = pick_device(cfg)
    shard = trainable and getattr(cfg, "shard", False) and extra("runtime", False).spread
    model = open_model(folder or cfg.model, dtype=dtype, device=device, shard=shard,
                       quantize="" if folder else cfg.quantize)
    # The same results, sooner.
    extra("fast", False).accelerate(model, checkpointing=getattr(cfg, "checkpointing", False))
    if adapter:
        open_adapter(model, adapter, trainable)
    return model
