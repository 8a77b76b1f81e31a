"""The start script that a new instance is created with: all of remote/ in one text of at most 16 KB.

Vast.ai runs it at every start of the container, so it does everything again that may be new and nothing that
is long: it unpacks remote/, looks whether Flask is there (a vLLM image has none), and becomes the
supervisor. Of the master token only the SHA-256 is in it, so that a listing, which shows it, gives nobody
tokens. Comments and docstrings stay at home: they are two thirds of what there would be to send.
"""

import ast
import base64
import functools
import hashlib
import io
import lzma
import shlex
import tarfile
from pathlib import Path

from errors import ConfigError
from profiles import Profile

REMOTE = Path(__file__).resolve().parent / "remote"

NEEDS = ("flask==3.1.3", "a2wsgi==1.10.10", "cryptography==49.0.0")
"""What the auth_server needs and vLLM's image may not have; the versions of requirements.txt."""

LIMIT_BYTES = 16_384
"""The service refuses or cuts longer scripts (vast-contract 2.2)."""

_TEMPLATE = """\
#!/bin/bash
# autoscaler-py: made by start_script.py.
set -u
umask 077
export HOME="${{HOME:-/root}}" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
export VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
fleet="$HOME/fleet"
mkdir -p "$fleet" && cd "$fleet" || exit 1
printf %s {digest} > master.sha256
[ -n "${{VLLM_MODEL:-}}" ] || VLLM_MODEL={model}
[ -n "${{VLLM_ARGS+given}}" ] || VLLM_ARGS={args}
export VLLM_MODEL VLLM_ARGS FLEET_READY_URL={ready_url}
rm -rf remote
python3 -c 'import base64, io, lzma, sys, tarfile
packed = lzma.decompress(base64.b85decode(sys.stdin.read().strip()))
tarfile.open(fileobj=io.BytesIO(packed)).extractall()' <<'END'
{packed}
END
export PYTHONPATH="$fleet${{PYTHONPATH:+:$PYTHONPATH}}"
until PYTHONPATH="$PYTHONPATH:$fleet/site" python3 -c 'import flask, a2wsgi, cryptography'; do
  python3 -m pip install --quiet --upgrade --target "$fleet/site" {needs} ||
    uv pip install --quiet --upgrade --target "$fleet/site" {needs} || sleep 5
done
exec python3 -m remote.supervise {name}
"""


def without_words(source: str) -> str:
    """The same program without comments, docstrings, and the types of functions and local variables."""
    tree = _Untyped().visit(ast.parse(source))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            # A text that is a statement does nothing: a docstring, also one below a constant.
            kept = [n for n in body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
            node.body = kept or ([ast.Pass()] if not isinstance(node, ast.Module) else [])  # type: ignore[attr-defined]
    return ast.unparse(tree) + "\n"


class _Untyped(ast.NodeTransformer):
    """Takes the types off; those of a class's fields stay, a dataclass is made of them."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        node.body = [_plain(n) for n in node.body]
        return self.generic_visit(node)  # type: ignore[return-value]

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node


def _plain(node: ast.stmt) -> ast.stmt:
    """An assignment without its type, where that is all there is to take off."""
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        return ast.copy_location(ast.Assign([node.target], node.value), node)
    return node


@functools.lru_cache(maxsize=1)
def _packed() -> str:
    """remote/*.py as a compressed archive, in characters that need no quoting inside a here-document."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(REMOTE.glob("*.py")):
            entry = tarfile.TarInfo(f"remote/{path.name}")
            raw = without_words(path.read_text()).encode()
            entry.size, entry.mode = len(raw), 0o600
            tar.addfile(entry, io.BytesIO(raw))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    return base64.b85encode(lzma.compress(archive.getvalue(), filters=filters)).decode()


def render(profile: Profile, master_token: str, ready_url: str | None = None) -> str:
    """The script for an instance with that profile and master token; raises ConfigError if it is too long.

    ready_url: the autoscaler's `POST /ready` as instances reach it. VLLM_MODEL and VLLM_ARGS in the
    container's environment go before the profile's.
    """
    try:
        shlex.split(profile.vllm_args)
    except ValueError as e:
        raise ConfigError(f"profile {profile.name}: vllm_args: {e}") from None
    script = _TEMPLATE.format(
        name=shlex.quote(profile.name),
        model=shlex.quote(profile.model),
        args=shlex.quote(profile.vllm_args),
        ready_url=shlex.quote(ready_url or ""),
        digest=hashlib.sha256(master_token.encode()).hexdigest(),
        needs=" ".join(NEEDS),
        packed=_packed(),
    )
    size = len(script.encode())
    if size > LIMIT_BYTES:
        raise ConfigError(f"profile {profile.name}: its start script has {size} bytes, at most {LIMIT_BYTES}")
    return script
