"""Frozen linears whose weights are kept in 8 or 4 bits and made anew for each product.

    int8   a row is 127ths of its largest number
    nf4    a block of 64 is the nearest of 16 levels, times its largest number   arXiv 2305.14314

Products run in the type of x. Shapes: n rows of a weight, in, out features.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NF4_BLOCK = 64
NF4_LEVELS = (-1.0, -0.6961928, -0.52507293, -0.39491743, -0.28444132, -0.1847734, -0.09104998, 0.0,
              0.079580314, 0.16093014, 0.24611226, 0.33791512, 0.44070974, 0.5626169, 0.72295666,
              1.0)  # quantiles of a normal distribution, scaled to [-1, 1], and 0


def to_int8(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(n, in) -> int8 codes (n, in) and scales (n, 1) in `dtype`."""
    # the scale is rounded before it is used; a row of zeros gives NaN
    scales = (weight.float().abs().amax(1, keepdim=True) / 127).to(dtype)
    codes = (weight.float() / scales.float()).nan_to_num().round()
    return codes.clamp(-127, 127).to(torch.int8), scales


def from_int8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `to_int8`: (n, in) in `dtype`."""
    return codes.to(dtype) * scales.to(dtype)


@functools.cache
def nf4_levels(device: torch.device) -> Tensor:
    """NF4_LEVELS on a device, (16,)."""
    return torch.tensor(NF4_LEVELS, device=device)


def to_nf4(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(n, in) -> codes (n, ceil(in / 64) * 32), two a byte, and scales (n, blocks) in `dtype`."""
    levels = nf4_levels(weight.device)
    padded = F.pad(weight.float(), (0, -weight.shape[1] % NF4_BLOCK))
    blocks = padded.unflatten(1, (-1, NF4_BLOCK))  # (n, blocks, 64)
    scales = blocks.abs().amax(-1).to(dtype)  # (n, blocks)
    shares = (blocks / scales.float()[..., None]).nan_to_num()
    nearest = torch.bucketize(shares, (levels[1:] + levels[:-1]) / 2)
    codes = nearest.flatten(1).to(torch.uint8)  # (n, blocks * 64)
    return codes[:, ::2] << 4 | codes[:, 1::2], scales


def from_nf4(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `to_nf4`: (n, blocks * 64) in `dtype`."""
    levels = nf4_levels(codes.device).to(dtype)
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)  # (256, 2)
    values = F.embedding(codes.int(), pairs).view(len(codes), -1, NF4_BLOCK)  # (n, blocks, 64)
    return (values * scales.to(dtype)[..., None]).flatten(1)


QUANTIZERS = {"int8": (to_int8, from_int8), "nf4": (to_nf4, from_nf4)}


class QuantLinear(nn.Module):
    """A frozen linear of a kind in QUANTIZERS: (N, in) -> (N, out).

    Whoever makes one fills it by `encode_rows`, and sets its `bias`.
    """

    def __init__(self, in_features: int, out_features: int, kind: str, dtype: torch.dtype,
                 device: torch.device | str):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.kind, self.bias = kind, None
        self.encode, self.decode = QUANTIZERS[kind]
        # the codes of no rows have the type and the width of all others
        empty = self.encode(torch.zeros(0, in_features, device="cpu"), dtype)
        for name, x in zip(("codes", "scales"), empty, strict=True):
            x = torch.empty(out_features, x.shape[1], dtype=x.dtype, device=device)
            self.register_buffer(name, x)

    def encode_rows(self, rows: slice, weight: Tensor) -> None:
        """Quantise `weight` (n, in) into the given rows."""
        weight = weight.to(self.codes.device)
        self.codes[rows], self.scales[rows] = self.encode(weight, self.scales.dtype)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight, (out, in)."""
        return self.decode(self.codes, self.scales, dtype)[:, :self.in_features]

    def reads_codes(self, rows: int) -> bool:
        """Whether torch's kernel for bfloat16 on a CPU takes the codes as they are."""
        here = self.kind == "int8" and self.codes.device.type == "cpu"
        return here and 0 < rows <= 16 and self.in_features % 16 == 0  # other widths crash it

    def forward(self, x: Tensor) -> Tensor:
        reads = x.dtype == torch.bfloat16 and not x.requires_grad and self.reads_codes(len(x))
        if reads:
            out = torch._weight_int8pack_mm(x, self.codes, self.scales.flatten())
        else:
            out = FrozenProduct.apply(x, self)
        return out if self.bias is None else out + self.bias


@torch.inference_mode(False)
def join(linears: list[QuantLinear]) -> QuantLinear:
    """Linears of a kind that read the same numbers as one: (N, in) -> (N, out of all of them).

    Their codes and scales become parts of its own.
    """
    first, sizes = linears[0], [linear.out_features for linear in linears]
    if len(linears) == 1:
        return first
    joint = QuantLinear(first.in_features, sum(sizes), first.kind, first.scales.dtype, "meta")
    joint.codes = torch.cat([linear.codes for linear in linears])
    joint.scales = torch.cat([linear.scales for linear in linears])
    parts = zip(joint.codes.split(sizes), joint.scales.split(sizes), strict=True)
    for linear, (codes, scales) in zip(linears, parts, strict=True):
        linear.codes, linear.scales = codes, scales
    joint.bias = None if first.bias is None else torch.cat([linear.bias for linear in linears])
    return joint


class FrozenProduct(torch.autograd.Function):
    """x W^T, where W gets no gradient and is made once more in the backward pass, not kept."""

    @staticmethod
    def forward(ctx, x: Tensor, linear: QuantLinear) -> Tensor:
        ctx.linear = linear
        return F.linear(x, linear.dequantize(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.linear.dequantize(grad.dtype), None
