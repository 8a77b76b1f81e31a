"""A tiny Llama with random weights, so that real vLLM has something to serve where nothing can be downloaded.

    .venv-vllm/bin/python localcloud/tiny_model.py DIR     DIR holds the model, as Hugging Face lays one out

Two layers, 427 k parameters, 0.9 MB in bfloat16. Its answers are noise; their tokens are counted, streamed
and batched as those of any model. Run by the Python of the engine, which has torch, transformers and
tokenizers.
"""

import shutil
import sys
import tempfile
from pathlib import Path

VOCABULARY = 512
SPECIAL = ("<|begin|>", "<|end|>", "<|pad|>")
"""Tokens 0, 1 and 2. The 256 bytes follow, so that every text has tokens, then frequent pieces of TEXT."""

SEED = 0

TEXT = """\
Rented machines are cheap by the second and useless by the hour, and what is missing is the small program
between them. It turns machines of a market place into one dependable, cheap and private service, and keeps
those that are stopped, because loading a model takes minutes to over an hour. A client asks where to go, is
given an address and a token that admits one request, once, on one instance, and sends its prompt straight to
the machine. The answer comes back in the same way, so nobody in the middle has anything to read. Whoever asks
twice with the same token is refused, whoever has none is refused as well. When there is much to do more
machines are started, when there is little they are drained, stopped, and in the end given back.
Once upon a time there was a king who had three daughters, and each of them could count the stars above the
sea. The first counted quickly and was wrong, the second counted slowly and fell asleep, the third wrote down
every number before she went on. "How many are there?" asked the king. "I shall know tomorrow," she said.
"""

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def make(directory: Path) -> None:
    """Make the tiny model in that directory, unless there is one already."""
    if directory.exists():
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f"{directory.name}.", dir=directory.parent))
    try:
        _save(made)
        try:
            made.rename(directory)
        except OSError:
            if not directory.exists():  # otherwise another process was quicker, and made the same
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _save(directory: Path) -> None:
    import torch  # type: ignore[import-not-found, unused-ignore]
    from tokenizers import (  # type: ignore[import-not-found, unused-ignore]
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        trainers,
    )
    from transformers import (  # type: ignore[import-not-found, unused-ignore]
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=1,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    begin, end, pad = SPECIAL
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token=end,
        pad_token=pad,
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(directory)

    torch.manual_seed(SEED)
    numbers = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        **numbers,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(**numbers)
    model.save_pretrained(directory)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: tiny_model.py DIR")
    make(Path(sys.argv[1]).absolute())
