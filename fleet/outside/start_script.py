"""What a new instance is created with: a short start script, and remote/ in its environment variables.

    onstart   at most 4,000 bytes: unpacks remote/, finds the Python that has vLLM, becomes the supervisor
    env       FLEET_0, FLEET_1, …: remote/ without its comments, compressed, in base64; and the profile's own

Both stay below the strictest of the limits that the service documents (docs/reference/vast-contract.md 9).
Vast.ai runs the script at every start of the container, so it repeats what may be new and nothing that takes
long. Nothing is installed: a vLLM image has all that it needs. Each step ends after a while, and one that
cannot be done says so in the log, in words that begin with "fleet: giving up".

Listings and process lists show both, so neither holds a secret: of the master token only the SHA-256 is in
the script. Account variables such as HF_TOKEN come into the container's environment by the service itself.
"""

import ast
import base64
import functools
import hashlib
import lzma
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from engine.profile import Profile
from process.errors import ConfigError
from vast.client import ENV_LIMIT, ONSTART_LIMIT_BYTES

REMOTE = Path(__file__).resolve().parents[2] / "remote"

PORTS = "-p 3000:3000 -p 8000:8000"
"""Ports of auth_server and model server."""

CHUNK = 3_800
"""Characters of one variable: below the 4,096 that some tools take for a line."""

OWN_NAMES = re.compile(r"(FLEET|VAST|CONTAINER)_.*|VLLM_MODEL|VLLM_ARGS|HOME|PATH|PYTHONPATH")
"""Names of variables that are not a profile's to set."""

_TEMPLATE = """\
#!/bin/bash
# autoscaler-py, start_script.py
touch ~/.no_auto_tmux
set -u
umask 077
export HOME="${{HOME:-/root}}" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \\
  VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 VLLM_USE_RUST_FRONTEND=0
fleet="$HOME/fleet"
mkdir -p "$fleet" && cd "$fleet" || exit 1
key="${{FLEET_SSH_KEY:-}}" keys="$HOME/.ssh/authorized_keys"
if [ -n "$key" ] && ! grep -qsF "${{key/:/ }}" "$keys"; then
  mkdir -p "$HOME/.ssh" && printf '\\n%s\\n' "${{key/:/ }}" >> "$keys"
fi
printf %s {digest} > master.sha256
[ -n "${{VLLM_MODEL:-}}" ] || VLLM_MODEL={model}
[ -n "${{VLLM_ARGS+x}}" ] || VLLM_ARGS={args}
export VLLM_MODEL VLLM_ARGS FLEET_READY_URL={ready_url}
export PYTHONPATH="$fleet${{PYTHONPATH:+:$PYTHONPATH}}"
rm -rf remote
any= python=
give_up() {{
  echo "fleet: giving up: $1" | tee model.log
  [ ! -d remote ] || timeout 60 "$any" -m remote.boot give_up "$1"
  exit 1
}}
for p in $(type -aP python3) /venv/*/bin/python3 /opt/*/bin/python3 /opt/*/*/bin/python3 \\
  /opt/conda/envs/*/bin/python3 /usr/local/bin/python3 /usr/bin/python3 /*/.venv/bin/python3 \\
  "$HOME"/*/bin/python3 "$HOME"/.*/bin/python3; do
  [ -x "$p" ] || continue
  any="${{any:-$p}}"
  timeout 60 "$p" -c 'import sys
from importlib.util import find_spec as f
sys.exit(not all(getattr(f(n),"origin",0) for n in ("vllm","uvicorn")))' 2>/dev/null && python="$p" && break
done
[ -n "$any" ] || give_up "no python3 on this image"
mkdir remote && timeout 60 "$any" -c 'import base64,lzma,os
s="".join(os.environ["FLEET_%d"%n] for n in range({chunks}))
for f in lzma.decompress(base64.b64decode(s)).decode().split("\\0"):
  name,s=f.split("\\n",1);open("remote/"+name,"w").write(s)' || {{
  rm -rf remote
  give_up "its code did not arrive in its environment"
}}
unset {names}
[ -n "$python" ] || give_up "no python3 on this image has vLLM"
exec "$python" -m remote.supervise {name}
"""


