"""The start script that a new instance is created with: all of remote/ in one text of at most 16 KB.

Vast.ai runs it at every start of the container, so it repeats what may be new and nothing that takes long:
it unpacks remote/ and becomes the supervisor. Nothing is installed: a vLLM image has all that it needs.
Of the master token only the SHA-256 is in it: a listing shows the script.
Comments, docstrings, types and long names are left out: they are most of the text.
"""

import ast
import base64
import functools
import hashlib
import itertools
import lzma
import re
import shlex
import string
from pathlib import Path

import python_minifier
from python_minifier import RemoveAnnotationsOptions

from engine.profiles import Profile
from process.errors import ConfigError

REMOTE = Path(__file__).resolve().parents[2] / "remote"

LIMIT_BYTES = 16_384
"""Bytes of the longest script; the service refuses or cuts longer ones (vast-contract 2.2)."""

_TEMPLATE = """\
#!/bin/bash
# autoscaler-py, start_script.py
set -u
umask 077
export HOME="${{HOME:-/root}}" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \\
  VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
fleet="$HOME/fleet"
mkdir -p "$fleet" && cd "$fleet" || exit 1
printf %s {digest} > master.sha256
[ -n "${{VLLM_MODEL:-}}" ] || VLLM_MODEL={model}
[ -n "${{VLLM_ARGS+x}}" ] || VLLM_ARGS={args}
export VLLM_MODEL VLLM_ARGS FLEET_READY_URL={ready_url}
rm -rf remote
mkdir remote && python3 -c 'import base64,lzma
for f in lzma.decompress(base64.b85decode(input())).decode().split("\\0"):
  name,s=f.split("\\n",1);open("remote/"+name,"w").write(s)' <<'END'
{packed}
END
export PYTHONPATH="$fleet${{PYTHONPATH:+:$PYTHONPATH}}"
exec python3 -m remote.supervise {name}
"""


@functools.lru_cache(maxsize=1)
def _packed() -> str:
    """Return remote/*.py, minified and compressed, in characters that a here-document need not quote."""
    files = "\0".join(f"{p.name}\n{minified(p.read_text())}" for p in sorted(REMOTE.glob("*.py")))
    # Most of it is text of no alignment: pb 0. The old format has 48 bytes less around it than .xz.
    filters = [{"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "pb": 0, "nice_len": 80}]
    packed = lzma.compress(files.encode(), lzma.FORMAT_ALONE, filters=filters)
    return base64.b85encode(packed).decode()


def minified(source: str) -> str:
    """Return the program without comments, docstrings and types, with short names where only it uses them."""
    # With long names, since a short one may be that of something else that is used.
    tree = ast.parse(_minified(ast.unparse(_ShortArguments().visit(ast.parse(source))), rename=False))
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
    short = ast.fix_missing_locations(_ShortAttributes(source).visit(tree))
    return _minified(ast.unparse(short))


_KEYWORDS = re.compile(r"\b(\w+)=")
"""Names of arguments in calls: those of a call keep theirs. The words before = elsewhere do no harm."""


class _ShortArguments(ast.NodeTransformer):
    """Makes arguments positional, which may then be renamed, of functions whose arguments no call names."""

    def __init__(self) -> None:
        """Look for names of arguments in all of remote/; `app` is what Starlette calls a middleware's."""
        self._named = {"app"}.union(*(_KEYWORDS.findall(path.read_text()) for path in REMOTE.glob("*.py")))

    def visit_arguments(self, node: ast.arguments) -> ast.arguments:
        """Return the arguments of a function, made positional so that the minifier may shorten their names.

        They stay as they are if any call in remote/ gives one of them by its name.
        """
        if not self._named.isdisjoint(argument.arg for argument in node.args):
            return node
        values = {name: value for name, value in ast.iter_fields(node) if name not in ("posonlyargs", "args")}
        return ast.arguments(posonlyargs=node.posonlyargs + node.args, args=[], **values)


class _ShortAttributes(ast.NodeTransformer):
    """Gives attributes and methods that only their class may use names of one letter or two."""

    def __init__(self, source: str) -> None:
        """Collect the private names that the source uses of `self`: other such names may be a library's."""
        of_self = re.findall(r"\bself\.(_[^_\W]\w+)", source)
        letters = string.ascii_letters
        names = itertools.chain(letters, map("".join, itertools.product(letters, repeat=2)))
        self._short = {name: f"_{next(names)}" for name in sorted(set(of_self))}

    def visit_Attribute(self, node: ast.Attribute) -> ast.Attribute:
        """Return an attribute under its short name, if it has one."""
        return ast.Attribute(self.visit(node.value), self._short.get(node.attr, node.attr), node.ctx)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        """Return a class whose methods are under their short names, if they have some."""
        inside = dict(ast.iter_fields(self.generic_visit(node)))
        return ast.ClassDef(**(inside | {"body": [self._renamed(one) for one in inside["body"]]}))

    def _renamed(self, node: ast.stmt) -> ast.stmt:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return node
        return type(node)(**(dict(ast.iter_fields(node)) | {"name": self._short.get(node.name, node.name)}))


def _minified(source: str, *, rename: bool = True) -> str:
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
        convert_posargs_to_args=rename,  # arguments that are not, are not renamed
        rename_locals=rename,
        rename_globals=rename,
        preserve_globals=re.findall(r"\b[^\W_]\w*", source),  # all but those of the file alone: _name
    )
    return small


def render(profile: Profile, master_token: str, ready_url: str | None = None) -> str:
    """Return the start script of an instance with that profile and master token.

    ready_url: the autoscaler's `POST /ready` as instances reach it. VLLM_MODEL and VLLM_ARGS in the
    container's environment go before the profile's. Raises ConfigError if the script is too long.
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
        packed=_packed(),
    )
    size = len(script.encode())
    if size > LIMIT_BYTES:
        raise ConfigError(f"profile {profile.name}: its start script has {size} bytes, at most {LIMIT_BYTES}")
    return script
