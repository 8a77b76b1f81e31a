"""Measure the structure of a checkout: `python -m tests.structure [CHECKOUT]`, `make structure` for this one.

Every measure is a method that returns what it found, so that tests/system/test_structure.py holds the same
figures to their limits. "Outside tests" is without tests/, tests_vllm/ and bench/tests/. The rules, where a
name alone does not say them:

    function       its lines without decorators, with its docstring and the functions inside it
    code lines     neither blank nor comment nor docstring; docstrings are counted beside them
    foreign write  an attribute written from outside the class that owns it: see tests/attribute_writes.py
    dangling       a link or path in Markdown, docstrings or comments that is no file of the checkout, or a
                   section of a page of docs/reference/ that the page does not have: "vast-contract 2.7",
                   "docs/reference/peers.md 2, 18b"; 6.1 is also item or row 1 of section 6
    by hand        a string outside tests and docstrings with `{"` (JSON), or a sample or TYPE (Prometheus),
                   in a file that docs/architecture.md does not list with a reason
"""

import ast
import io
import re
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path

from tests.attribute_writes import declared, writes_of_others
from tests.import_graph import arrows, modules_of
from tests.paths import ROOT

LIMITS = {"file": 500, "class": 300, "function": 60}
"""Most lines of each, outside tests."""

SIZE_EXCEPTIONS, FORMAT_EXCEPTIONS = "Exceptions to the size limits", "Formats written by hand"
"""Sections of docs/architecture.md with items such as "- `FILE:Class.method`: reason" and "- `FILE`: …"."""

CITE_OTHERS = {"bench/", "docs/reference/"}
"""What cites files of other projects: of those only paths into a directory of ours are looked at."""

OF_OTHERS = {"serving_chat.py", "serving_completion.py", "cli/main.py"}
"""Files of vLLM and vastai that are cited elsewhere."""

CITED = re.compile(
    r"\b((?:vast-contract|dispatch-study|policy-study|vllm-on-cpu|design)\b(?:\.md)?"
    r"|(?:lineage|peers|servers|timing)\.md)(?: section)?\s(\d[\w.]*(?:(?:, | and )\d[\w.]*)*)"
)
"""A page of docs/reference/ and sections of it; names that are English words are cited as files only."""

SECTION = re.compile(r"^(?:#+ (\d+\w?(?:\.\d+)*)\.? |(\d+)\. |\| (\d+) \||\(([a-z])\) )", re.MULTILINE)
"""The number of a heading, of an item or row of a table below one, or the letter of a paragraph."""

PATH = re.compile(r"(?<![\w./*<>{}-])(?:\.\./)*(?:[\w-]+/)*[\w-]+\.(?:md|py)\b(?![\w*]|\.\w)")
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(?:#[^)]*)?\)")

JSON_BY_HAND = re.compile(r'\{\s*\\?"')
PROMETHEUS_BY_HAND = re.compile(r'# (TYPE|HELP) |^\w+\{\w+="', re.MULTILINE)

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.ClassDef | Function
Definitions = Iterator[tuple[str, Definition]]
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}


class Source:
    """One Python file of a checkout."""

    def __init__(self, path: Path, root: Path) -> None:
        """Parse the file."""
        self.name, self.text = str(path.relative_to(root)), path.read_text()
        self.tree = ast.parse(self.text)
        self.tokens = list(tokenize.generate_tokens(io.StringIO(self.text).readline))
        self.is_test = self.name.startswith(("tests/", "tests_vllm/", "bench/tests/"))
        self.is_bench = self.name.startswith("bench/")

    @cached_property
    def docstrings(self) -> list[ast.Constant]:
        """The strings that stand alone as statements."""
        alone = (n.value for n in ast.walk(self.tree) if isinstance(n, ast.Expr))
        return [v for v in alone if isinstance(v, ast.Constant) and isinstance(v.value, str)]

    def line_counts(self) -> tuple[int, int]:
        """Return (lines of code, lines of docstrings); blank lines count as neither."""
        filled = {n for n, line in enumerate(self.text.split("\n"), 1) if line.strip()}
        code = {n for t in self.tokens if t.type not in NO_CODE for n in range(t.start[0], t.end[0] + 1)}
        prose = {n for d in self.docstrings for n in range(d.lineno, (d.end_lineno or 0) + 1)}
        return len(code & filled - prose), len(prose & filled)

    def definitions(
        self, within: ast.AST | None = None, prefix: str = ""
    ) -> Iterator[tuple[str, Definition]]:
        """Yield every class and function with its dotted name inside the file."""
        for child in ast.iter_child_nodes(within or self.tree):
            if isinstance(child, Definition):
                yield prefix + child.name, child
                yield from self.definitions(child, f"{prefix}{child.name}.")
            else:
                yield from self.definitions(child, prefix)


