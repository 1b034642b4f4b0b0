"""Does the fast code agree with the plain code on this hardware?

    python -m tools.selfcheck                    # the GPU if there is one
    python -m tools.selfcheck --device cuda:1 --dtypes bfloat16

Prints one line, or a sentence that names the part that differs. A tiny random model goes both ways
through training, sampling and judging, and these fast parts are compared: attention of whole
documents and of groups that share a prompt, log-probabilities without logits and their gradients,
recomputed blocks, sampling with refilled rows (on a GPU by recorded graphs), one response at a
time, judging behind one header, int8 and NF4 products.
"""

import argparse
import sys

from eval import fail, pick_device

DTYPES = ("float32", "bfloat16", "float16")


def main(argv: list[str] | None = None) -> int:
    """0 if all parts agree, 1 if one differs, 2 for a wrong flag."""
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.error = fail
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES),
                        help="types of the weights, by default all three")
    args = parser.parse_args(argv)
    import torch

    from extras.fast.check import check, hardware

    args.dtype, agreed = "auto", []
    try:
        device = torch.device(pick_device(args)[0])
    except ValueError as error:
        fail(str(error))
    for dtype in args.dtypes:
        try:
            parts = check(device, getattr(torch, dtype))
        except (RuntimeError, TypeError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        worst = max(parts, key=parts.get)
        agreed.append(f"{len(parts)} parts in {dtype} (the {worst} differ most, by "
                      f"{parts[worst]:.1g})")
    print(f"fast code checked against the plain code on {hardware(device)}: {', '.join(agreed)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
