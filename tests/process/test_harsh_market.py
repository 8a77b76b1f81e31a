"""The local cloud at its unkindest, asked by the real `vastai` command line."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.profiles import get_profile
from localcloud.regions import REGIONS
from localcloud.templates import TEMPLATES
from tests.process.test_localcloud import KEY, LocalCloud


def run_vastai(url: str, home: Path, *words: str) -> str:
    """Return what `vastai WORDS` prints about the cloud of that URL, its errors behind it."""
    ran = subprocess.run(
        [str(Path(sys.executable).parent / "vastai"), *words],
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "VAST_URL": url,
            "VAST_API_KEY": KEY,
            "VASTAI_NO_UPDATE_CHECK": "1",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return ran.stdout + ran.stderr


class HarshCloud(LocalCloud):
    """A local cloud with all unkindnesses but the limits on calls, and the CLI in front of it."""

    def __init__(self, path: Path) -> None:
        only = ("big_market", "renters", "price_moves", "sizes", "foreign_cpus", "old_drivers")
        super().__init__(path, "--realism", "harsh", *(w for name in only for w in ("--only", name)))
        self.path = path

    def cli(self, *words: str) -> str:
        """Return what `vastai WORDS` prints, its errors behind it."""
        return run_vastai(self.url, self.path, *words)

    def offers(self, query: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(
            self.cli("search", "offers", query, "--limit", "1000", "--raw")
        )
        return found


@pytest.fixture(scope="module")
def harsh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HarshCloud]:
    cloud = HarshCloud(tmp_path_factory.mktemp("harsh"))
    yield cloud
    cloud.process.kill()
    cloud.process.wait()


def test_the_search_of_a_profile_finds_machines_that_fit_and_only_those(harsh: HarshCloud) -> None:
    profile = get_profile("vllm-13")
    found = harsh.offers(profile.offer_query())
    assert found
    for offer in found:
        assert offer["cpu_arch"] == "amd64"
        assert offer["cuda_max_good"] >= 12.8
        assert offer["reliability"] > 0.98
        assert offer["duration"] > 3 * 86_400.0
        assert offer["inet_down_cost"] < 0.02
        assert offer["disk_space"] >= profile.disk_gb
        assert offer["gpu_ram"] >= 22_000
    more = harsh.offers("num_gpus=1 gpu_ram>=22 compute_cap>=800 inet_down>=200 cuda_max_good>=12.4")
    assert {o["cpu_arch"] for o in more} == {"amd64", "arm64"}
    assert min(o["cuda_max_good"] for o in more) == 12.4


def test_regions_countries_and_slices_are_found_as_the_command_line_asks(harsh: HarshCloud) -> None:
    europe = harsh.offers("geolocation=EU")
    assert {o["geolocation"][-2:] for o in europe} <= REGIONS["EU"]
    assert {o["geolocation"][-2:] for o in europe} > {
        o["geolocation"][-2:] for o in harsh.offers("geolocation in [SE,NO]")
    }
    fours = harsh.offers("num_gpus=4")
    assert fours
    assert {o["gpu_frac"] for o in fours} <= {0.5, 1.0}


def test_templates_tags_and_what_it_does_not_do(harsh: HarshCloud) -> None:
    (found,) = json.loads(harsh.cli("search", "templates", "name=vLLM"))
    assert found["hash_id"] == TEMPLATES[0]["hash_id"]
    offer = next(o for o in harsh.offers("gpu_name=RTX_4090 num_gpus=1 cpu_arch=amd64 disk_space>=40"))
    unknown = harsh.cli("create", "instance", str(offer["id"]), "--template_hash", "f00", "--raw")
    assert json.loads(unknown)["status_code"] == 400
    made = json.loads(
        harsh.cli(
            *("create", "instance", str(offer["id"]), "--image", "vastai/vllm:@vastai-automatic-tag"),
            *("--disk", "40", "--ssh", "--direct", "--raw"),
        )
    )
    (row,) = json.loads(harsh.cli("show", "instances", "--raw"))
    assert row["id"] == made["new_contract"]
    assert row["image_uuid"].startswith("vastai/vllm:v0.")
    updated = harsh.cli("update", "instance", str(row["id"]), "--image", "vllm/vllm-openai:v0.11.0")
    assert updated.startswith(f"Instance {row['id']} updated successfully.")
    for words in (
        ("show", "machines"),
        ("show", "endpoints"),
        ("show", "deposit", "1"),
        ("show", "audit-logs"),
    ):
        said = json.loads(harsh.cli(*words, "--raw").strip().splitlines()[-1])
        assert (said["error"], said["status_code"]) == (True, 404), words
        assert "the local cloud does not do this" in said["msg"]
