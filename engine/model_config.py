"""What a model's own config.json says of its size: parameters, KV memory a token, experts, quantization.

    attention   2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim   parameters a layer
    dense       3 * hidden * intermediate                                         (gate, up, down)
    experts     the same with the experts' own width, times how many there are
    KV memory   2 * kv_heads * head_dim * 2 bytes a token and layer, in 16 bits; a layer with a sliding window
                keeps no more than that many tokens

What is written to disk (the index of the safetensors) goes before the sum for the size of the weights, and
for the parameters where they are kept in 16 bits. Multi-head latent attention (DeepSeek) keeps one compressed
vector a token and layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.estimate import ModelShape, Weights
from process.errors import ConfigError

KV_BYTES = 2
"""Bytes of a number in KV memory: 16 bits, vLLM's default."""

QUANTIZED = {
    "awq": Weights.W4,
    "gptq": Weights.W4,
    "mxfp4": Weights.W4,
    "bitsandbytes": Weights.W4,
    "fp8": Weights.W8,
    "fbgemm_fp8": Weights.W8,
    "compressed-tensors": Weights.W8,
}
"""Methods of quantization that vLLM loads, and how the weights are then kept unless `bits` says it."""

WHILE_LOADING = {"fp8": Weights.W8, "bitsandbytes": Weights.W4}
"""Methods by which vLLM quantizes 16-bit weights while it loads them."""


DEFAULT_CONTEXT = 32_768
"""Tokens of context where none is asked for: KV memory for one request of a million would be all there is."""

_BYTES = {Weights.W16: 2.0, Weights.W8: 1.0, Weights.W4: 0.56}
"""Bytes a parameter; of 4 bits with their scales."""


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model from its own files. context: the longest, prompt and answer; tokens.

    quantization: the method by which its weights are kept, None for 16 bits; loads_quantized: vLLM does that
    while it loads. pooling: it makes vectors, no text. kind: the architecture's model_type.
    """

    kind: str
    shape: ModelShape
    context: int
    quantization: str | None
    pooling: bool
    loads_quantized: bool = False


class ConfigNumbers:
    """Typed reading of a config.json; a wrong number raises a ConfigError that names it."""

    def __init__(self, config: Mapping[str, Any], what: str) -> None:
        """Take the text part of a model that also sees or hears. what: begins each error."""
        inner = config.get("text_config")
        self.outer, self.data = config, {**config, **inner} if isinstance(inner, Mapping) else config
        self._what = what

    def number(self, *names: str, default: int | None = None, least: int = 1, most: int = 10**8) -> int:
        """Return the first of these fields that is a whole number."""
        for name in names:
            value = self.data.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                if not least <= value <= most:
                    raise ConfigError(f"{self._what}: {name}: wanted {least} to {most}, got {value}")
                return value
        if default is None:
            raise ConfigError(f"{self._what}: no {' or '.join(names)}: no transformer that can be measured")
        return default

    def text(self, name: str) -> str:
        """Return a field that is a text; an empty one where it is not."""
        value = self.data.get(name)
        return value if isinstance(value, str) else ""


def read_config(
    config: Mapping[str, Any],
    what: str,
    *,
    stored_bytes: int | None = None,
    pooling: bool = False,
    context: int | None = None,
    quantization: str | None = None,
) -> ModelFacts:
    """Return what a config.json says; raise ConfigError where the model cannot be measured.

    stored_bytes: of all its safetensors. pooling: the hub says that it makes vectors. context: the longest
    that is wanted, else what the model was made for. quantization: by which it shall be quantized while it
    is loaded.
    """
    n = ConfigNumbers(config, what)
    longest = n.number("max_position_embeddings", "n_positions", "max_sequence_length", default=4096)
    if context is not None and not 1 <= context <= longest:
        raise ConfigError(f"--context {context}: {what} has at most {longest}")
    wanted = min(longest, DEFAULT_CONTEXT) if context is None else context
    stored, method = _stored_as(n, what)
    kept = stored
    if quantization is not None and quantization != method:
        if method is not None:
            raise ConfigError(f"--quantization {quantization}: {what} is quantized already, by {method}")
        if quantization not in WHILE_LOADING:
            raise ConfigError(
                f"--quantization {quantization}: {what} has 16-bit weights, and vLLM quantizes them only to "
                f"{' or '.join(WHILE_LOADING)} while it loads: take a repository that is that already"
            )
        kept, method = WHILE_LOADING[quantization], quantization
    total, in_experts, used_share = _parameters(n)
    if stored_bytes is not None and stored is Weights.W16:
        total = max(in_experts, stored_bytes / _bytes_a_weight(n))
    weights_gb = (stored_bytes if stored_bytes is not None else total * _BYTES[stored]) / 1e9
    if kept is not stored:
        weights_gb = _quantized_gb(n, total, kept)
    shape = ModelShape(
        params_b=total / 1e9,
        active_b=(total - in_experts * (1.0 - used_share)) / 1e9,
        weights_gb=weights_gb,
        weights=kept,
        layers=n.number("num_hidden_layers", "n_layer"),
        hidden=n.number("hidden_size", "n_embd"),
        kv_bytes=_kv_bytes(n, wanted),
        experts=_experts(n) if in_experts else 0,
        experts_used=_experts_used(n) if in_experts else 0,
    )
    if _scores(n):
        raise ConfigError(f"{what} scores texts: only models that make text or vectors can be served")
    kind, makes_vectors = n.text("model_type") or "unknown", pooling or _is_pooling(n)
    return ModelFacts(kind, shape, wanted, method, makes_vectors, kept is not stored)


def _quantized_gb(n: ConfigNumbers, total: float, kept: Weights) -> float:
    """Return the size after quantization while loading: embeddings and head stay in 16 bits."""
    outside = 2 * n.number("vocab_size") * n.number("hidden_size", "n_embd")
    return (min(outside, total) * 2.0 + max(0.0, total - outside) * _BYTES[kept]) / 1e9


def _stored_as(n: ConfigNumbers, what: str) -> tuple[Weights, str | None]:
    said = n.outer.get("quantization_config") or n.data.get("quantization_config")
    if not isinstance(said, Mapping):
        return Weights.W16, None
    method = str(said.get("quant_method", "")).lower()
    if method not in QUANTIZED:
        raise ConfigError(f"{what}: quantized by {method or 'something unnamed'}: known are {_listed()}")
    bits = said.get("bits") or said.get("w_bit") or _group_bits(said)
    if bits in (4, 8):
        return (Weights.W4 if bits == 4 else Weights.W8), method
    return QUANTIZED[method], method


def _listed() -> str:
    return ", ".join(sorted(QUANTIZED))


def _group_bits(said: Mapping[str, Any]) -> int | None:
    """Return the bits of compressed-tensors' first group of weights."""
    groups = said.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping) and isinstance(weights.get("num_bits"), int):
            return int(weights["num_bits"])
    return None


