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

NEEDS = ("flask==3.1.3", "waitress==3.0.2")
"""What the auth_server needs and vLLM's image has not; the versions of requirements.txt."""

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
rm -rf remote
python3 -c 'import base64, io, lzma, sys, tarfile
packed = lzma.decompress(base64.b85decode(sys.stdin.read().strip()))
tarfile.open(fileobj=io.BytesIO(packed)).extractall()' <<'END'
{packed}
END
export PYTHONPATH="$fleet${{PYTHONPATH:+:$PYTHONPATH}}"
until PYTHONPATH="$PYTHONPATH:$fleet/site" python3 -c 'import flask, waitress'; do
  python3 -m pip install --quiet --upgrade --target "$fleet/site" {needs} ||
    uv pip install --quiet --upgrade --target "$fleet/site" {needs} || sleep 5
done
exec python3 -m remote.supervise {name} {model} {args}
"""


def without_words(source: str) -> str:
    """The same program without comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            # A text that is a statement does nothing: a docstring, also one below a constant.
            kept = [n for n in body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
            node.body = kept or ([ast.Pass()] if not isinstance(node, ast.Module) else [])  # type: ignore[attr-defined]
    return ast.unparse(tree) + "\n"


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


def render(profile: Profile, master_token: str) -> str:
    """The script for an instance with that profile and master token; raises ConfigError if it is too long."""
    try:
        args = shlex.split(profile.vllm_args)
    except ValueError as e:
        raise ConfigError(f"profile {profile.name}: vllm_args: {e}") from None
    script = _TEMPLATE.format(
        name=shlex.quote(profile.name),
        model=shlex.quote(profile.model),
        args=shlex.join(args),
        digest=hashlib.sha256(master_token.encode()).hexdigest(),
        needs=" ".join(NEEDS),
        packed=_packed(),
    )
    size = len(script.encode())
    if size > LIMIT_BYTES:
        raise ConfigError(f"profile {profile.name}: its start script has {size} bytes, at most {LIMIT_BYTES}")
    return script
