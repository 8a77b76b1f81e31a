"""The config.json of real models, as far as a size follows from it, and where each was read."""

from typing import Any

SLIME = "github.com/zyzshishui/slime scripts/models/"

QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "torch_dtype": "bfloat16",
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12_288,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": False,
    "sliding_window": None,
}
QWEN3_30B_A3B: dict[str, Any] = QWEN3_8B | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
GPT_OSS_20B: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "vocab_size": 201_088,
    "hidden_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 2880,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 131_072,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "mxfp4"},
}
LLAMA_70B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "vocab_size": 128_256,
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28_672,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": False,
}
MISTRAL_SMALL: dict[str, Any] = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "model_type": "mistral3",
    "torch_dtype": "bfloat16",
    "text_config": {
        "model_type": "mistral",
        "vocab_size": 131_072,
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 32_768,
        "max_position_embeddings": 131_072,
        "sliding_window": None,
    },
}
GEMMA_3_27B: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "torch_dtype": "bfloat16",
    "text_config": {
        "model_type": "gemma3_text",
        "vocab_size": 262_208,
        "hidden_size": 5376,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "intermediate_size": 21_504,
        "max_position_embeddings": 131_072,
        "sliding_window": 1024,
    },
}
BGE_M3: dict[str, Any] = {
    "architectures": ["XLMRobertaModel"],
    "model_type": "xlm-roberta",
    "torch_dtype": "float32",
    "vocab_size": 250_002,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "max_position_embeddings": 8194,
}

BUILT_IN: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "qwen3-4b": (
        "Qwen/Qwen3-4B",
        QWEN3_8B | {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
        [f"{SLIME}qwen3-4B.sh"],
    ),
    "qwen3-8b": ("Qwen/Qwen3-8B", QWEN3_8B, [f"{SLIME}qwen3-8B.sh"]),
    "qwen3-14b": (
        "Qwen/Qwen3-14B",
        QWEN3_8B
        | {
            "hidden_size": 5120,
            "intermediate_size": 17_408,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
        },
        [f"{SLIME}qwen3-14B.sh"],
    ),
    "qwen3-32b": (
        "Qwen/Qwen3-32B",
        QWEN3_8B
        | {
            "hidden_size": 5120,
            "intermediate_size": 25_600,
            "num_hidden_layers": 64,
            "num_attention_heads": 64,
        },
        [f"{SLIME}qwen3-32B.sh"],
    ),
    "qwen3-30b-a3b": (
        "Qwen/Qwen3-30B-A3B",
        QWEN3_30B_A3B,
        [f"{SLIME}qwen3-30B-A3B.sh", "apxml.com/models/qwen3-30b-a3b (30.5B, 3.3B active)"],
    ),
    "qwen3-235b-a22b-fp8": (
        "Qwen/Qwen3-235B-A22B-FP8",
        QWEN3_30B_A3B
        | {
            "hidden_size": 4096,
            "num_hidden_layers": 94,
            "num_attention_heads": 64,
            "moe_intermediate_size": 1536,
            "intermediate_size": 12_288,
            "quantization_config": {"quant_method": "fp8"},
        },
        [f"{SLIME}qwen3-235B-A22B.sh", "huggingface.co/Qwen/Qwen3-235B-A22B-FP8 (235B, 22B active, fp8)"],
    ),
    "gpt-oss-20b": (
        "openai/gpt-oss-20b",
        GPT_OSS_20B,
        [
            "github.com/EchoCog/gpt-oss-20b, its page on the architecture",
            "github.com/vllm-project/recipes OpenAI/GPT-OSS.md",
            "checkpoint of 12.8 GiB, 20.9B parameters: OpenAI's model card, as quoted in public overviews",
        ],
    ),
    "gpt-oss-120b": (
        "openai/gpt-oss-120b",
        GPT_OSS_20B
        | {
            "num_hidden_layers": 36,
            "num_local_experts": 128,
            "layer_types": ["sliding_attention", "full_attention"] * 18,
        },
        [
            "transformers' GptOssConfig, whose defaults are those of gpt-oss-120b",
            "github.com/vllm-project/recipes OpenAI/GPT-OSS.md",
            "checkpoint of 60.8 GiB, 116.8B parameters: OpenAI's model card, as quoted in public overviews",
        ],
    ),
    "llama-3.3-70b": (
        "meta-llama/Llama-3.3-70B-Instruct",
        LLAMA_70B,
        ["github.com/vulkomilev/oumi configs/recipes/llama3_1/README.md, and Llama 3.3's beside it"],
    ),
    "vllm-70-16bit": (
        "meta-llama/Llama-3.1-70B-Instruct",
        LLAMA_70B,
        ["github.com/vulkomilev/oumi configs/recipes/llama3_1/README.md", "docs/reference/timing.md 3, 4"],
    ),
    "mistral-small-24b": (
        "mistralai/Mistral-Small-3.2-24B-Instruct-2506",
        MISTRAL_SMALL,
        [
            "huggingface.co/gratex/mistral-small-3.2-24b-Instruct-GPTQ-W4A16",
            "llmrun.dev/model/mistralai-mistral-small-3-2-24b-instruct-2506 (file of 48.02 GB)",
        ],
    ),
    "gemma-3-27b": (
        "google/gemma-3-27b-it",
        GEMMA_3_27B,
        [
            "a public table of Gemma 3's shapes (62 layers, 5376, 32 and 16 heads of 128, 21504, 1024)",
            "oss.report/models/google/gemma-3-27b-it (25.6B and 1.4B parameters, five local layers of six)",
        ],
    ),
    "gemma-3-12b": (
        "google/gemma-3-12b-it",
        GEMMA_3_27B
        | {
            "text_config": GEMMA_3_27B["text_config"]
            | {
                "hidden_size": 3840,
                "num_hidden_layers": 48,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "head_dim": 256,
                "intermediate_size": 15_360,
            }
        },
        [
            "github.com/AI-Hypercomputer/maxtext gemma3-12b.yml (48 layers, 3840, 16 and 8 heads)",
            "github.com/keras-team/keras-hub gemma3_presets.py (11,765,788,416 parameters)",
        ],
    ),
}
"""Of each profile in engine/models.toml: repository, config, and where its numbers were read."""

STORED_BYTES = {
    "gpt-oss-20b": 13_744_000_000,  # 12.8 GiB
    "gpt-oss-120b": 65_284_000_000,  # 60.8 GiB
    "mistral-small-24b": 48_020_000_000,
}
"""Bytes of the safetensors where they were read; of the others they follow from the parameters."""
