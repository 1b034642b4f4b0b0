"""Hugging Face's config.json: read in the spelling of transformers 4 or 5, checked, and written."""

from dataclasses import dataclass
from pathlib import Path

from data import as_list
from extras.formats.chat import NAME, has_template
from extras.formats.checks import check_layout, read_object, read_value, reading, refuse
from extras.formats.rope import LENGTH, read_rope, scale_frequencies, yarn_strength
from model import HF_KEYS, ModelConfig

KEYS = HF_KEYS | {"max_position_embeddings": "max_position_embeddings"}
FLAG = (False, True)
BOUNDS = {  # of our fields; a value in config.json must have the type of its bounds
    "vocab_size": (1, 2**24), "dim": (1, 2**17), "n_layers": (1, 1024), "n_heads": (1, 4096),
    "n_kv_heads": (1, 4096), "head_dim": (2, 4096), "hidden_dim": (1, 2**20),
    "norm_eps": (0.0, 1.0), "max_position_embeddings": (1, 2**24),
    "tie_embeddings": FLAG, "attention_bias": FLAG, "mlp_bias": FLAG,
}


@dataclass
class HFConfig(ModelConfig):
    """A ModelConfig with what only other people's models have. `context` follows from the rest.

    Raises ValueError for numbers of heads or a head_dim that cannot be.
    """

    rope_scaling: dict | None = None  # None, or a kind of rope.NEEDS with its values
    max_position_embeddings: int = 2048  # the longest sequence before scaling
    sliding_window: int | None = None  # Mistral's: sequences are kept within it

    def __post_init__(self):
        refuse(self.n_heads % self.n_kv_heads,
               f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}.")
        refuse(self.head_dim < 2 or self.head_dim % 2, f"head_dim is {self.head_dim}; RoPE turns "
               "pairs, so it must be even and at least 2.")
        scaling, longest = self.rope_scaling or {}, self.max_position_embeddings
        # under linear scaling the key holds the unscaled length, under yarn either is found
        if scaling.get("rope_type") == "linear":
            longest = int(longest * scaling["factor"])
        if scaling.get("rope_type") == "yarn":
            longest = max(longest, int(scaling[LENGTH] * scaling["factor"]))
        self.context = min(longest, self.sliding_window or longest)

    def rope_frequencies(self, device):
        """Angle per position of each pair, (Dh/2,)."""
        plain = super().rope_frequencies(device)
        return scale_frequencies(plain, self) if self.rope_scaling else plain

    def rope_tables(self, position_ids):
        """cos and sin of the angle of each pair, both (N, 1, Dh); YaRN stretches them."""
        tables, scaling = super().rope_tables(position_ids), self.rope_scaling or {}
        strength = yarn_strength(scaling) if scaling.get("rope_type") == "yarn" else 1.0
        return tuple(table * strength for table in tables)


def read_config(path) -> HFConfig:
    """The config of a model folder, or of a config.json. Raises ValueError that names the file."""
    check_layout(path, ("gguf", "meta"))
    file = Path(path)
    file = file if file.is_file() else file / "config.json"
    if not file.is_file():
        raise ValueError(f"no model at {path} (no config.json). Give a folder in Hugging Face "
                         "format: config.json, *.safetensors, and a tokenizer.")
    raw = read_object(file, 10**6)
    with reading(file, "a config.json"):
        config = from_hf(raw)
    if config.prompt_template is None and has_template(file.parent):
        config.prompt_template = NAME
    return config


def from_hf(raw: dict) -> HFConfig:
    """The config that the keys of a config.json describe.

    Raises ValueError for another architecture, a feature that would change the numbers, or an
    impossible value.
    """
    kind, activation = raw.get("model_type"), raw.get("hidden_act", "silu")
    refuse(kind not in ("llama", "mistral"),
           f"model_type is {kind!r:.60}; only llama and mistral are implemented.")
    refuse(activation != "silu", f"hidden_act is {activation!r:.60}; only silu is implemented.")
    refuse(raw.get("quantization_config"), "quantization_config is given, and such weights are not "
           "read; take the full-precision checkpoint (--quantize makes int8 or 4 bits of it).")
    values = {name: read_value(raw, KEYS[name], getattr(HFConfig, name), *bounds)
              for name, bounds in BOUNDS.items()}
    if raw.get("num_key_value_heads") is None:
        values["n_kv_heads"] = values["n_heads"]
    if raw.get("head_dim") is None:
        values["head_dim"] = values["dim"] // values["n_heads"]
    if kind == "mistral" and raw.get("sliding_window", 4096) is not None:  # absent means 4096
        values["sliding_window"] = read_value(raw, "sliding_window", 4096, 1, 2**24)
    template = values["prompt_template"] = raw.get("prompt_template")
    refuse(template is not None and not isinstance(template, str),
           f"prompt_template is {template!r:.60}; expected the name of a template.")
    for name, key, default in (("bos_id", "bos_token_id", 1), ("eos_ids", "eos_token_id", 2)):
        value = raw.get(key, default)
        values[name] = [] if value is None else as_list(value)
        refuse(not all(type(token) is int and 0 <= token < 2**31 for token in values[name]),
               f"{key} is {value!r:.60}; expected an id or a list of ids.")
    values["bos_id"] = next(iter(values["bos_id"]), None)
    theta, scaling = read_rope(raw, values["max_position_embeddings"])
    return HFConfig(**values, rope_theta=theta, rope_scaling=scaling)


def to_hf(config: ModelConfig, dtype: str = "float32") -> dict:
    """The keys of a config.json that transformers 4 and 5 both read."""
    window, scaling = (getattr(config, key, None) for key in ("sliding_window", "rope_scaling"))
    name = "Mistral" if window else "Llama"
    raw = {"architectures": [f"{name}ForCausalLM"], "model_type": name.lower(),
           "torch_dtype": dtype, "hidden_act": "silu"}
    raw |= {"sliding_window": window} if window else {}
    # a config of the course has no max_position_embeddings beside its context
    raw |= {KEYS[ours]: getattr(config, ours, config.context) for ours in BOUNDS}
    eos = config.eos_ids[0] if len(config.eos_ids) == 1 else config.eos_ids or None
    raw |= {"rope_theta": config.rope_theta, "rope_scaling": scaling,
            "bos_token_id": config.bos_id, "eos_token_id": eos}
    return raw | ({"prompt_template": config.prompt_template} if config.prompt_template else {})
