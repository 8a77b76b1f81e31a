"""What `make structure` measures stays within its limits, and is found where it is and only there."""

import pytest

from tests.paths import ROOT
from tests.structure import (
    FORMAT_EXCEPTIONS,
    JSON_BY_HAND,
    LIMITS,
    PROMETHEUS_BY_HAND,
    Checkout,
    report,
)

MOST_SCRIPTS, MOST_PACKAGES, MOST_EXCEPTIONS = 8, 14, 10

# -- this checkout -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project() -> Checkout:
    """The project itself."""
    return Checkout(ROOT)


def test_a_stranger_can_count_the_scripts_and_the_packages(project: Checkout) -> None:
    assert len(project.scripts()) <= MOST_SCRIPTS
    assert len(project.packages()) <= MOST_PACKAGES


def test_no_unit_imports_itself_through_others(project: Checkout) -> None:
    assert project.cycles() == []


@pytest.mark.parametrize("kind", ["file", "class", "function"])
def test_nothing_is_longer_than_its_limit_without_a_listed_reason(project: Checkout, kind: str) -> None:
    assert project.over_limit(kind) == []


def test_there_are_few_exceptions_and_all_are_needed(project: Checkout) -> None:
    exceptions = project.exceptions()
    assert len(exceptions) <= MOST_EXCEPTIONS
    too_long = {name for kind in LIMITS for n, name in project.sizes(kind) if n > LIMITS[kind]}
    assert set(exceptions) <= too_long


def test_a_class_name_is_used_once(project: Checkout) -> None:
    assert project.class_names_used_twice() == []


def test_no_attribute_is_written_from_outside_the_class_that_owns_it(project: Checkout) -> None:
    """Except in remote/, which is inside start scripts that are in use."""
    assert [place for place in project.foreign_writes() if not place.startswith("remote/")] == []


def test_every_reference_leads_somewhere(project: Checkout) -> None:
    assert project.dangling_references() == []


def test_json_and_prometheus_text_are_written_by_libraries(project: Checkout) -> None:
    assert project.by_hand(JSON_BY_HAND) == []
    assert project.by_hand(PROMETHEUS_BY_HAND) == []


def test_every_file_that_is_listed_as_writing_a_format_by_hand_does(project: Checkout) -> None:
    found = project.strings_like(JSON_BY_HAND) + project.strings_like(PROMETHEUS_BY_HAND)
    assert set(project.exceptions(FORMAT_EXCEPTIONS)) <= {place.rpartition(":")[0] for place in found}


# -- the measures, on a small checkout ---------------------------------------------------------------------

FILES = {
    "README.md": "Three words [here](guide/gone.md) and [there](guide/page.md).\n",
    "guide/page.md": "`house/room.py`, `house/cellar.py`, ../shared/notes.md\n",
    "docs/reference/vast-contract.md": (
        "# The contract\n## 2. Commands\n(a) all\n### 2.2 Create\n1. one\n## Rows\n## 4. End\n| 1 | row |\n"
    ),
    "docs/architecture.md": "# Exceptions to the size limits\n\n- `house/room.py:Room.long`: why\n\n# Next\n",
    "front.py": 'import house.room\n\nCALL = ["python", "-m", "yard.shed"]\n',
    "house/__init__.py": "",
    "house/room.py": '''"""A room (vast-contract 2.2, 2.3 and 4.1)."""

import yard.shed
from yard.shed import Door

# Of servers 8 do; peers.md 1, docs/reference/vast-contract.md section 2.2.1, 2b, 2.4 (policy-study
# 3).


class Room:
    size = 1

    def __init__(self, door):
        """Say {"nothing": 1}."""
        self.door = door

    def long(self):
'''
    + "        self.size += 1\n" * 70
    + """
    def use(self, other):
        made = Room(None)
        made.size = 2
        again = Room(None)
        again = other
        again.size = 3
        self.door.handle, other.foreign = 4, 5
        yard.shed.size = 6
        del other.size
        return f'{{"size": {made.size}}}', '# TYPE size gauge'
""",
    "yard/__init__.py": "",
    "yard/shed.py": "from house import room\n\n\nclass Door:\n    handle: int\n\n\nclass Room:\n    pass\n",
    "tests_vllm/test_room.py": "class Door:\n    pass\n\n\nroom.size = 7\n",
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A small checkout with one of everything."""
    root = tmp_path_factory.mktemp("checkout")
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return Checkout(root)


def test_scripts_packages_and_arrows(checkout: Checkout) -> None:
    """What is run with `-m` is imported."""
    assert checkout.scripts() == ["front.py"]
    assert checkout.packages() == ["house", "tests_vllm", "yard"]
    assert checkout.arrows() == ["front -> house, yard", "house -> yard", "yard -> house"]
    assert checkout.cycles() == ["house <-> yard"]


def test_what_is_over_its_limit_is_found_unless_it_is_a_listed_exception(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checkout.sizes("function")[0] == (71, "house/room.py:Room.long")
    assert checkout.exceptions() == ["house/room.py:Room.long"]
    assert checkout.over_limit("function") == []
    monkeypatch.setattr(checkout, "exceptions", list)
    assert checkout.over_limit("function") == ["71 house/room.py:Room.long"]


def test_names_of_classes_count_outside_tests(checkout: Checkout) -> None:
    assert checkout.class_names_used_twice() == ["Room: house/room.py, yard/shed.py"]


def test_an_attribute_is_written_from_outside_unless_its_object_was_just_made(checkout: Checkout) -> None:
    """No class declares `foreign`; `yard.shed.size` is a module's."""
    written = [place.split(" ")[1] for place in checkout.foreign_writes()]
    assert written == ["again.size", "self.door.handle", "other.size"]


def test_references_that_lead_nowhere(checkout: Checkout) -> None:
    assert checkout.dangling_references() == [
        "README.md: guide/gone.md",
        "guide/page.md: house/cellar.py",
        "guide/page.md: ../shared/notes.md",
        "house/room.py: peers.md",
        "house/room.py: peers 1",
        "house/room.py: vast-contract 2b",
        "house/room.py: vast-contract 2.4",
        "house/room.py: policy-study 3",
        "house/room.py: vast-contract 2.3",
    ]


def test_formats_by_hand_are_found_outside_docstrings(checkout: Checkout) -> None:
    assert [place.split(":")[0] for place in checkout.by_hand(JSON_BY_HAND)] == ["house/room.py"]
    assert [place.split(":")[0] for place in checkout.by_hand(PROMETHEUS_BY_HAND)] == ["house/room.py"]


def test_a_listed_file_may_write_a_format_by_hand(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        checkout.pages, "docs/architecture.md", f"## {FORMAT_EXCEPTIONS}\n\n- `house/room.py`: why\n"
    )
    assert checkout.by_hand(JSON_BY_HAND) == []
    assert checkout.strings_like(JSON_BY_HAND) != []


def test_lines_of_code_are_neither_blank_nor_comments_nor_docstrings(checkout: Checkout) -> None:
    code, prose = checkout.code_lines(bench=False)
    lines = [line for name, text in FILES.items() if name.endswith(".py") for line in text.splitlines()]
    ours = [line for line in lines if line.strip() and not line.strip().startswith("#")]
    assert code + prose == len(ours) - len(
        [x for x in FILES["tests_vllm/test_room.py"].splitlines() if x.strip()]
    )
    assert prose == 2


def test_the_report_tells_all_of_it(checkout: Checkout) -> None:
    told = report(checkout)
    assert "README: 1 lines, 5 words" in told
    assert "foreign writes: 3\n    house/room.py:" in told