class Checkout:
    """A checkout and what can be measured of it."""

    def __init__(self, root: Path) -> None:
        """Read every Python and Markdown file."""
        self.root, self.modules = root, modules_of(root)
        self.all_sources = [Source(path, root) for path in self.modules.values()]
        self.sources = [s for s in self.all_sources if not s.is_test]
        found = (p.relative_to(root) for p in sorted(root.rglob("*.*")) if p.is_file())
        kept = (p for p in found if p.parts[0] != "build")
        self.files = {str(p) for p in kept if not any(part.startswith(".") for part in p.parts)}
        self.pages = {name: (root / name).read_text() for name in self.files if name.endswith(".md")}

    def scripts(self) -> list[str]:
        """Return the Python files at the top."""
        return sorted(s.name for s in self.all_sources if "/" not in s.name)

    def packages(self) -> list[str]:
        """Return the directories at the top that hold Python files."""
        return sorted({s.name.split("/")[0] for s in self.all_sources if "/" in s.name})

    def sizes(self, kind: str) -> list[tuple[int, str]]:
        """Return (lines, `FILE` or `FILE:name`) of every file, class or function, the longest first."""
        if kind == "file":
            found = [(len(s.text.splitlines()), s.name) for s in self.sources]
        else:
            every = ((f"{s.name}:{name}", d) for s in self.sources for name, d in s.definitions())
            of_kind = ((name, d) for name, d in every if isinstance(d, ast.ClassDef) == (kind == "class"))
            found = [((d.end_lineno or 0) - d.lineno + 1, name) for name, d in of_kind]
        return sorted(found, key=lambda size: (-size[0], size[1]))

    def exceptions(self, title: str = SIZE_EXCEPTIONS) -> list[str]:
        """Return what docs/architecture.md lists in that section."""
        page = self.pages.get("docs/architecture.md", "")
        section = re.search(rf"^#+ {title}\n(.*?)(?=^#|\Z)", page, re.MULTILINE | re.DOTALL)
        return re.findall(r"^- `([^`]+)`", section[1], re.MULTILINE) if section else []

    def over_limit(self, kind: str) -> list[str]:
        """Return what is longer than its limit and no exception."""
        allowed = set(self.exceptions())
        return [f"{n} {name}" for n, name in self.sizes(kind) if n > LIMITS[kind] and name not in allowed]

    def arrows(self) -> list[str]:
        """Return which unit imports which, without the arrows of bench and tests."""
        graph = {u: v for u, v in arrows(self.modules).items() if u not in ("bench", "tests", "tests_vllm")}
        return [f"{unit} -> {', '.join(sorted(theirs))}" for unit, theirs in sorted(graph.items()) if theirs]

    def cycles(self) -> list[str]:
        """Return the sets of units that import each other, directly or through others."""
        reach = arrows(self.modules)
        for middle in reach:
            for theirs in reach.values():
                theirs |= reach[middle] if middle in theirs else set()
        return sorted({" <-> ".join(sorted(v for v in reach[u] if u in reach[v])) for u in reach} - {""})

    def class_names_used_twice(self) -> list[str]:
        """Return the names that two classes outside tests and bench have, with their files."""
        places = defaultdict(list)
        for s in self.sources:
            for name, node in s.definitions():
                if isinstance(node, ast.ClassDef) and not s.is_bench:
                    places[name.split(".")[-1]].append(s.name)
        return [f"{name}: {', '.join(files)}" for name, files in sorted(places.items()) if len(files) > 1]

    def foreign_writes(self) -> list[str]:
        """Return the places where an attribute is written from outside the class that owns it."""
        owned = {attr for s in self.sources for attr in declared(s.tree)}
        written = ((s.name, node) for s in self.sources for node in writes_of_others(s.tree, self.modules))
        return [f"{name}:{n.lineno} {ast.unparse(n)}" for name, n in written if n.attr in owned]

    def dangling_references(self) -> list[str]:
        """Return the links, paths and cited pages that are no file of the checkout."""
        ends = {
            "/".join(f.split("/")[-n:]) for f in self.files for n in range(1, f.count("/") + 2)
        } | OF_OTHERS
        texts = dict(self.pages)
        for s in self.all_sources:
            comments = [t.string.lstrip("# ") for t in s.tokens if t.type == tokenize.COMMENT]
            texts[s.name] = "\n".join([*comments, *(str(d.value) for d in s.docstrings)])
        found = Counter[str]()
        for name, text in sorted(texts.items()):
            dangling = [ref for ref in PATH.findall(text) if ref not in ends]
            if name.startswith(tuple(CITE_OTHERS)):
                ours = (f"{top}/" for top in (*self.packages(), "docs"))
                dangling = [ref for ref in dangling if ref.startswith(tuple(ours))]
            dangling += self._missing_sections(text)
            links = LINK.findall(text) if name in self.pages else []
            there = (self.root / name).parent
            dangling += [ref for ref in links if ref not in dangling and not (there / ref).exists()]
            found.update(f"{name}: {ref}" for ref in dangling)
        return [place + (f" ({n} times)" if n > 1 else "") for place, n in found.items()]

    def _missing_sections(self, text: str) -> Iterator[str]:
        """Yield the sections that a text cites of pages of docs/reference/ and that are not there."""
        for page, sections in CITED.findall(text):
            name = page.removesuffix(".md")
            there = sections_of(self.pages.get(f"docs/reference/{name}.md", ""))
            cited = (section.rstrip(".") for section in re.split(", | and ", sections))
            yield from (f"{name} {section}" for section in cited if section not in there)

    def strings_like(self, pattern: re.Pattern[str]) -> list[str]:
        """Return the places of strings outside tests and docstrings that match."""
        places: set[tuple[str, int]] = set()
        for s in self.sources:
            prose = set(map(id, s.docstrings))
            for n in ast.walk(s.tree):
                if isinstance(n, ast.Constant) and isinstance(n.value, str | bytes) and id(n) not in prose:
                    text = n.value if isinstance(n.value, str) else n.value.decode(errors="replace")
                    places |= {(s.name, n.lineno)} if pattern.search(text) else set()
        return [f"{name}:{line}" for name, line in sorted(places)]

    def by_hand(self, pattern: re.Pattern[str]) -> list[str]:
        """Return the places of `strings_like` in files that are not listed as writing a format by hand."""
        listed = self.exceptions(FORMAT_EXCEPTIONS)
        return [place for place in self.strings_like(pattern) if place.rpartition(":")[0] not in listed]

    def code_lines(self, *, bench: bool) -> tuple[int, int]:
        """Return (lines of code, lines of docstrings) outside tests, of bench or of all but bench."""
        counts = [s.line_counts() for s in self.sources if s.is_bench == bench]
        return sum(code for code, _ in counts), sum(prose for _, prose in counts)


