"""Products of few rows on a CPU. In sampling, oneDNN's layout of the weights beats torch's.

Training keeps torch's, because oneDNN makes a kernel for each new number of rows.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

PREPACKED_ROWS = 64  # what oneDNN's layout is chosen for; it serves any number of rows
PART_ROWS = 256  # rows of a weight that are multiplied by one vector at a time


class FastLinear(nn.Linear):
    """nn.Linear, whose weight `prepacked` can lay out anew: (N, in) -> (N, out)."""

    layout = None  # the weight in that form

    def forward(self, x: Tensor) -> Tensor:
        if self.layout is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self.layout, self.bias, "none", [], "")
        one_row = x.shape == (1, self.in_features) and x.dtype == torch.float32
        if not one_row or x.device.type != "cpu" or torch.is_grad_enabled():
            return super().forward(x)
        # torch multiplies one row on a single thread, but a batch of parts of the matrix on all
        count = 2 * torch.get_num_threads()
        while self.out_features > count * PART_ROWS:
            count *= 2
        count = math.gcd(self.out_features, count)
        parts = self.weight.unflatten(0, (count, -1))  # (parts, out / parts, in)
        y = torch.bmm(parts, x.T.expand(count, -1, -1)).view(1, -1)  # (1, out)
        return y if self.bias is None else y + self.bias


def packs(linear: FastLinear, rows: int) -> bool:
    """Whether oneDNN's layout of its weight is known to be faster for so many rows."""
    weight, capability = linear.weight.data, torch.backends.cpu.get_cpu_capability()
    if linear.layout is not None or type(weight) is not Tensor or weight.device.type != "cpu":
        return False
    if not torch.backends.mkldnn.is_available() or not capability.startswith("AVX"):
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 and rows > 1


@contextmanager
def prepacked(model: nn.Module, rows: int) -> Iterator[None]:
    """Inside, without gradients, linears on a CPU have their weights in oneDNN's layout.

    rows: how many are sampled together; any number is served. The plain weights' memory is freed
    where nothing else needs it; they are back, bit for bit, at the end. Nests.
    """
    embedded = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    linears = [x for x in model.modules() if isinstance(x, FastLinear) and packs(x, rows)]
    try:
        for linear in linears:
            weight, storage = linear.weight.data, linear.weight.untyped_storage()
            linear.layout = torch.ops.mkldnn._reorder_linear_weight(weight, PREPACKED_ROWS)
            own = storage.resizable() and storage.nbytes() == weight.nbytes
            if own and id(linear.weight) not in embedded:
                storage.resize_(0)
        yield
    finally:
        for linear in linears:
            weight, storage = linear.weight.data, linear.weight.untyped_storage()
            if not storage.nbytes():
                storage.resize_(weight.nbytes)
                weight.copy_(linear.layout.to_dense())
            linear.layout = None
