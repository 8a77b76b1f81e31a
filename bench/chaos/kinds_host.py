"""Rented hosts that lie: their disk has our programs, and they change them.

The supervisor on the instance starts what was killed again, and finds the changed file. In the end the file
is put back, and the machine is as it was.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from bench.chaos import lying_auth, lying_engine
from bench.chaos.kinds import Effect, Kind, NotNow, Scene, running
from localcloud import processes

HOLE_BYTES = 100_000_000
"""Of a line in a log: a hole in the file, which takes no space."""

TRUE_AUTH, TRUE_CHECK = "true_auth_server.py", "true_token_check.py"
"""The names under which a host that lies keeps our own files."""

LASTS_S = {"engine-slow": (60.0, 75.0)}
"""For how long an engine lies, where that is longer than usual: until clients have found it slow."""

AUTH = b"remote.auth_server"
ENGINE = b"vllm.entrypoints.cli.main"


def _victim(scene: Scene, *, prepared: bool = False) -> tuple[int, Path]:
    """Return a running machine that does not lie now. prepared: one whose engine can, if there is one."""
    ids = [int(str(row["id"])) for row in running(scene)]
    honest = []
    for i in ids:
        fleet = scene.truth.home(i) / "fleet"
        if not (fleet / lying_engine.LIE_FILE).exists() and not (fleet / "remote" / TRUE_AUTH).exists():
            honest.append(i)
    able = [i for i in honest if (scene.truth.home(i) / "fleet" / "remote" / TRUE_CHECK).exists()]
    if not honest:
        raise NotNow
    instance_id = scene.rng.choice(able if prepared and able else honest)
    scene.say(str(instance_id))
    return instance_id, scene.truth.home(instance_id)


def _restart(home: Path, program: bytes) -> None:
    """Kill that program of the instance; its supervisor starts it again."""
    for pid in processes.living_in(home.parent):
        if program in processes.command_line(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _changed(file: str, keep: str, text: str, program: bytes) -> Effect:
    """An instance runs that text in place of one of our files, which stays under another name."""

    @contextlib.contextmanager
    def effect(scene: Scene) -> Iterator[None]:
        instance_id, home = _victim(scene)
        path = home / "fleet" / "remote" / file
        kept = path.with_name(keep)
        try:
            if kept.exists():
                raise NotNow  # it lies already
            kept.write_text(path.read_text())
            path.write_text(text)
        except OSError:
            raise NotNow from None
        scene.truth.hurt(instance_id, text, scene.for_s)
        _restart(home, program)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if path.read_text() == text:  # else it was booted anew, and has the real one
                    path.write_text(kept.read_text())
                    kept.unlink()
                    _restart(home, program)
            scene.truth.hurt(instance_id, text)

    return effect


def auth_lie(lie: str) -> Effect:
    """The auth_server lies so."""
    text = f"from bench.chaos.lying_auth import main\n\nmain({lie!r})\n"
    return _changed("auth_server.py", TRUE_AUTH, text, AUTH)


ENGINE_TEXT = """from bench.chaos.lying_engine import lying_check
from remote import true_token_check

TokenCheck = lying_check(true_token_check.TokenCheck)
"""


def engine_lie(lie: str) -> Effect:
    """The engine lies so, behind the real token check.

    The engine is killed once in a boot, to load the liar, and the lie is then told and not told by a file:
    two kills a lie would be other faults (model-killed), and three of five that a stream met.
    """

    @contextlib.contextmanager
    def effect(scene: Scene) -> Iterator[None]:
        instance_id, home = _victim(scene, prepared=True)
        fleet = home / "fleet"
        path, said = fleet / "remote" / "token_check.py", fleet / lying_engine.LIE_FILE
        scene.truth.hurt(instance_id, lie, scene.for_s)
        try:
            if path.read_text() != ENGINE_TEXT:
                path.with_name(TRUE_CHECK).write_text(path.read_text())
                path.write_text(ENGINE_TEXT)
                _restart(home, ENGINE)
            said.write_text(lie)
        except OSError:
            raise NotNow from None
        try:
            yield
        finally:
            said.unlink(missing_ok=True)
            scene.truth.hurt(instance_id, lie)

    return effect


@contextlib.contextmanager
def endless_line(scene: Scene) -> Iterator[None]:
    """The log gets a line of 100 MB that does not end."""
    instance_id, home = _victim(scene)
    scene.truth.hurt(instance_id, "endless line", scene.for_s)
    path = home / "fleet" / "model.log"
    try:
        with path.open("ab") as file:
            file.truncate(path.stat().st_size + HOLE_BYTES)
    except OSError:
        raise NotNow from None
    yield
    scene.truth.hurt(instance_id, "endless line")


@contextlib.contextmanager
def growing_log(scene: Scene) -> Iterator[None]:
    """The log grows by lines that mean nothing, as fast as they are read."""
    instance_id, home = _victim(scene)
    scene.truth.hurt(instance_id, "growing log", scene.for_s)
    path = home / "fleet" / "model.log"
    until = time.monotonic() + min(scene.for_s, 3.0)
    try:
        with path.open("ab") as file:
            while time.monotonic() < until and path.stat().st_size < HOLE_BYTES:
                file.write(1000 * b"INFO 0 % \x1b[2J of nothing \xff\xfe\n")
                time.sleep(0.01)
    except OSError:
        raise NotNow from None
    yield
    scene.truth.hurt(instance_id, "growing log")


KINDS = (
    *(Kind(f"host:{lie}", auth_lie(lie), (8.0, 20.0)) for lie in lying_auth.LIES),
    *(Kind(f"host:{lie}", engine_lie(lie), LASTS_S.get(lie, (10.0, 25.0))) for lie in lying_engine.LIES),
    Kind("host:endless-line", endless_line, (5.0, 10.0)),
    Kind("host:growing-log", growing_log, (5.0, 10.0)),
)
