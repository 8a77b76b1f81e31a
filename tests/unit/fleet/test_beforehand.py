"""What is asked of hub and registry before anything is rented: fleet/outside/beforehand.py."""

import base64
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fleet.outside.beforehand import Access, Beforehand, ImageName, check_image, check_model
from tests.ports import free_port
from tests.vast_answers import ScriptedCli, answered, refused
from vast.account_secrets import RegistryLogin, SecretVariables

RIGHT = "hf_right"
GATED = "Access to model meta/gated is restricted."


class HubAndRegistry(ThreadingHTTPServer):
    """A hub with meta/gated and org/open, and a registry with open/image and, for anna, private/image."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[tuple[str, str, str]] = []
        self.gated = "meta/gated"

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    @property
    def url(self) -> str:
        return f"http://{self.host}"


class _Handler(BaseHTTPRequestHandler):
    server: HubAndRegistry

    def answer(self) -> None:
        said = self.headers.get("Authorization", "")
        self.server.asked.append((self.command, self.path, said))
        answer = self._registry if self.path.startswith(("/v2/", "/token")) else self._hub
        status, headers, body = answer(said)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _hub(self, said: str) -> tuple[int, dict[str, str], bytes]:
        def no(status: int, code: str, message: str) -> tuple[int, dict[str, str], bytes]:
            return status, {"X-Error-Code": code, "X-Error-Message": message}, b""

        if said and said != f"Bearer {RIGHT}" and said != "Bearer hf_other":
            return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b""
        if self.path.startswith(f"/{self.server.gated}/"):
            if said == f"Bearer {RIGHT}":
                return 200, {}, b"{}"
            return no(403 if said else 401, "GatedRepo", GATED)
        if self.path.startswith("/org/open/"):
            return 200, {}, b"{}"
        if self.path.startswith("/org/moved/"):
            return 307, {"Location": "http://127.0.0.1:9/elsewhere"}, b""
        if self.path.startswith("/org/gguf/"):
            return no(404, "EntryNotFound", "Entry not found")
        if self.path.startswith("/org/down/"):
            return 503, {}, b""
        return no(404 if said else 401, "RepoNotFound", "Repository not found")

    def _registry(self, said: str) -> tuple[int, dict[str, str], bytes]:
        anna = "Basic " + base64.b64encode(b"anna:s3cr3t").decode()
        if self.path.startswith("/token"):
            kind = b"anna" if said == anna else b"anyone"
            return 200, {}, b'{"token": "for-' + kind + b'"}'
        if not said:
            realm = f'Bearer realm="{self.server.url}/token",service="here",scope="x"'
            return 401, {"WWW-Authenticate": realm}, b""
        if self.path == "/v2/open/image/manifests/v1":
            return 200, {}, b""
        if self.path.startswith("/v2/private/"):
            return (200, {}, b"") if said == "Bearer for-anna" else (401, {}, b"")
        return 404, {}, b""

    do_GET = do_HEAD = answer

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[HubAndRegistry]:
    made = HubAndRegistry()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.mark.parametrize(
    ("model", "token", "access", "says"),
    [
        ("org/open", None, Access.THERE, "can be read without a token"),
        ("meta/gated", RIGHT, Access.THERE, "can be read with the account's HF_TOKEN"),
        ("org/moved", None, Access.THERE, "can be read"),
        ("org/gguf", None, Access.THERE, "can be read"),
        ("meta/gated", None, Access.REFUSED, "is gated, and cannot be read without a token"),
        ("meta/gated", "hf_other", Access.REFUSED, "accept its terms on the hub and set a token"),
        ("meta/gated", "hf_wrong", Access.REFUSED, "the hub refuses the account's HF_TOKEN"),
        ("org/nothing", None, Access.REFUSED, "correct its name, or, if it is private"),
        ("org/nothing", RIGHT, Access.REFUSED, "the hub shows none with the account's HF_TOKEN"),
        ("org/down", None, Access.UNKNOWN, "answers 503, so it is not checked"),
    ],
)
def test_a_model_is_there_refused_or_not_known(
    server: HubAndRegistry, model: str, token: str | None, access: Access, says: str
) -> None:
    found = check_model(model, server.url, token)
    assert found.access is access
    assert says in found.says
    assert token is None or token not in found.says


def test_a_token_follows_no_redirect(server: HubAndRegistry) -> None:
    check_model("org/moved", server.url, RIGHT)
    assert [path for _, path, _ in server.asked] == ["/org/moved/resolve/main/config.json"]


def test_where_nobody_answers_it_is_said_and_goes_on() -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    assert check_model("org/open", nowhere, None).access is Access.UNKNOWN
    found = check_image(f"{nowhere.removeprefix('http://')}/open/image:v1", None)
    assert found.access is Access.UNKNOWN
    assert "does not answer" in found.says


LOGIN = RegistryLogin("anna", "s3cr3t", "")


@pytest.mark.parametrize(
    ("image", "login", "access", "says"),
    [
        ("open/image:v1", False, Access.THERE, "can be pulled without a login"),
        ("open/image:v99", False, Access.REFUSED, "its registry has none of that name"),
        ("private/image:v1", False, Access.REFUSED, "or, if it is private, give --registry-login"),
        ("private/image:v1", True, Access.THERE, "can be pulled with the login"),
    ],
)
def test_an_image_is_there_or_refused(
    server: HubAndRegistry, image: str, login: bool, access: Access, says: str
) -> None:
    found = check_image(
        f"{server.host}/{image}", RegistryLogin("anna", "s3cr3t", server.host) if login else None
    )
    assert found.access is access
    assert says in found.says


def test_a_login_goes_to_its_own_registry_only(server: HubAndRegistry) -> None:
    check_image(f"{server.host}/private/image:v1", RegistryLogin("anna", "s3cr3t", "ghcr.io"))
    assert not any(said.startswith("Basic") for _, _, said in server.asked)


@pytest.mark.parametrize(
    ("image", "parts"),
    [
        ("vllm/vllm-openai:v0.11.0", ("registry-1.docker.io", "vllm/vllm-openai", "v0.11.0")),
        ("docker.io/vllm/vllm-openai", ("registry-1.docker.io", "vllm/vllm-openai", "latest")),
        ("ubuntu", ("registry-1.docker.io", "library/ubuntu", "latest")),
        ("ghcr.io/a/b/c:t", ("ghcr.io", "a/b/c", "t")),
        ("127.0.0.1:5000/a:t", ("127.0.0.1:5000", "a", "t")),
        ("a/b:t@sha256:00", ("registry-1.docker.io", "a/b", "sha256:00")),
    ],
)
def test_an_images_name_is_read_as_docker_reads_it(image: str, parts: tuple[str, str, str]) -> None:
    name = ImageName.read(image)
    assert (name.registry, name.repository, name.tag) == parts


def beforehand(
    server: HubAndRegistry, *runs: tuple[str, str, int], model: str = "meta/gated", local: bool = True
) -> Beforehand:
    cli = ScriptedCli()
    cli.plays(*runs)
    environ = {"HF_ENDPOINT": server.url}
    image = f"{server.host}/open/image:v1"
    return Beforehand(model, image, None, SecretVariables(cli), local=local, environ=environ)


def test_the_accounts_own_token_is_what_the_hub_is_asked_with(server: HubAndRegistry) -> None:
    found = beforehand(server, answered({"HF_TOKEN": RIGHT})).findings()
    assert [f.access for f in found] == [Access.THERE, Access.THERE]
    found = beforehand(server, answered({})).findings()
    assert [f.access for f in found] == [Access.REFUSED, Access.THERE]


def test_a_value_that_the_service_does_not_show_refuses_nothing(server: HubAndRegistry) -> None:
    (found, _) = beforehand(server, answered({"HF_TOKEN": "*****"})).findings()
    assert found.access is Access.UNKNOWN
    assert "does not show" in found.says
    (found, _) = beforehand(server, refused(401, "Invalid user key")).findings()
    assert found.access is Access.UNKNOWN


def test_with_a_local_cloud_nothing_beyond_this_machine_is_asked(server: HubAndRegistry) -> None:
    cli = SecretVariables(ScriptedCli())
    image = "vllm/vllm-openai:v0.11.0"
    assert Beforehand("meta/gated", image, None, cli, local=True, environ={}).findings() == []
    assert Beforehand("tiny-random-llama", image, None, cli, local=True, environ={}).findings() == []


def test_a_hub_in_the_clear_beyond_this_machine_gets_no_token() -> None:
    cli = SecretVariables(ScriptedCli())
    environ = {"HF_ENDPOINT": "http://hub.example"}
    made = Beforehand("meta/gated", "a/b:@vastai-automatic-tag", None, cli, local=False, environ=environ)
    (found,) = made.findings()
    assert found.access is Access.UNKNOWN
