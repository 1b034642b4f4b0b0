"""Products of few rows on a CPU. In sampling, oneDNN's layout of the weights beats torch's.

Training keeps torch's, because oneDNN makes a kernel for each new number of rows.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from extras.fast.quant import QuantLinear, join

PREPACKED_ROWS = 64  # what oneDNN's layout is chosen for; it serves any number of rows
PART_ROWS = 256  # rows of a weight that are multiplied by one vector at a time


class FastLinear(nn.Linear):
    """nn.Linear in which `prepacked` can put another product: (N, in) -> (N, out)."""

    products = None

    def forward(self, x: Tensor) -> Tensor:
        if self.products:
            return self.products[0](x)
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


class Product:
    """Linears that read the same numbers, as one product: (N, in) -> (N, out of all of them).

    Their weights lie one below the other in oneDNN's layout.
    """

    def __init__(self, linears: list[FastLinear]):
        self.linears, weights = linears, linears[0].weight.data
        self.bias = None if linears[0].bias is None else torch.cat([x.bias for x in linears])
        if len(linears) > 1:
            weights = torch.cat([x.weight.data for x in linears])  # (out of all, in)
        self.layout = torch.ops.mkldnn._reorder_linear_weight(weights, PREPACKED_ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.layout, self.bias, "none", [], "")

    def begin(self, embedded: set[int]) -> None:
        """Free the memory of the plain weights, where nothing else needs it."""
        for linear in self.linears:
            weight, storage = linear.weight.data, linear.weight.untyped_storage()
            own = storage.resizable() and storage.nbytes() == weight.nbytes
            if own and id(linear.weight) not in embedded:
                storage.resize_(0)

    def end(self) -> None:
        """Bring the plain weights back, bit for bit."""
        stored = [linear.weight.untyped_storage() for linear in self.linears]
        if all(storage.nbytes() for storage in stored):
            return
        parts = self.layout.to_dense().split([linear.out_features for linear in self.linears])
        for linear, storage, part in zip(self.linears, stored, parts, strict=True):
            if not storage.nbytes():
                storage.resize_(part.nbytes)
                linear.weight.data.copy_(part)


def packs(linear: nn.Module, rows: int) -> bool:
    """Whether oneDNN's layout of its weight is known to be faster for so many rows."""
    if type(linear) is not FastLinear:
        return False
    weight, capability = linear.weight.data, torch.backends.cpu.get_cpu_capability()
    if type(weight) is not Tensor or weight.device.type != "cpu":
        return False
    if not torch.backends.mkldnn.is_available() or not capability.startswith("AVX"):
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 and rows > 1


def reads_codes(linear: nn.Module, rows: int) -> bool:
    """Whether so many rows are multiplied with 8 bits as they are."""
    quantised = isinstance(linear, QuantLinear) and linear.scales.dtype == torch.bfloat16
    return quantised and linear.reads_codes(rows)


def make_products(model: nn.Module, rows: int) -> Iterator[tuple[nn.Module, list]]:
    """Yield (part of the model, what is to multiply in it) for blocks and other linears."""
    parts = list(model.modules())
    free = dict.fromkeys(part for part in parts if packs(part, rows))
    for block in parts:
        groups = block.groups() if hasattr(block, "groups") else []
        linears = [linear for group in groups for linear in group]
        if groups and all(linear in free for linear in linears):
            for linear in linears:
                del free[linear]
            yield block, [Product(group) for group in groups]
        elif groups and all(reads_codes(linear, rows) for linear in linears):
            yield block, [join(group) for group in groups]
    for linear in free:
        yield linear, [Product([linear])]


@contextmanager
def prepacked(model: nn.Module, rows: int) -> Iterator[None]:
    """Inside, without gradients, a CPU multiplies in the ways that suit few rows.

    What reads the same in a block is one product, unless it has adapters. rows: how many are
    sampled together; any number is served. Nests. Inside, weights are not there to be read, copied
    or saved.
    """
    if getattr(model, "is_prepacked", False):
        yield
        return
    embedded = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    changed, model.is_prepacked = [], True
    try:
        for part, products in make_products(model, rows):
            part.products = products
            changed.append(part)
            for product in products:
                if isinstance(product, Product):
                    product.begin(embedded)
        yield
    finally:
        for part in changed:
            for product in part.products:
                if isinstance(product, Product):
                    product.end()
            part.products = None
        model.is_prepacked = False
