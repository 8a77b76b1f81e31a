"""Asks hub and registry, before anything is rented, whether machines can have the model and the image.

    refused    a clear no: gated, private or not there; nothing is rented before that is mended
    there      a machine with the account's token, or the registry's login, can read it
    unknown    nobody answered, or not clearly: it is said, and all goes on

The hub is that of HF_ENDPOINT, else huggingface.co. With a local cloud only what is on this machine is asked.
The token is the account's own HF_TOKEN, as its containers get it; it is sent to the hub, and nowhere else.
"""

import base64
import json
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from http.client import HTTPException
from typing import Any

from engine.profile import Profile
from fleet.blame import SET_TOKEN
from fleet.outside.config import AutoscalerConfig
from fleet_client.loopback import is_loopback_host, is_loopback_url
from process.errors import CloudError
from process.safe_text import safe_text
from vast.account_secrets import RegistryLogin, SecretVariables
from vast.cli import Cli

TIMEOUT_S = 5.0
"""For one request; there are at most four."""

HUB = "https://huggingface.co"
DOCKER_HUB = "registry-1.docker.io"

MANIFESTS = ", ".join(
    f"application/vnd.{kind}+json"
    for kind in (
        "oci.image.index.v1",
        "oci.image.manifest.v1",
        "docker.distribution.manifest.list.v2",
        "docker.distribution.manifest.v2",
    )
)
"""The kinds of manifest that a registry may have: without them some answer 404."""

MOST_BYTES = 100_000
"""Of an answer that is read: a token."""


class Access(StrEnum):
    """Whether machines can have something."""

    THERE = "there"
    REFUSED = "refused"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Finding:
    """What was found of the model or the image, in a sentence."""

    access: Access
    says: str


@dataclass(frozen=True)
class _Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes


class _NoAnswer(Exception):
    """Nobody answered, or nothing that is HTTP; the text says what came."""


