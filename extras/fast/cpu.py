"""Products on a CPU by oneDNN: float32 ones, which torch leaves to MKL, and a layout for sampling.

Shapes: N rows, in, out features.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from extras.fast.quant import QuantLinear, join

PREPACKED_ROWS = 64  # what oneDNN's layout is chosen for; it serves any number of rows
KERNELS = "256"  # so many are kept: one for each shape, of half a megabyte or more
KEPT = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's number, and torch's

for name in KEPT:  # they are read at the first product
    os.environ.setdefault(name, KERNELS)


def has_onednn() -> bool:
    """Whether this is an x86 CPU on which torch has oneDNN, and may use it."""
    mkldnn, capability = torch.backends.mkldnn, torch.backends.cpu.get_cpu_capability()
    return mkldnn.is_available() and mkldnn.enabled and capability.startswith("AVX")


def suits(weight: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether oneDNN can multiply by this weight: whole, of that type, and on its CPU."""
    here = type(weight.data) is Tensor and weight.device.type == "cpu"
    return here and weight.dtype == dtype and has_onednn()


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b by oneDNN, without gradients: (N, in), (out, in) in any layout -> (N, out)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether `multiply` takes both: x (N, in) of float32 where nothing casts it, 1 row or more."""
    if x.dim() != 2 or len(x) == 0 or x.shape[1] != weight.shape[1] or x.device != weight.device:
        return False
    cast = torch.is_autocast_enabled("cpu")
    return x.dtype == torch.float32 and not cast and suits(weight)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in the faster way, without gradients: (N, in), (out, in) -> (N, out)."""
    return multiply(x, weight) if serves(x, weight) else x @ weight.T


class FloatProduct(torch.autograd.Function):
    """x W^T in float32 by oneDNN, without second derivatives: (N, in), (out, in) -> (N, out)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return multiply(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        to_x, to_weight = ctx.needs_input_grad
        # grad^T x is torch's: oneDNN would copy grad^T, which is large where `out` is a vocabulary
        return multiply(grad, weight.T) if to_x else None, grad.T @ x if to_weight else None


class FastLinear(nn.Linear):
    """nn.Linear by oneDNN in float32; `prepacked` can put in another: (N, in) -> (N, out)."""

    products = None

    def forward(self, x: Tensor) -> Tensor:
        if self.products:
            return self.products[0](x)
        if not serves(x, self.weight):
            return super().forward(x)
        y = FloatProduct.apply(x, self.weight)
        return y if self.bias is None else y.add_(self.bias)


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
        return multiply(x, self.layout, self.bias)

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


def packs(linear: nn.Module) -> bool:
    """Whether its weight can be in oneDNN's layout."""
    if type(linear) is not FastLinear:
        return False
    if suits(linear.weight, torch.bfloat16):
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return suits(linear.weight)


def reads_codes(linear: nn.Module, rows: int) -> bool:
    """Whether so many rows are multiplied with 8 bits as they are."""
    quantised = isinstance(linear, QuantLinear) and linear.scales.dtype == torch.bfloat16
    return quantised and linear.reads_codes(rows)


def make_products(model: nn.Module, rows: int) -> Iterator[tuple[nn.Module, list]]:
    """Yield (part of the model, what is to multiply in it) for blocks and other linears."""
    parts = list(model.modules())
    free = dict.fromkeys(part for part in parts if packs(part))
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
