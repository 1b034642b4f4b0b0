"""RoPE stretched to longer texts: linear, llama3 and yarn, and their keys in config.json.

RoPE turns pair i of a head by frequencies[i] per position. A scaling lowers the frequencies, so
that a longer text turns as far as a short one did in training. Dh: head dim.
"""

import math

import torch

from extras.formats.checks import read_value, refuse

LENGTH = "original_max_position_embeddings"  # of the texts before the scaling
NEEDS = {"default": (), "linear": ("factor",), "yarn": ("factor",),
         "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
WIDE = (1e-3, 1e4)
BOUNDS = {"factor": (1.0, 1e4), "low_freq_factor": WIDE, "high_freq_factor": WIDE,
          "beta_fast": WIDE, "beta_slow": WIDE, "attention_factor": WIDE, "mscale": (0.0, 1e4),
          "mscale_all_dim": (0.0, 1e4), "truncate": (False, True), LENGTH: (1, 2**24)}
ASIDE = ("rope_theta", "rope_type", "type", "partial_rotary_factor", "finetuned")


def read_rope(raw: dict, longest: int) -> tuple[float, dict | None]:
    """The base of the frequencies, and the checked scaling, in any spelling of config.json.

    `rope_scaling` (transformers 4) wins over `rope_parameters` (5) as a whole. A rope_theta inside
    wins over one outside, rope_type over the older `type`, but an original length outside over one
    inside; max_position_embeddings (longest) is the original length where none is given.
    """
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    nested = type(rope) is not dict or any(isinstance(value, dict) for value in rope.values())
    refuse(nested, "the RoPE parameters are malformed or differ by layer; one set is implemented.")
    for place in (raw, rope):
        refuse(place.get("partial_rotary_factor") not in (None, 1),
               "a partial_rotary_factor other than 1 is not implemented.")
    theta = read_value({"rope_theta": raw.get("rope_theta")} | rope, "rope_theta", 1e4, 1.0, 1e12)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    refuse(not isinstance(kind, str) or kind not in NEEDS,
           f"RoPE scaling {kind!r:.60} is not implemented; {', '.join(NEEDS)} are.")
    given = {name: x for name, x in rope.items() if name not in ASIDE and x is not None}
    if kind in ("llama3", "yarn"):
        given.setdefault(LENGTH, longest)
        if raw.get(LENGTH) is not None:
            given[LENGTH] = raw[LENGTH]
    for name in (*NEEDS[kind], *given):
        fault = "lacks" if name not in given else "has the unknown value"
        refuse(name not in given or name not in BOUNDS, f"RoPE scaling {kind!r} {fault} "
               f"{name!r:.60}. Take the config.json that came with the weights.")
    scaling = {name: read_value(given, name, None, *BOUNDS[name]) for name in given}
    refuse(kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"],
           "RoPE scaling 'llama3': low_freq_factor must be below high_freq_factor.")
    refuse(kind == "yarn" and theta <= 1,
           f"rope_theta is {theta}; RoPE scaling 'yarn' needs one above 1.")
    return theta, {"rope_type": kind} | scaling


def scale_frequencies(plain: torch.Tensor, config) -> torch.Tensor:
    """Frequencies (Dh/2,) as config.rope_scaling says."""
    scaling = config.rope_scaling
    kind, factor = scaling["rope_type"], scaling["factor"]
    if kind == "linear":
        return plain / factor
    # both others keep the fast frequencies and stretch the slow ones; between, they interpolate
    if kind == "llama3":
        turns = scaling[LENGTH] * plain / (2 * math.pi)  # (Dh/2,) within the original length
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # (Dh/2,)
    else:
        keep = 1 - yarn_ramp(config, plain.device)
    return (1 - keep) * plain / factor + keep * plain


def yarn_ramp(config, device) -> torch.Tensor:
    """(Dh/2,): how much YaRN (Peng et al. 2023, arXiv 2309.00071) stretches each frequency, 0 to 1.

    It rises with the pair's number, from that which turns beta_fast times within the original
    length to that which turns beta_slow times.
    """
    scaling, Dh, ends = config.rope_scaling, config.head_dim, []
    for turns in (scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1):
        length = math.log(scaling[LENGTH] / (turns * 2 * math.pi))
        ends.append(Dh * length / (2 * math.log(config.rope_theta)))
    low, high = ends
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, Dh - 1)
    high += 0.001 * (low == high)
    return ((torch.arange(Dh // 2, device=device).float() - low) / (high - low)).clamp(0, 1)


def yarn_strength(scaling: dict) -> float:
    """YaRN's factor on cos and sin, which sharpens attention: 0.1 ln(factor) + 1 unless given."""
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    above, below = 1.0, 0.0
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        above, below = scaling["mscale"], scaling["mscale_all_dim"]
    above, below = (0.1 * weight * math.log(scaling["factor"]) + 1.0 for weight in (above, below))
    return above / below
