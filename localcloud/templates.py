"""The templates that the local cloud knows: a few of the kind that the marketplace recommends."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from localcloud.images import AUTOMATIC_TAG

_MADE_AT = 1_790_000_000.0
_PARTS = ("id", "hash_id", "name", "image", "tag", "recommended_disk_space")
_ROWS: tuple[tuple[int, str, str, str, str, float], ...] = (
    (101, "9a1f6d2e5b3c4a7f8e0d1c2b3a495867", "vLLM", "vastai/vllm", AUTOMATIC_TAG, 40.0),
    (102, "1f0e2d3c4b5a69788796a5b4c3d2e1f0", "PyTorch", "vastai/pytorch", AUTOMATIC_TAG, 32.0),
    (103, "5e4d3c2b1a0f9e8d7c6b5a4f3e2d1c0b", "Base image", "vastai/base-image", AUTOMATIC_TAG, 16.0),
    (104, "c0ffee00d15ea5e00ddba11ca11ab1e5", "vLLM by its makers", "vllm/vllm-openai", "v0.11.0", 40.0),
)

TEMPLATES: tuple[Mapping[str, Any], ...] = tuple(
    MappingProxyType(
        {
            **dict(zip(_PARTS, row, strict=True)),
            "creator_id": 62897,
            "created_at": _MADE_AT,
            "recent_create_date": _MADE_AT,
            "count_created": 1_000 * (5 - n),
            "default_tag": row[4],
            "docker_login_repo": None,
            "jup_direct": False,
            "ssh_direct": True,
            "use_ssh": True,
            "recommended": True,
            "private": False,
            "env": "",
            "onstart": None,
            "runtype": "ssh",
        }
    )
    for n, row in enumerate(_ROWS)
)


def template_of(wanted: object) -> Mapping[str, Any] | None:
    """Return the template with that hash, or with that number; None if there is none."""
    return next((t for t in TEMPLATES if wanted in (t["hash_id"], t["id"])), None)


def image_of(template: Mapping[str, Any]) -> str:
    """Return the image of a template with its tag."""
    return f"{template['image']}:{template['tag']}"
