"""The start script that a new instance is created with: all of remote/ in one text of at most 16 KB.

Vast.ai runs it at every start of the container, so it repeats what may be new and nothing that takes long:
it unpacks remote/, installs Flask if it is not there (a vLLM image has none), and becomes the
supervisor. Of the master token only the SHA-256 is in it: a listing shows the script.
Comments, docstrings, types and long names are left out: they are most of the text.
"""

import ast
import base64
import functools
import hashlib
import json
import lzma
import re
import shlex
from pathlib import Path

import python_minifier
from python_minifier import RemoveAnnotationsOptions

from engine.profiles import Profile
from process.errors import ConfigError

REMOTE = Path(__file__).resolve().parents[2] / "remote"

NEEDS = ("flask==3.1.3", "a2wsgi==1.10.10", "cryptography==49.0.0")
"""Packages that the auth_server needs and vLLM's image may not have; the versions of requirements.txt."""

LIMIT_BYTES = 16_384
"""Bytes of the longest script; the service refuses or cuts longer ones (vast-contract 2.2)."""

_TEMPLATE = """\
#!/bin/bash
# autoscaler-py: made by start_script.py.
set -u
umask 077
export HOME="${{HOME:-/root}}" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \\
  VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
fleet="$HOME/fleet"
mkdir -p "$fleet" && cd "$fleet" || exit 1
printf %s {digest} > master.sha256
[ -n "${{VLLM_MODEL:-}}" ] || VLLM_MODEL={model}
[ -n "${{VLLM_ARGS+given}}" ] || VLLM_ARGS={args}
export VLLM_MODEL VLLM_ARGS FLEET_READY_URL={ready_url}
rm -rf remote
mkdir remote && python3 -c 'import base64,json,lzma
for name, source in json.loads(lzma.decompress(base64.b85decode(input()))).items():
    open("remote/" + name, "w").write(source)' <<'END'
{packed}
END
export PYTHONPATH="$fleet${{PYTHONPATH:+:$PYTHONPATH}}"
until PYTHONPATH="$PYTHONPATH:$fleet/site" python3 -c 'import flask, a2wsgi, cryptography'; do
  python3 -m pip install --quiet --upgrade --target "$fleet/site" {needs} ||
    uv pip install --quiet --upgrade --target "$fleet/site" {needs} || sleep 5
done
exec python3 -m remote.supervise {name}
"""


@functools.lru_cache(maxsize=1)
def _packed() -> str:
    """Return remote/*.py, minified and compressed, in characters that a here-document need not quote."""
    sources = {path.name: minified(path.read_text()) for path in sorted(REMOTE.glob("*.py"))}
    # Most of it is text of no alignment: pb 0. The old format has 48 bytes less around it than .xz.
    filters = [{"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "pb": 0}]
    packed = lzma.compress(json.dumps(sources).encode(), lzma.FORMAT_ALONE, filters=filters)
    return base64.b85encode(packed).decode()


def minified(source: str) -> str:
    """Return the program without comments, docstrings and types; names that only it uses become short."""
    tree = ast.parse(_minified(source))
    for node in reversed(tree.body):  # what was there for the types only
        used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        match node:
            case ast.ImportFrom(names=names):
                node.names = [a for a in names if (a.asname or a.name) in used]
                unused = not node.names
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Subscript()):  # a name for a type
                unused = name not in used
            case _:
                unused = False
        if unused:
            tree.body.remove(node)
    return _minified(ast.unparse(tree))


def _minified(source: str) -> str:
    types = RemoveAnnotationsOptions(
        remove_variable_annotations=True,
        remove_return_annotations=True,
        remove_argument_annotations=True,
        remove_class_attribute_annotations=False,  # a dataclass is made of them
    )
    small: str = python_minifier.minify(
        source,
        remove_literal_statements=True,
        remove_annotations=types,
        hoist_literals=False,
        rename_globals=True,
        preserve_globals=re.findall(r"\b[^\W_]\w*", source),  # all but those of the file alone: _name
    )
    return small


def render(profile: Profile, master_token: str, ready_url: str | None = None) -> str:
    """Return the script of an instance with that profile and master token; raise ConfigError if too long.

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
