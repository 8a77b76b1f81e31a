"""A page that needs no server: all is in it, it may load nothing, and what it shows cannot break out."""

import base64
import hashlib
import json
import re

from web.page_bundle import MODULES, self_contained

HOSTILE = {"name": "</script><script>alert(1)</script><!--", "number": 1.5, "none": float("inf")}
PAGE = self_contained("report.html", "report.js", "a <b> & c", HOSTILE)


def test_all_that_it_needs_is_in_it() -> None:
    imports = json.loads(re.findall(r'<script type="importmap">(.*?)</script>', PAGE, re.DOTALL)[0])[
        "imports"
    ]
    assert set(imports) == {f"page/{name}" for name in MODULES}
    script = re.findall(r'<script type="module">(.*?)</script>', PAGE, re.DOTALL)[0]
    modules = [base64.b64decode(url.partition(",")[2]).decode() for url in imports.values()]
    for module in (script, *modules):
        assert set(re.findall(r'^import .* from "(.*)";$', module, re.MULTILINE)) <= set(imports)
    markup = re.sub(r"<script.*?</script>|<style>.*?</style>", "", PAGE, flags=re.DOTALL)
    assert re.findall(r'(?:src|href)="(.*?)"', markup) == ["data:,"]


def test_it_allows_itself_only_its_own_scripts_and_styles() -> None:
    policy = re.findall(r'Content-Security-Policy" content="(.*?)"', PAGE)[0]
    parts = re.findall(r'<script type="(?:importmap|module)">(.*?)</script>', PAGE, re.DOTALL)
    parts += re.findall(r"<style>(.*?)</style>", PAGE, re.DOTALL)
    assert len(parts) == 3
    for part in parts:
        digest = base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert "http" not in policy


def test_what_it_shows_cannot_end_the_element_that_it_stands_in() -> None:
    said = re.findall(r'<script type="application/json" id="report">(.*?)</script>', PAGE, re.DOTALL)[0]
    assert json.loads(said) == HOSTILE | {"none": None}
    assert "<title>a &lt;b&gt; &amp; c</title>" in PAGE