@dataclass(frozen=True)
class StartScript:
    """What a create sends: the script (onstart), and the container's environment and ports (--env)."""

    onstart: str
    env: str


def packed() -> str:
    """Return remote/*.py without its words, compressed, in base64, which neither a shell nor JSON changes."""
    return _packed(REMOTE)


@functools.lru_cache(maxsize=1)
def _packed(remote: Path) -> str:
    files = "\0".join(f"{p.name}\n{stripped(p.read_text())}" for p in sorted(remote.glob("*.py")))
    return base64.b64encode(lzma.compress(files.encode(), preset=9 | lzma.PRESET_EXTREME)).decode()


def stripped(source: str) -> str:
    """Return the program without comments and docstrings, which are a third of what travels."""
    return ast.unparse(_WithoutTexts().visit(ast.parse(source)))


class _WithoutTexts(ast.NodeTransformer):
    """Puts `pass` in the place of texts that stand alone, which is what a docstring is."""

    def visit_Expr(self, node: ast.Expr) -> ast.stmt:
        """Return a statement, or `pass` for a text."""
        alone = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return ast.Pass() if alone else node


def _variable(profile: str, name: str, value: str) -> str:
    """Return the option that sets one variable of a profile; raise ConfigError for what would be changed."""
    where = f"profile {profile}: env: {name}"
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or OWN_NAMES.fullmatch(name):
        raise ConfigError(f"{where}: not a name that a profile can set")
    if re.search(r"[\"'\n\r]", value):
        raise ConfigError(f"{where}: its value has a quote or a line break, which vastai would change")
    return f'-e {name}="{value}"' if re.search(r"\s", value) else f"-e {name}={value}"


def render(
    profile: Profile, master_token: str, ready_url: str | None = None, ssh_public_key: str = ""
) -> StartScript:
    """Return what an instance with that profile and master token is created with.

    ready_url: the autoscaler's `POST /ready` as instances reach it. ssh_public_key: accepted by the instance,
    whatever keys the account has. VLLM_MODEL and VLLM_ARGS in the container's environment go before the
    profile's. Raises ConfigError if script or environment is too long.
    """
    try:
        shlex.split(profile.vllm_args)
    except ValueError as e:
        raise ConfigError(f"profile {profile.name}: vllm_args: {e}") from None
    code = packed()
    chunks = {f"FLEET_{n}": code[at : at + CHUNK] for n, at in enumerate(range(0, len(code), CHUNK))}
    onstart = _TEMPLATE.format(
        name=shlex.quote(profile.name),
        model=shlex.quote(profile.model),
        args=shlex.quote(profile.vllm_args),
        ready_url=shlex.quote(ready_url or ""),
        digest=hashlib.sha256(master_token.encode()).hexdigest(),
        chunks=len(chunks),
        names=" ".join(chunks),
    )
    options = [PORTS, *(_variable(profile.name, name, value) for name, value in profile.env.items())]
    if ssh_public_key:
        options.append(f"-e FLEET_SSH_KEY={':'.join(ssh_public_key.split()[:2])}")
    env = " ".join([*options, *(f"-e {name}={value}" for name, value in chunks.items())])
    size = len(onstart.encode())
    if size > ONSTART_LIMIT_BYTES:
        raise ConfigError(
            f"profile {profile.name}: its start script has {size} bytes, at most {ONSTART_LIMIT_BYTES}"
        )
    if len(env) > ENV_LIMIT:
        raise ConfigError(
            f"profile {profile.name}: its environment has {len(env)} characters, at most {ENV_LIMIT}"
        )
    return StartScript(onstart, env)
