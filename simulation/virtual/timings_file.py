"""Step-time constants of your own: the JSON file behind `sim.py --virtual --timings`.

    [{"model": "13B", "quantization": "awq4", "gpu": "RTX 5090", "num_gpus": 1,
      "a": 6.0, "b": 0.05, "c": 0.6, "d": 6.0, "e": 110.0, "f": 3.5, "kv_tokens": 25000}]

max_seqs (256) and step_tokens (2048) may be left out; engine/step_time_constants.py says what they mean.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from engine.step_time_constants import Key, Timing
from fleet_client.text_files import read_text
from process.errors import ConfigError
from web.messages.decoding import BadField, decode
from web.messages.hot_set import Count, StepConstant

Name = Annotated[str, Meta(min_length=1, max_length=100)]


class OwnTiming(Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of a file of step-time constants."""

    model: Name
    quantization: Name
    gpu: Name
    num_gpus: Count
    a: StepConstant
    b: StepConstant
    c: StepConstant
    d: StepConstant
    e: StepConstant
    f: StepConstant
    kv_tokens: Count
    max_seqs: Count = 256
    step_tokens: Count = 2048

    def __post_init__(self) -> None:
        """Raise ValueError when max_seqs, the requests at once, is over step_tokens, the tokens in a step."""
        if self.max_seqs > self.step_tokens:
            raise ValueError(f"max_seqs: wanted at most step_tokens, {self.step_tokens}, got {self.max_seqs}")


def read_timings(path: Path) -> Mapping[Key, Timing]:
    """Return the step-time constants of a file; raise a ConfigError with file, entry and field."""
    try:
        entries = decode(read_text(path, "--timings").encode(), list[OwnTiming])
    except BadField as wrong:
        raise ConfigError(f"{path}: {wrong}") from None
    if not entries:
        raise ConfigError(f"{path}: wanted a list of at least one object")
    found: dict[Key, Timing] = {}
    for n, o in enumerate(entries):
        what = f"{o.model} {o.quantization} on {o.num_gpus}x {o.gpu}"
        key = o.model, o.quantization, o.gpu, o.num_gpus
        if key in found:
            raise ConfigError(f"{path}: [{n}]: {what} is there already")
        found[key] = Timing(
            f"{what}, {path.name}", o.a, o.b, o.c, o.d, o.e, o.f, o.kv_tokens, o.max_seqs, o.step_tokens
        )
    return found
