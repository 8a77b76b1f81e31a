"""What the typed calls send, what they take for success, and what they raise."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from process.errors import CloudError, ConfigError
from tests.vast_answers import (
    CRASH,
    MANY,
    PUBLIC_KEY,
    ROW,
    ScriptedCli,
    answered,
    create,
    instance,
    listing,
    offer,
    refused,
    refused_plainly,
    said,
)
from vast.client import Vast, check_env
from vast.errors import (
    ApiError,
    CloudAuthError,
    CloudTimeout,
    NoSuchInstance,
    OfferGone,
    ProtocolError,
    RateLimited,
    TransportError,
)
from vast.rows import Offer


@pytest.fixture
def fake() -> ScriptedCli:
    return ScriptedCli()


NO_CONNECTION = CRASH + "requests.exceptions.ConnectionError: Max retries exceeded: Connection refused\n"


@pytest.mark.parametrize(
    ("run", "error", "words"),
    [
        (refused(401, "Invalid user key"), CloudAuthError, "401 'Invalid user key'"),
        (refused(404, "Invalid user key"), CloudAuthError, "404"),
        (refused(404, "Session expired. Please log in again."), CloudAuthError, "404"),
        (refused(429, "(no detail message supplied)"), RateLimited, "429"),
        (refused(429, None), RateLimited, "429 'None'"),
        (refused(410, "/api/v0/instances/ is deprecated."), ApiError, "410"),
        (refused(500, "oops"), ApiError, "500 'oops'"),
        (refused(504, "(no detail message supplied)"), ApiError, "504"),
        (refused(0, "Expecting value: line 1 column 1 (char 0)"), ProtocolError, "JSON from the service"),
        (("[]\n", refused(500, "late")[1], 0), ApiError, "500 'late'"),
        (("", "Warning: slow\n" + refused(500, "last")[1], 0), ApiError, "500 'last'"),
        (("", NO_CONNECTION, 1), TransportError, "Connection refused"),
        (("", CRASH + "AttributeError: 'list' object has no attribute 'get'\n", 1), ProtocolError, "got 1 ("),
        (
            ("", "usage: vastai\nvastai: error: unrecognized arguments: --limit\n", 2),
            ProtocolError,
            "got 2 (",
        ),
        (("", "", 1), ProtocolError, "nothing on stderr"),
        (("", "", 0), ProtocolError, "expected JSON on stdout, got nothing"),
        (said("invalid return Content-Type: text/html"), ProtocolError, "Content-Type: text/html"),
        (('{"instances": [{"onstart": "echo master-to', "", 0), ProtocolError, "broken JSON"),
    ],
)
def test_a_run_that_failed_raises_whatever_its_exit_status(
    fake: ScriptedCli, run: tuple[str, str, int], error: type[CloudError], words: str
) -> None:
    with pytest.raises(error) as raised:
        fake.plays(run).list_instances()
    assert type(raised.value) is error
    assert str(raised.value).startswith("vastai show instances: expected ")
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({}, "expected a list as instances of the listing, got no such field"),
        ([], "expected an object for each listing, got a list of 0"),
        (None, "got null"),
        (listing([], success=False, msg="database is away"), "success: false 'database is away'"),
        (listing([], instances=None), "expected a list as instances of the listing, got null"),
        (listing([instance()], total=3), "the 3 instances that it claims, got 1"),
        (listing([instance(), instance()], total=2), "the 2 instances that it claims, got 1"),
        (listing([instance()], instances_found=2), "the 2 rows that the page claims, got 1"),
        (listing([], total_instances=None), "a whole number as total_instances"),
        (listing([instance(id="x")]), "a whole number as id of the instance, got a str"),
        (listing([7]), "expected an object for each instance, got a int"),
    ],
)
def test_a_listing_that_is_not_whole_raises_and_is_never_empty(
    fake: ScriptedCli, answer: object, words: str
) -> None:
    with pytest.raises(ProtocolError) as raised:
        fake.plays(answered(answer)).list_instances()
    assert words in str(raised.value)
    assert "master-token" not in str(raised.value)


CHANGES: dict[str, tuple[Callable[[Vast], None], str, list[str]]] = {
    "start": (lambda v: v.start(5), "starting instance 5.", ["start", "instance", "5", "--retry=1", "--raw"]),
    "stop": (lambda v: v.stop(5), "stopping instance 5.", ["stop", "instance", "5", "--retry=1", "--raw"]),
    "label": (
        lambda v: v.label(5, "fleet/b"),
        "label for 5 set to fleet/b.",
        ["label", "instance", "5", "fleet/b", "--retry=1", "--raw"],
    ),
    "destroy": (
        lambda v: v.destroy(5),
        "destroying instance 5.",
        ["destroy", "instance", "5", "-y", "--retry=1"],
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_done_when_its_own_sentence_says_so(fake: ScriptedCli, name: str) -> None:
    call, sentence, argv = CHANGES[name]
    call(fake.plays(said(sentence)))
    assert fake.argvs == [argv]


@pytest.mark.parametrize(
    ("printed", "words"),
    [
        ("", "got nothing"),
        ("Aborted.\n", "got 'Aborted.'"),
        ("No GPU is free on that machine.\n", "got 'No GPU is free"),
        ("starting instance 55.\nstopping instance 55.\ndestroying instance 55.\n", "got 'starting"),
    ],
)
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_that_prints_anything_else_is_not_done_although_it_exits_0(
    fake: ScriptedCli, name: str, printed: str, words: str
) -> None:
    call, sentence, _ = CHANGES[name]
    with pytest.raises(ProtocolError) as raised:
        call(fake.plays((printed, "", 0)))
    assert repr(sentence) in str(raised.value)
    assert words in str(raised.value)


@pytest.mark.parametrize("name", ["start", "stop", "label"])
def test_a_change_to_an_instance_that_is_not_there_says_so(fake: ScriptedCli, name: str) -> None:
    with pytest.raises(NoSuchInstance):
        CHANGES[name][0](fake.plays(refused(404, "no_such_instance")))


def test_destroying_what_is_gone_is_fine(fake: ScriptedCli) -> None:
    fake.plays(refused_plainly(404, "Instance not found")).destroy(5)


@pytest.mark.parametrize(
    ("run", "error"),
    [
        (refused_plainly(404, "(no detail message supplied)"), ApiError),  # a proxy's page, not the service
        (refused_plainly(404, "Invalid user key"), CloudAuthError),
        (refused_plainly(500, "oops"), ApiError),
        (refused_plainly(429, "None"), RateLimited),
        (("", f"Failed with error 401: None\n{CRASH}TypeError: 'in <string>'\n", 1), CloudAuthError),
        (
            ("", "Failed with error 401: no\n  Sent key from $VAST_API_KEY (ends in ...6789).\n", 0),
            CloudAuthError,
        ),
        (("", "Expecting value: line 1 column 1 (char 0)\n", 0), ProtocolError),
    ],
)
def test_a_destroy_that_failed_raises(
    fake: ScriptedCli, run: tuple[str, str, int], error: type[CloudError]
) -> None:
    with pytest.raises(error) as raised:
        fake.plays(run).destroy(5)
    assert type(raised.value) is error
    assert "6789" not in str(raised.value)


@pytest.mark.parametrize(
    ("run", "error"),
    [
        (refused(410, "error 410/3907: no_such_ask Instance type 11 is no longer available."), OfferGone),
        (refused(404, "error 404/3603: no_such_ask Instance type by id 11 is not available."), OfferGone),
        (answered({"success": False, "msg": "no_such_ask"}), OfferGone),
        (answered({"success": False, "error": "spend_rate_limit"}), ApiError),
        (refused(404, "Not found"), ApiError),
        (refused(504, "(no detail message supplied)"), ApiError),
        (answered({"success": True, "instance_api_key": "secret"}), ProtocolError),
        (answered({"success": True, "new_contract": "1001", "instance_api_key": "secret"}), ProtocolError),
        (said("Started. {'instance_api_key': 'x'}"), ProtocolError),
    ],
)
def test_a_create_that_failed_says_how_and_shows_no_key(
    fake: ScriptedCli, run: tuple[str, str, int], error: type[CloudError]
) -> None:
    with pytest.raises(error) as raised:
        create(fake.plays(run))
    assert type(raised.value) is error
    assert str(raised.value).startswith("vastai create instance 11: expected ")
    assert "secret" not in str(raised.value)


def test_a_refusal_in_the_body_has_status_200_and_its_words(fake: ScriptedCli) -> None:
    with pytest.raises(ApiError) as raised:
        create(fake.plays(answered({"success": False, "msg": "spend_rate_limit"})))
    assert (raised.value.status, raised.value.msg) == (200, "spend_rate_limit")


def test_a_log_that_was_not_uploaded_in_time_is_a_timeout(fake: ScriptedCli) -> None:
    with pytest.raises(CloudTimeout, match="uploaded"):
        fake.plays(("", CRASH + "TimeoutError: Result not ready after 9.0s: http://x\n", 1)).logs(5)


def test_a_log_is_text_and_an_empty_one_is_an_empty_line(fake: ScriptedCli) -> None:
    vast = fake.plays(said("a\nb"), said(""), ("", "", 0))
    assert (vast.logs(5, tail=2), vast.logs(5)) == ("a\nb", "")
    assert fake.argvs == [["logs", "5", "--tail=2", "--raw"], ["logs", "5", "--tail=100", "--raw"]]
    with pytest.raises(ProtocolError):
        vast.logs(5)


@pytest.mark.parametrize(
    "env",
    [
        "",
        "-p 3000:3000 -p 8000:8000",
        "-e A=1 -e B= -e C=x=y -h host-1 -v /a:/b -n net-1 -p 70000:70000/udp",
        "-e A='two words' -e B=\"it is\"",
    ],
)
def test_an_env_that_is_accepted_is_kept_in_full_by_the_cli(env: str) -> None:
    check_env(env)
    options = sum(word in ("-e", "-p", "-h", "-v", "-n") for word in env.split())
    assert len(parse_env_of_the_cli(env)) == options


def parse_env_of_the_cli(env: str) -> dict[str, str]:
    """Its own parser, loaded without the rest of the package, which takes 0.4 s."""
    package = importlib.util.find_spec("vastai")
    assert package is not None
    assert package.origin is not None
    file = Path(package.origin).with_name("utils.py")
    spec = importlib.util.spec_from_file_location("vastai_utils", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    parsed: dict[str, str] = module.parse_env(env)
    return parsed


@pytest.mark.parametrize(
    "env",
    [
        "-e  A=secret",  # a double space drops the variable
        "-e A=secret  -p 1:1",
        "-e A=secret ",
        " -e A=secret",
        "-e A=secret\n",
        "-e A",
        "--shm-size 1g",
        "--gpus all",
        "A=secret",
        "-e A=secret -x",
        "-p all",
        "-p 8000",
        "-e A=it's",
        "-e A='open",
        "-e 'A=b'",
        "-h under_score",
        "-n UPPER",
        " ".join(f"-p {p}:{p}" for p in range(1000, 1065)),
    ],
)
def test_an_env_of_which_the_cli_drops_a_part_is_refused_before_anything_is_sent(
    fake: ScriptedCli, env: str
) -> None:
    vast = fake.plays(said("{}"))
    with pytest.raises(ValueError, match="env") as raised:
        create(vast, env=env)
    assert "secret" not in str(raised.value)
    assert fake.argvs == []


@pytest.mark.parametrize("label", ["", "-x", "two words", "a\n", "é", "x" * 257])
def test_a_label_that_would_be_misread_is_refused(fake: ScriptedCli, label: str) -> None:
    vast = fake.plays(said("{}"))
    with pytest.raises(ValueError, match="label"):
        create(vast, label=label)
    with pytest.raises(ValueError, match="label"):
        vast.label(5, label)


def test_a_start_script_over_the_services_limit_is_refused(fake: ScriptedCli) -> None:
    with pytest.raises(ValueError, match="at most 4000 bytes, got 4002"):
        create(fake.plays(said("{}")), onstart="é" * 2001)


def test_search_asks_for_the_storage_and_leaves_out_what_has_no_price(
    fake: ScriptedCli, caplog: pytest.LogCaptureFixture
) -> None:
    answer = [
        offer(11),
        offer(12, dph_total=None),
        offer(13, machine_id=7),
        offer(14, reliability=None, reliability2=0.9),
    ]
    vast = fake.plays(answered(answer))
    offers = vast.search_offers("num_gpus=1", 40, exclude_machines=[7, 3])
    assert fake.argvs == [
        [
            "search",
            "offers",
            "num_gpus=1 machine_id notin [3,7]",
            "--type=on-demand",
            "--storage=40",
            "--order=dlperf_per_dphtotal-",
            "--limit=256",
            "--raw",
        ]
    ]
    eleven = Offer(
        id=11,
        machine_id=111,
        host_id=5,
        gpu_name="RTX 3090",
        num_gpus=1,
        gpu_ram_mb=24576,
        dph_total=0.21,
        dph_base=0.2,
        storage_cost_gb_month=0.18,
        inet_down_mbps=800.5,
        reliability=0.99,
        dlperf=None,
        geolocation="Norway, NO",
        is_bid=False,
        min_bid=0.1,
        duration_s=1e6,
    )
    assert offers == [eleven, replace(eleven, id=14, machine_id=114, reliability=0.9)]
    assert "1 of 4 offers left out" in caplog.text


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (answered({"offers": []}), "a list of offers, got an object with offers"),
        (answered([offer(gpu_name="")]), "a text as gpu_name of the offer"),
        (said("invalid return Content-Type: application/json; charset=utf-8"), "charset"),
        (
            ("Error:  Unknown operator. Did you forget to quote your query? ''\n1\n", "", 0),
            "Unknown operator",
        ),
    ],
)
def test_a_search_that_was_not_understood_raises(
    fake: ScriptedCli, run: tuple[str, str, int], words: str
) -> None:
    with pytest.raises(ProtocolError) as raised:
        fake.plays(run).search_offers("num_gpus", 40)
    assert words in str(raised.value)


def test_nothing_for_rent_is_an_empty_list(fake: ScriptedCli) -> None:
    assert fake.plays(answered([])).search_offers("num_gpus=9", 40) == []


def test_a_row_is_read_in_full_and_its_start_script_is_not_shown(fake: ScriptedCli) -> None:
    (row,) = fake.plays((answered(listing([instance()]))[0], "Warning: harmless\n", 0)).list_instances()
    assert row == ROW
    assert "master-token" not in repr(row)


def test_labels_are_compared_here_and_a_strangers_odd_row_does_not_matter(fake: ScriptedCli) -> None:
    rows = [
        instance(1, label="fleet/a"),
        instance(2, label="other/a", dph_total=None),
        instance(3, label=None),
        instance(4, label="fleet/b"),
    ]
    vast = fake.plays(answered(listing(rows)))
    assert [row.id for row in vast.list_instances("fleet/")] == [1, 4]
    assert fake.argvs == [["show", "instances", "--raw", "--limit=25"]]


def test_an_account_without_instances_is_an_empty_list(fake: ScriptedCli) -> None:
    assert fake.plays(answered(listing([]))).list_instances() == []


FIRST_PAGE = answered(listing(MANY[:25], total=30, next_token="e30="))


def test_more_than_a_page_is_fetched_flat_and_counted(fake: ScriptedCli) -> None:
    vast = fake.plays(FIRST_PAGE, answered(MANY))
    assert [row.id for row in vast.list_instances()] == list(range(1, 31))
    assert fake.argvs[1] == ["show", "instances", "--raw", "--retry=6"]


def test_one_that_went_between_the_two_calls_is_not_missing(fake: ScriptedCli) -> None:
    now_29 = answered(listing(MANY[:25], total=29, next_token="e30="))
    assert len(fake.plays(FIRST_PAGE, answered(MANY[:29]), now_29).list_instances()) == 29


@pytest.mark.parametrize("rows", [[], MANY[:25], MANY[:29] + MANY[:1]])
def test_a_flat_list_that_lost_rows_raises(fake: ScriptedCli, rows: list[object]) -> None:
    with pytest.raises(ProtocolError, match="the 30 instances that it claims"):
        fake.plays(FIRST_PAGE, answered(rows), FIRST_PAGE).list_instances()


def test_credit_may_be_negative(fake: ScriptedCli) -> None:
    assert fake.plays(answered({"credit": -0.25, "balance": 0})).credit() == -0.25


@pytest.mark.parametrize("user", [{}, {"credit": None}, {"credit": True}, {"credit": float("inf")}, []])
def test_an_account_that_does_not_say_its_credit_raises(fake: ScriptedCli, user: object) -> None:
    with pytest.raises(ProtocolError):
        fake.plays(answered(user)).credit()


def test_a_refused_key_at_start_up_is_the_operators_and_an_outage_is_not(fake: ScriptedCli) -> None:
    vast = fake.plays(refused(401, "Invalid user key"), refused(500, "oops"), answered({"credit": 1}))
    with pytest.raises(ConfigError, match="refuses the API key"):
        vast.check_key()
    with pytest.raises(ApiError, match="500"):
        vast.check_key()
    vast.check_key()


KEY_MADE = said(
    "Adding provided SSH public key to account...\nssh-key created {'success': True, 'key': {}}\nNote: x"
)


@pytest.mark.parametrize(
    "known",
    [
        [],
        [{"id": 1, "key": "ssh-ed25519 BBBB autoscaler-py"}],
        [{"id": 1, "public_key": PUBLIC_KEY, "deleted_at": "2026-01-01T00:00:00Z"}],
    ],
)
def test_a_key_the_account_lacks_is_added(fake: ScriptedCli, known: list[object]) -> None:
    fake.plays(answered(known), KEY_MADE).register_ssh_key(PUBLIC_KEY + "\n")
    assert fake.argvs == [["show", "ssh-keys", "--raw"], ["create", "ssh-key", PUBLIC_KEY, "--retry=1"]]


def test_a_key_is_attached_to_an_instance_and_only_its_own_words_are_a_success(fake: ScriptedCli) -> None:
    fake.plays(said("{'success': True, 'msg': 'SSH key added'}\n")).attach_ssh_key(7, PUBLIC_KEY + "\n")
    assert fake.argvs == [["attach", "ssh", "7", PUBLIC_KEY, "--retry=1"]]
    for printed in ("", "{'success': False, 'msg': 'no'}"):
        with pytest.raises(ProtocolError, match="attach ssh"):
            fake.plays(said(printed)).attach_ssh_key(7, PUBLIC_KEY)


@pytest.mark.parametrize("name", ["key", "public_key"])
def test_a_key_the_account_has_is_not_added_again(fake: ScriptedCli, name: str) -> None:
    known = [{"id": 1, name: "ssh-ed25519 AAAAC3Nza+/= another comment", "deleted_at": None}]
    fake.plays(answered(known)).register_ssh_key(PUBLIC_KEY)
    assert len(fake.argvs) == 1


@pytest.mark.parametrize(
    "run",
    [("", "", 0), said("ssh-key created {'success': False, 'msg': 'no'}"), refused_plainly(400, "bad key")],
)
def test_a_key_that_was_not_added_raises(fake: ScriptedCli, run: tuple[str, str, int]) -> None:
    with pytest.raises(CloudError):
        fake.plays(answered([]), run).register_ssh_key(PUBLIC_KEY)


@pytest.mark.parametrize(
    "key", ["", "ssh-ed25519", "-----BEGIN OPENSSH PRIVATE KEY-----", "ssh-rsa A\nssh-rsa B"]
)
def test_what_is_not_one_public_key_is_not_sent(fake: ScriptedCli, key: str) -> None:
    with pytest.raises(ValueError, match="one line of an ssh public key"):
        fake.plays(answered([])).register_ssh_key(key)


@pytest.mark.parametrize(
    ("flaw", "lacks"),
    [
        ({"machine_id": None}, "it lacks machine_id"),
        ({"dph_total": None}, "it lacks dph_total"),
        ({"dph_total": float("nan")}, "it lacks dph_total"),
        ({"dph_total": -1}, "it lacks dph_total"),
        ({"machine_id": 10**30}, "it lacks machine_id"),
        ({"dph_total": None, "machine_id": "7"}, "it lacks dph_total and machine_id"),
    ],
)
def test_an_odd_row_is_odd_and_the_others_are_fine(
    fake: ScriptedCli, flaw: dict[str, object], lacks: str
) -> None:
    """One row that lacks a price made every turn fail, and nothing scaled any more."""
    rows = fake.plays(answered(listing([instance(**flaw), instance(id=1002)]))).list_instances()
    assert [(r.id, r.odd) for r in rows] == [(1001, lacks), (1002, None)]


def test_a_row_without_an_id_is_left_out_and_the_others_are_read(
    fake: ScriptedCli, caplog: pytest.LogCaptureFixture
) -> None:
    rows = fake.plays(answered(listing([7, instance(id=None), instance(id=1002)]))).list_instances()
    assert [r.id for r in rows] == [1002]
    assert "2 of 3 rows left out" in caplog.text


def test_texts_of_a_row_are_made_safe_where_they_enter(fake: ScriptedCli) -> None:
    said = "bad \ud800\x1b[2J\nfake line " + "x" * 10_000
    [row] = fake.plays(answered(listing([instance(status_msg=said)]))).list_instances()
    assert row.status_msg is not None
    row.status_msg.encode()
    assert len(row.status_msg) <= 1_000
    assert row.status_msg.isprintable()


def test_its_own_page_says_whether_an_instance_is_there(fake: ScriptedCli) -> None:
    row = fake.plays(answered(instance(id=5))).show_instance(5)
    assert row is not None
    assert row.id == 5
    assert fake.plays(answered({"instances": None})).show_instance(5) is None
    assert fake.plays(refused(404, "no such instance")).show_instance(5) is None


@pytest.mark.parametrize(
    "run",
    [answered({}), answered([]), answered(None), said(""), refused(500, "oops"), answered(instance(id=6))],
)
def test_only_a_clear_answer_says_that_an_instance_is_gone(
    fake: ScriptedCli, run: tuple[str, str, int]
) -> None:
    with pytest.raises(CloudError):
        fake.plays(run).show_instance(5)
