"""What hub and registry let a container have: gated, private and missing models and images, by faults.

    fault gated-model …  ─► Boot.hub ─► machine.json ─► the paced engine dies as vLLM does, with vLLM's words
    fault missing-image … ─► status_msg, as docker words it

The token is what the container has in HF_TOKEN, from the order or from the account's secret variables. The
words are those of vLLM 0.32 with transformers 5.19, asked for such models of a hub on loopback (2026-11).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from localcloud.faults import Faults

ANY = "any"
"""In place of the name of a model or an image: whichever it is."""

MODEL_FAULTS = ("gated-model", "missing-model", "wrong-argument", "unknown-architecture", "no-chat-template")
"""Faults of what an engine reads."""


@dataclass(frozen=True)
class Death:
    """How an engine ends that cannot begin: its last lines, and its exit status."""

    lines: tuple[str, ...]
    status: int = 1


@dataclass(frozen=True)
class HubAccess:
    """What an engine gets of the hub. Each is the name of a model, ANY or "" for none.

    gated: opened by `token`. argument: one that vLLM does not know. no_chat_template: chats are refused.
    """

    gated: str = ""
    token: str = ""
    missing: str = ""
    unknown_architecture: str = ""
    argument: str = ""
    no_chat_template: str = ""

    @classmethod
    def by_faults(cls, faults: Faults, boot: tuple[int, int], now: float) -> "HubAccess":
        """Return what the faults leave that strike that boot."""
        struck = {name: faults.strikes(name, now, boot) or {} for name in MODEL_FAULTS}
        gated = struck["gated-model"]
        return cls(
            gated.get("model", ""),
            gated.get("token", ""),
            struck["missing-model"].get("model", ""),
            struck["unknown-architecture"].get("model", ""),
            struck["wrong-argument"].get("argument", ""),
            struck["no-chat-template"].get("model", ""),
        )

    def shown(self) -> dict[str, str]:
        """Return it as JSON for the engine."""
        return asdict(self)

    def death(self, model: str, argv: Sequence[str], environ: Mapping[str, str]) -> Death | None:
        """Return how an engine with that model, command line and environment ends; None: it loads."""
        if self.argument and any(a.partition("=")[0] == self.argument for a in argv):
            usage = "usage: api_server.py [-h] [--headless] [--api-server-count API_SERVER_COUNT] [model_tag]"
            return Death((usage, f"api_server.py: error: unrecognized arguments: {self.argument}"), 2)
        if environ.get("HF_HUB_OFFLINE") == "1":
            return None  # what is on the disk is not asked for
        token = environ.get("HF_TOKEN", "")
        if _is(self.gated, model) and token != self.token:
            return _gated(model, with_token=bool(token))
        if _is(self.missing, model):
            return Death(
                (
                    "huggingface_hub.errors.RepositoryNotFoundError: 404 Client Error.",
                    f"OSError: {model} is not a local folder and is not a valid model identifier listed on "
                    "'https://huggingface.co/models'",
                    "If this is a private repository, make sure to pass a token having permission to this "
                    "repo either by logging in with `hf auth login` or by passing `token=<your_token>`",
                )
            )
        if _is(self.unknown_architecture, model):
            return Death(
                (
                    "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
                    "  Value error, Model architectures ['LaterForCausalLM'] are not supported for now. "
                    "Supported architectures: dict_keys(['LlamaForCausalLM', 'Qwen3ForCausalLM'])",
                )
            )
        return None

    def refuses_chats(self, model: str) -> bool:
        """Return whether the model has no chat template."""
        return _is(self.no_chat_template, model)


def _is(named: str, model: str) -> bool:
    return named in (ANY, model)


def _gated(model: str, *, with_token: bool) -> Death:
    status, why = 401, "You must have access to it and be authenticated to access it. Please log in."
    if with_token:
        status = 403
        why = (
            f"and you are not in the authorized list. Visit https://huggingface.co/{model} to ask for access."
        )
    restricted = f"Access to model {model} is restricted"
    return Death(
        (
            f"huggingface_hub.errors.GatedRepoError: {status} Client Error.",
            "OSError: You are trying to access a gated repo.",
            f"Make sure to have access to it at https://huggingface.co/{model}.",
            f"{status} Client Error.",
            f"Cannot access gated repo for url https://huggingface.co/{model}/resolve/main/config.json.",
            f"{restricted} {why}" if with_token else f"{restricted}. {why}",
        )
    )


def image_error(
    faults: Faults, image: str, login: str | None, boot: tuple[int, int], now: float
) -> str | None:
    """Return what docker says where a fault keeps the image from that boot; None where it can be pulled."""
    daemon = "Error response from daemon"
    missing = faults.strikes("missing-image", now, boot)
    if missing is not None and _is(missing["image"], image):
        return f"{daemon}: manifest for {image} not found: manifest unknown: manifest unknown"
    private: Mapping[str, Any] | None = faults.strikes("private-image", now, boot)
    if private is not None and _is(private["image"], image) and login != private["login"]:
        repository = image.rpartition(":")[0] or image
        return (
            f"{daemon}: pull access denied for {repository}, repository does not exist or may require "
            "'docker login': denied: requested access to the resource is denied"
        )
    return None