def sections_of(page: str) -> set[str]:
    """Return the numbers by which the sections, items and rows of a page are cited."""
    found, above = set(), ""
    for heading, item, row, letter in SECTION.findall(page):
        above = heading or above
        number = f"{above}{letter}" if letter else f"{above}.{item or row}".lstrip(".")
        found.add(heading or number)
    return found


def report(checkout: Checkout) -> str:
    """Return every figure as text, with the places behind it."""
    lines = []
    for name, bench in (("without bench", False), ("of bench", True)):
        code, prose = checkout.code_lines(bench=bench)
        lines.append(f"code lines {name}: {code}, docstrings {prose}, together {code + prose}")
    readme = checkout.pages.get("README.md", "")
    lines.append(f"README: {len(readme.splitlines())} lines, {len(readme.split())} words")
    for kind in LIMITS:
        lines += [f"longest of each {kind}:", *(f"    {n:5} {name}" for n, name in checkout.sizes(kind)[:10])]
    measures: dict[str, Callable[[], list[str]]] = {
        "scripts at the top": checkout.scripts,
        "packages": checkout.packages,
        **{f"{kind} over {n} lines": partial(checkout.over_limit, kind) for kind, n in LIMITS.items()},
        "listed exceptions to these limits": checkout.exceptions,
        "units that import others": checkout.arrows,
        "cycles between units": checkout.cycles,
        "class names used twice": checkout.class_names_used_twice,
        "foreign writes": checkout.foreign_writes,
        "dangling references": checkout.dangling_references,
        "JSON by hand": partial(checkout.by_hand, JSON_BY_HAND),
        "Prometheus text by hand": partial(checkout.by_hand, PROMETHEUS_BY_HAND),
        "listed exceptions to these formats": partial(checkout.exceptions, FORMAT_EXCEPTIONS),
    }
    for title, find in measures.items():
        found = find()
        lines += [f"{title}: {len(found)}", *(f"    {one}" for one in found)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report(Checkout(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT)))