def _bytes_a_weight(n: ConfigNumbers) -> float:
    said = str(n.outer.get("torch_dtype") or n.outer.get("dtype") or n.text("torch_dtype") or n.text("dtype"))
    return 4.0 if said == "float32" else 2.0


def _experts(n: ConfigNumbers) -> int:
    return n.number("num_experts", "num_local_experts", "n_routed_experts", default=0, least=0)


def _experts_used(n: ConfigNumbers) -> int:
    return n.number("num_experts_per_tok", "experts_per_token", "top_k_experts", default=0, least=0)


def _parameters(n: ConfigNumbers) -> tuple[float, float, float]:
    """Return (all parameters, those of experts to choose from, the share of these that a token uses)."""
    hidden, layers = n.number("hidden_size", "n_embd"), n.number("num_hidden_layers", "n_layer")
    heads = n.number("num_attention_heads", "n_head")
    wide = n.number("head_dim", default=max(1, hidden // heads))
    kv = n.number("num_key_value_heads", default=heads)
    attention = 2 * hidden * heads * wide + 2 * hidden * kv * wide
    kind = n.text("model_type")
    tied = n.data.get("tie_word_embeddings") is True or kind.startswith("gemma") or _is_encoder(n)
    embedded = n.number("vocab_size") * hidden * (1 if tied else 2)
    inner = n.number("intermediate_size", "n_inner", default=4 * hidden)
    experts = _experts(n)
    gates = 2 if _is_encoder(n) else 3
    if experts < 2:
        return float(embedded + layers * (attention + gates * hidden * inner)), 0.0, 1.0
    expert = 3 * hidden * n.number("moe_intermediate_size", default=inner)
    dense_layers = min(layers, n.number("first_k_dense_replace", default=0, least=0))
    shared = n.number("n_shared_experts", "num_shared_experts", default=0, least=0)
    sparse = layers - dense_layers
    chosen = float(sparse * experts * expert)
    rest = embedded + layers * attention + dense_layers * 3 * hidden * inner
    rest += sparse * (shared * expert + hidden * experts)
    return rest + chosen, chosen, min(1.0, _experts_used(n) / experts)


def _kv_bytes(n: ConfigNumbers, context: int) -> float:
    """Return the bytes that one token keeps, on average over a request as long as the context."""
    layers = n.number("num_hidden_layers", "n_layer")
    if "kv_lora_rank" in n.data:
        wide = n.number("kv_lora_rank") + n.number("qk_rope_head_dim", default=0, least=0)
        return float(layers * wide * KV_BYTES)
    heads = n.number("num_attention_heads", "n_head")
    wide = n.number("head_dim", default=max(1, n.number("hidden_size", "n_embd") // heads))
    layer = 2 * n.number("num_key_value_heads", default=heads) * wide * KV_BYTES
    window, local = n.data.get("sliding_window"), _local_layers(n, layers)
    if not isinstance(window, int) or isinstance(window, bool) or not local:
        return float(layers * layer)
    return layer * ((layers - local) + local * min(1.0, window / context))


def _local_layers(n: ConfigNumbers, layers: int) -> int:
    """Return how many layers look back only through the sliding window."""
    if n.data.get("use_sliding_window") is False:
        return 0
    types = n.data.get("layer_types")
    if isinstance(types, list):
        return min(layers, sum(1 for kind in types if kind == "sliding_attention"))
    every = n.data.get("sliding_window_pattern")
    if isinstance(every, int) and every > 1:
        return int(layers - layers // every)
    if n.text("model_type").startswith("gemma3"):
        return layers - layers // 6  # five of six, where the config does not say it (gemma3_text)
    return layers if n.text("model_type") == "mistral" else 0


def _is_encoder(n: ConfigNumbers) -> bool:
    return n.text("model_type") in ("bert", "roberta", "xlm-roberta", "distilbert", "nomic_bert", "mpnet")


def _scores(n: ConfigNumbers) -> bool:
    names = n.outer.get("architectures")
    return isinstance(names, list) and any("SequenceClassification" in str(name) for name in names)


def _is_pooling(n: ConfigNumbers) -> bool:
    names = n.outer.get("architectures")
    first = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    makes_text = "ForCausalLM" in first or "ForConditionalGeneration" in first
    return _is_encoder(n) or (bool(first) and not makes_text)