class _StaysThere(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the token, or the login, is for the server that was asked."""

    def redirect_request(self, *_: Any) -> None:
        """Follow none."""


def _ask(method: str, url: str, headers: Mapping[str, str]) -> _Answer:
    request = urllib.request.Request(url, method=method, headers=dict(headers))  # noqa: S310 by our callers
    proxies = urllib.request.ProxyHandler({} if is_loopback_url(url) else None)
    opener = urllib.request.build_opener(proxies, _StaysThere)
    try:
        with opener.open(request, timeout=TIMEOUT_S) as reply:
            return _Answer(reply.status, dict(reply.headers), reply.read(MOST_BYTES))
    except urllib.error.HTTPError as e:
        return _Answer(e.code, dict(e.headers), b"")
    except (OSError, ValueError, HTTPException) as e:
        raise _NoAnswer(safe_text(str(getattr(e, "reason", None) or e), 100)) from None


# -- the model ---------------------------------------------------------------------------------------------


def check_model(model: str, endpoint: str, token: str | None) -> Finding:
    """Return whether a machine with that token can read the model; token: None for none.

    Reading the configuration is refused where the weights are; the page of a gated model is open to all.
    """
    url = f"{endpoint.rstrip('/')}/{urllib.parse.quote(model)}/resolve/main/config.json"
    try:
        found = _ask("HEAD", url, {"Authorization": f"Bearer {token}"} if token else {})
    except _NoAnswer as e:
        return Finding(Access.UNKNOWN, f"model {model}: the hub does not answer ({e}), so it is not checked")
    code = found.headers.get("X-Error-Code", "")
    said = safe_text(found.headers.get("X-Error-Message", ""), 200)
    as_who = "with the account's HF_TOKEN" if token else "without a token"
    if found.status < 400 or code == "EntryNotFound":
        return Finding(Access.THERE, f"model {model} can be read {as_who}")
    if code == "GatedRepo":
        todo = f"accept its terms on the hub and set a token of that account with {SET_TOKEN}"
        why = f"is gated, and cannot be read {as_who} ({said})"
        return Finding(Access.REFUSED, f"model {model} {why}: {todo}")
    if found.status == 401 and token and code != "RepoNotFound":
        todo = f"set another with {SET_TOKEN}"
        why = f"the hub refuses the account's HF_TOKEN ({said})"
        return Finding(Access.REFUSED, f"model {model}: {why}: {todo}")
    if code == "RepoNotFound" or found.status == 404:
        todo = f"correct its name, or, if it is private, set a token that may read it with {SET_TOKEN}"
        return Finding(Access.REFUSED, f"model {model}: the hub shows none {as_who} ({said}): {todo}")
    return Finding(Access.UNKNOWN, f"model {model}: the hub answers {found.status}, so it is not checked")


# -- the image ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageName:
    """The name of an image: its registry's host, its repository there, and its tag or digest."""

    registry: str
    repository: str
    tag: str

    @classmethod
    def read(cls, image: str) -> "ImageName":
        """Return the parts of a name as docker reads it: without a registry it is on Docker Hub."""
        name, at, digest = image.partition("@")
        first, slash, rest = name.partition("/")
        named = bool(slash) and ("." in first or ":" in first or first == "localhost")
        registry, path = (first, rest) if named else (DOCKER_HUB, name)
        repository, colon, tag = path.rpartition(":")
        if not colon:
            repository, tag = path, "latest"
        if registry in ("docker.io", "index.docker.io"):
            registry = DOCKER_HUB
        if registry == DOCKER_HUB and "/" not in repository:
            repository = f"library/{repository}"
        return cls(registry, repository, digest if at else tag)

    @property
    def local(self) -> bool:
        """Whether the registry is on this machine."""
        return is_loopback_host(urllib.parse.urlsplit(f"//{self.registry}").hostname or "")

    @property
    def url(self) -> str:
        """Where its manifest is."""
        scheme = "http" if self.local else "https"
        return f"{scheme}://{self.registry}/v2/{self.repository}/manifests/{self.tag}"


def check_image(image: str, login: RegistryLogin | None) -> Finding:
    """Return whether a host can pull the image, with that login where it is for the image's registry."""
    name = ImageName.read(image)
    mine = login if login is not None and _registry(login) == name.registry else None
    try:
        found = _ask("HEAD", name.url, {"Accept": MANIFESTS})
        if found.status == 401:
            bearer = _bearer(name, found.headers.get("WWW-Authenticate", ""), mine)
            if bearer is not None:
                found = _ask("HEAD", name.url, {"Accept": MANIFESTS, "Authorization": bearer})
    except _NoAnswer as e:
        why = f"its registry does not answer ({e}), so it is not checked"
        return Finding(Access.UNKNOWN, f"image {image}: {why}")
    as_who = "with the login of --registry-login" if mine else "without a login"
    if found.status < 400:
        return Finding(Access.THERE, f"image {image} can be pulled {as_who}")
    if found.status == 404:
        why = "its registry has none of that name: correct name and tag"
        return Finding(Access.REFUSED, f"image {image}: {why}")
    if found.status in (401, 403):
        todo = "correct its name, or, if it is private, give --registry-login"
        return Finding(Access.REFUSED, f"image {image}: its registry does not give it {as_who}: {todo}")
    why = f"its registry answers {found.status}, so it is not checked"
    return Finding(Access.UNKNOWN, f"image {image}: {why}")


def _registry(login: RegistryLogin) -> str:
    return DOCKER_HUB if login.registry in ("", "docker.io", "index.docker.io") else login.registry


def _bearer(name: ImageName, challenge: str, login: RegistryLogin | None) -> str | None:
    """Return the Authorization that a registry's challenge leads to; None where it leads nowhere.

    The service that gives tokens may be another host; it is asked under TLS, or on this machine.
    """
    basic = ""
    if login is not None:
        basic = "Basic " + base64.b64encode(f"{login.user}:{login.password}".encode()).decode()
    if challenge.lower().startswith("basic"):
        return basic or None
    said = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    realm = said.get("realm", "")
    if not realm.startswith("https://") and not (name.local and is_loopback_url(realm)):
        return None
    asked = {"scope": f"repository:{name.repository}:pull"}
    if "service" in said:
        asked["service"] = said["service"]
    found = _ask("GET", f"{realm}?{urllib.parse.urlencode(asked)}", {"Authorization": basic} if basic else {})
    try:
        answer = json.loads(found.body)
        token = answer.get("token") or answer.get("access_token")
    except (ValueError, AttributeError):
        return None
    return f"Bearer {token}" if isinstance(token, str) and token.isascii() and token.isprintable() else None


# -- both --------------------------------------------------------------------------------------------------


class Beforehand:
    """Checks the model and the image of one fleet."""

    def __init__(
        self,
        model: str,
        image: str,
        login: RegistryLogin | None,
        variables: SecretVariables,
        *,
        local: bool,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        """Prepare to check. variables: of the account. local: the cloud is on this machine.

        environ: has HF_ENDPOINT, where another hub is to be asked.
        """
        self._model, self._image, self._login = model, image, login
        self._variables = variables
        self._local = local
        self._hub = environ.get("HF_ENDPOINT", "").strip() or HUB

    def findings(self) -> list[Finding]:
        """Return what hub and registry say; with a local cloud nothing beyond this machine is asked."""
        found = []
        is_on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", self._model) is not None
        if is_on_hub and (not self._local or is_loopback_url(self._hub)):
            found.append(self._check_model())
        if "@vastai-" not in self._image and (not self._local or ImageName.read(self._image).local):
            found.append(check_image(self._image, self._login))
        return found

    def _check_model(self) -> Finding:
        if not (self._hub.startswith("https://") or is_loopback_url(self._hub)):
            why = f"HF_ENDPOINT {self._hub!r} is neither https nor on this machine, so it is not checked"
            return Finding(Access.UNKNOWN, f"model {self._model}: {why}")
        try:
            token = self._variables.value("HF_TOKEN")
        except CloudError as e:
            why = f"the account's variables are not known: {e}"
            return Finding(Access.UNKNOWN, f"model {self._model}: {why}")
        found = check_model(self._model, self._hub, token if token and token.startswith("hf_") else None)
        if token and not token.startswith("hf_") and found.access is Access.REFUSED:
            why = "the cloud does not show the account's HF_TOKEN, so it is not checked"
            return Finding(Access.UNKNOWN, f"model {self._model}: {why}")
        return found


def beforehand_of(config: AutoscalerConfig, profile: Profile, cli: Cli) -> Beforehand:
    """Return the checks of the fleet of that configuration."""
    variables = SecretVariables(cli)
    return Beforehand(profile.model, profile.image.name, config.login(), variables, local=config.local)
