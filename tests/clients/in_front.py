"""Servers of others between a client and the gateway: nginx, and litellm's proxy."""

import os
import secrets
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.ports import free_port

UP_S = 60.0
"""Seconds within which each answers: litellm's proxy imports for 8 s on a quiet core."""

# What docs/clients.md says of a reverse proxy, and what nginx needs to run for any user.
NGINX = """
daemon off; worker_processes 1; pid {home}/pid; error_log {home}/error.log;
events {{}}
http {{
  access_log off;
  client_body_temp_path {home}/body; proxy_temp_path {home}/proxy;
  fastcgi_temp_path {home}/fastcgi; uwsgi_temp_path {home}/uwsgi; scgi_temp_path {home}/scgi;
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass {gateway};
      proxy_set_header Host 127.0.0.1; client_max_body_size 64m; proxy_buffering off;
    }}
  }}
}}
"""

LITELLM = """
model_list:
  - model_name: vllm-13
    litellm_params: {{model: openai/vllm-13, api_base: "{gateway}/v1", api_key: unused}}
"""


@contextmanager
def running(command: Sequence[str | Path], url: str, environ: Mapping[str, str], log: Path) -> Iterator[None]:
    """Run a server; begins when the URL answers."""
    with log.open("wb") as kept:
        server = subprocess.Popen(command, stdout=kept, stderr=kept, env={**os.environ, **environ})
    try:
        limit = time.monotonic() + UP_S
        while True:
            try:
                urllib.request.urlopen(url, timeout=5).close()  # noqa: S310 on loopback
                break
            except OSError as e:
                if server.poll() is not None or time.monotonic() > limit:
                    raise ChildProcessError(f"{command[0]} does not answer: {log.read_text()[-500:]}") from e
                time.sleep(0.2)
        yield
    finally:
        server.terminate()
        server.wait(30)


@contextmanager
def nginx(base: str) -> Iterator[str | None]:
    """Run nginx in front of the gateway; gives its base URL, None where there is no nginx."""
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        yield None
        return
    port, gateway = free_port(), base.removesuffix("/v1")
    with tempfile.TemporaryDirectory() as made:
        home = Path(made)
        # Its workers are nobody's when root starts it, and they write below here.
        home.chmod(0o755)
        (home / "conf").write_text(NGINX.format(home=home, port=port, gateway=gateway))
        url = f"http://127.0.0.1:{port}"
        command = (program, "-c", home / "conf", "-e", home / "error.log")
        with running(command, f"{url}/health", {}, home / "log"):
            yield f"{url}/v1"


@contextmanager
def litellm_proxy(environment: Path, base: str) -> Iterator[tuple[str, str]]:
    """Run litellm's proxy in front of the gateway; gives its base URL and a key for it."""
    port, key = free_port(), f"sk-{secrets.token_hex(32)}"
    with tempfile.TemporaryDirectory() as made:
        home = Path(made)
        (home / "conf.yaml").write_text(LITELLM.format(gateway=base.removesuffix("/v1")))
        url = f"http://127.0.0.1:{port}"
        command = (environment / "bin" / "litellm", "--config", home / "conf.yaml", "--port", str(port))
        environ = {"LITELLM_MASTER_KEY": key, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        with running((*command, "--host", "127.0.0.1"), f"{url}/health/liveliness", environ, home / "log"):
            yield f"{url}/v1", key
