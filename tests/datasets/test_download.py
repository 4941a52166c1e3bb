"""The download, against a web server on this machine that breaks off, stalls, lies and refuses."""

import json
import random
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from archives import member, write_archive

from pipeline import disk
from pipeline.datasets import _download
from pipeline.datasets._download import FetchError, fetch, local_path
from pipeline.spec import UserError

if TYPE_CHECKING:
    from datasets.conftest import FileServer

ROOT = Path(__file__).parents[2]
N_FILLER = 3_000_000  # bytes of a member that nobody needs
N_PROBE = 2  # bytes, at most, that a try asks for twice
WANTED = {member(p, k) for p in ("train", "test") for k in ("images-idx3", "labels-idx1")}


@pytest.fixture
def archive(tmp_path: Path, server: "FileServer", monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive that ``server`` serves; its end that holds the directory holds no member."""
    monkeypatch.setattr(_download, "_TAIL", 1_500)
    path = tmp_path / "gzip.zip"
    write_archive(path, 1_000, 260, n_filler=N_FILLER)
    server.content = path.read_bytes()
    return path


def same(fetched: Path, archive: Path) -> bool:
    """Whether the members that are wanted are the same in both."""
    with zipfile.ZipFile(fetched) as a, zipfile.ZipFile(archive) as b:
        return all(a.read(name) == b.read(name) for name in WANTED)


def n_needed(server: "FileServer", cache: Path) -> int:
    """Bytes that an undisturbed download takes."""
    before = server.n_sent
    fetch(server.url + "&undisturbed", cache, WANTED.__contains__)
    return server.n_sent - before


def leftovers(cache: Path) -> set[str]:
    return {file.suffix for file in cache.iterdir()} - {".lock"}


def test_ranges(archive: Path, server: "FileServer", cache: Path) -> None:
    fetched = fetch(server.url, cache, WANTED.__contains__)
    # Law: the members that are wanted come whole, and the file has the archive's size.
    assert same(fetched, archive)
    assert fetched.stat().st_size == archive.stat().st_size
    # Law: of the members that are not wanted, next to nothing is sent.
    assert server.n_sent < archive.stat().st_size - 0.9 * N_FILLER
    # Law: no byte is sent twice, but for the one that asks whether the archive is the same.
    assert server.n_sent - N_PROBE <= len(set().union(*(range(*span) for span in server.sent)))
    # Law: nothing but the finished file stays.
    assert leftovers(cache) == {".zip"}


def test_no_ranges(archive: Path, server: "FileServer", cache: Path) -> None:
    server.ranges = False
    # Law: a server that ignores ranges sends the whole file, once.
    fetched = fetch(server.url, cache, WANTED.__contains__)
    assert fetched.read_bytes() == archive.read_bytes()
    assert server.n_sent == archive.stat().st_size


def test_no_ranges_broken_off(archive: Path, server: "FileServer", cache: Path) -> None:
    server.ranges, server.breaks = False, [1_000_000]
    # Law: without ranges the next try starts again, and ends with the right bytes.
    fetched = fetch(server.url, cache, WANTED.__contains__)
    assert fetched.read_bytes() == archive.read_bytes()
    assert server.n_sent == archive.stat().st_size + 1_000_000


def test_broken_off_goes_on(archive: Path, server: "FileServer", cache: Path) -> None:
    n = n_needed(server, cache)
    server.breaks = [server.n_sent + share * n // 5 for share in (1, 2, 4)]
    before = server.n_sent
    # Law: a try goes on at the byte where the one before was broken off.
    assert same(fetch(server.url, cache, WANTED.__contains__), archive)
    assert server.breaks == []
    assert server.n_sent - before <= n + 3 * N_PROBE


def break_off(server: "FileServer", cache: Path) -> int:
    """Have a download end half-way; returns the bytes that a whole one takes."""
    n = n_needed(server, cache)
    server.breaks = [server.n_sent + n // 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_download, "WAITS", ())
        # Law: when no try is left the cause is named, and no finished file lies there.
        with pytest.raises(FetchError, match="more expected"):
            fetch(server.url, cache, WANTED.__contains__)
    assert not local_path(server.url, cache).exists()
    return n


def test_next_call_goes_on(archive: Path, server: "FileServer", cache: Path) -> None:
    n = break_off(server, cache)
    before = server.n_sent
    # Law: a call goes on at the byte where the one before stopped.
    assert same(fetch(server.url, cache, WANTED.__contains__), archive)
    assert server.n_sent - before <= n - n // 2 + N_PROBE


def test_killed_goes_on(archive: Path, server: "FileServer", cache: Path) -> None:
    n = n_needed(server, cache)
    before = server.n_sent
    server.stalls = before + n // 2
    program = "import sys, pathlib; from pipeline.datasets import _download as d; d.fetch"
    call = f"(sys.argv[1], pathlib.Path(sys.argv[2]), {WANTED}.__contains__)"
    command = [sys.executable, "-c", program + call, server.url, str(cache)]
    note = local_path(server.url, cache).with_suffix(".json")
    with subprocess.Popen(command, cwd=ROOT) as process:
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline and process.poll() is None:
            spans = json.loads(note.read_text())[2] if note.exists() else []
            if sum(stop - start for start, stop in spans) >= n // 2:
                break
            time.sleep(0.02)
        process.kill()  # SIGKILL: nothing in the process can tidy up
    # Law: a killed download leaves no finished file.
    assert leftovers(cache) == {".zip", ".part", ".json"}
    assert not local_path(server.url, cache).exists()
    server.stalls = None
    # Law: the next call goes on at the byte where the killed one stopped.
    assert same(fetch(server.url, cache, WANTED.__contains__), archive)
    assert server.n_sent - before <= n + N_PROBE


def change(archive: Path, server: "FileServer", n_more: int) -> None:
    """Have the server serve other letters, in a file that is larger by ``n_more`` bytes."""
    size = len(server.content)
    write_archive(archive, 1_000, 260, seed=1, n_filler=N_FILLER)
    n_filler = N_FILLER + size + n_more - archive.stat().st_size
    write_archive(archive, 1_000, 260, seed=1, n_filler=n_filler)
    server.content = archive.read_bytes()
    assert len(server.content) == size + n_more


def test_changed_version(archive: Path, server: "FileServer", cache: Path) -> None:
    n = break_off(server, cache)
    before = server.n_sent
    change(archive, server, 0)
    server.etag = '"2"'
    # Law: another version of the archive is fetched from its start, and once.
    assert same(fetch(server.url, cache, WANTED.__contains__), archive)
    assert server.n_sent - before == pytest.approx(n, abs=2_000)


@pytest.mark.parametrize("n_more", [-1_000_000, 0, 1_000])
def test_changed_without_etag(
    archive: Path, server: "FileServer", cache: Path, n_more: int
) -> None:
    server.etag = ""
    break_off(server, cache)
    change(archive, server, n_more)
    # Law: where a server names no version, the size or the CRCs tell; two versions never mix.
    assert same(fetch(server.url, cache, WANTED.__contains__), archive)


def test_part_is_gone(archive: Path, server: "FileServer", cache: Path) -> None:
    n = break_off(server, cache)
    before = server.n_sent
    local_path(server.url, cache).with_suffix(".part").unlink()
    # Law: a note without its bytes is not believed.
    assert same(fetch(server.url, cache, WANTED.__contains__), archive)
    assert server.n_sent - before == n


def test_corrupted_once(archive: Path, server: "FileServer", cache: Path) -> None:
    server.spoils = [N_FILLER + 10_000]  # in the images of train
    # Law: what came spoilt is thrown away and fetched again.
    assert same(fetch(server.url, cache, WANTED.__contains__), archive)
    assert server.spoils == []


def test_corrupted_for_good(archive: Path, server: "FileServer", cache: Path) -> None:
    server.spoils = [N_FILLER + 10_000] * 10
    # Law: an archive that always comes spoilt is refused, and nothing of it stays.
    with pytest.raises(FetchError, match="Bad CRC-32"):
        fetch(server.url, cache, WANTED.__contains__)
    assert leftovers(cache) == {".part", ".json"}
    assert local_path(server.url, cache).with_suffix(".part").stat().st_size == 0


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("n", [1, 500, 400_000])
def test_not_a_zip(server: "FileServer", cache: Path, n: int, ranges: bool) -> None:
    server.content, server.ranges = b"<p>please log in</p>" * (n // 20 + 1), ranges
    # Law: a page instead of an archive, as a captive portal sends it, is refused.
    with pytest.raises(FetchError, match="no whole zip archive"):
        fetch(server.url, cache, WANTED.__contains__)


@pytest.mark.parametrize("seed", range(20))
def test_spoilt_directory(
    archive: Path, server: "FileServer", cache: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_download, "WAITS", ())
    content, rng = bytearray(server.content), random.Random(seed)
    content[-4] += 60 * (seed == 0)  # the directory's offset: members then begin before 0
    for at in rng.choices(range(len(content) - 500, len(content)), k=min(seed, 4)):
        content[at] = rng.randrange(256)
    server.content = bytes(content)
    try:
        n, said = fetch(server.url, cache, WANTED.__contains__).stat().st_size, ""
    except (FetchError, UserError) as error:
        n, said = 0, str(error)
    # Law: whatever a directory says, there is a file, or a sentence that blames the archive.
    sentences = "no whole zip|must not exceed|without the letters"
    assert (n == len(content) and seed) or re.search(sentences, said)


def test_a_zip_without_the_letters_is_not_kept(
    archive: Path, server: "FileServer", cache: Path, tmp_path: Path
) -> None:
    letters = server.content
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as other:
        other.writestr("readme.txt", "x" * 5000)
    server.content, server.etag = (tmp_path / "other.zip").read_bytes(), '"2"'
    with pytest.raises(FetchError, match="it is a zip archive without the letters"):
        fetch(server.url, cache, WANTED.__contains__)
    # Law: where the right one comes to the same address it is fetched.
    server.content, server.etag = letters, '"3"'
    assert same(fetch(server.url, cache, WANTED.__contains__), archive)


def test_unavailable_twice(archive: Path, server: "FileServer", cache: Path) -> None:
    server.statuses = [503, 429]
    # Law: a server that is busy is asked again.
    assert same(fetch(server.url, cache, WANTED.__contains__), archive)


def test_unavailable_for_good(server: "FileServer", cache: Path) -> None:
    server.statuses = [503] * 100
    with pytest.raises(FetchError, match="HTTP status 503"):
        fetch(server.url, cache, WANTED.__contains__)
    # Law: tries are bounded: the first, and one after each wait.
    assert 100 - len(server.statuses) == 1 + len(_download.WAITS)


def test_not_found(server: "FileServer", cache: Path) -> None:
    server.statuses = [404, 200]
    # Law: what will not mend itself is not tried again.
    with pytest.raises(FetchError, match="HTTP status 404"):
        fetch(server.url, cache, WANTED.__contains__)
    assert server.statuses == [200]


def test_refused(server: "FileServer", cache: Path) -> None:
    # Law: of a refused connection the cause is given in two words.
    with pytest.raises(FetchError, match="^Connection refused$"):
        fetch("http://127.0.0.1:9/gzip.zip", cache, WANTED.__contains__)


def test_silent_server(
    archive: Path, server: "FileServer", cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.stalls = 100_000
    monkeypatch.setattr(_download, "TIMEOUT", (0.2, 0.2))
    monkeypatch.setattr(_download, "WAITS", ())
    # Law: no wait for a packet is without an end.
    with pytest.raises(FetchError, match="timed out"):
        fetch(server.url, cache, WANTED.__contains__)


def test_waits_are_bounded() -> None:
    # Law: with two addresses and no network a user has an answer within a quarter of a minute.
    assert 2 * sum(_download.WAITS) <= 15


def test_two_at_once(archive: Path, server: "FileServer", cache: Path) -> None:
    n = n_needed(server, cache)
    before = server.n_sent
    fetched: list[Path] = []
    threads = [
        threading.Thread(
            target=lambda: fetched.append(fetch(server.url, cache, WANTED.__contains__))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Law: of several at once one downloads, and the others wait for its file.
    assert len(fetched) == 4
    assert same(fetched[0], archive)
    assert server.n_sent - before == n


def test_too_large(
    tmp_path: Path, server: "FileServer", cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr(min(WANTED), bytes(5_000_000))
    server.content = (tmp_path / "bomb.zip").read_bytes()
    # Law: neither an archive nor a member may be larger than what does no harm.
    for limit, what in ((1_000, "an archive"), (1_000_000, min(WANTED))):
        monkeypatch.setattr(disk, "MAX_BYTES", limit)
        with pytest.raises(UserError, match=f"{what} must not exceed {limit:,} bytes"):
            fetch(server.url, cache, WANTED.__contains__)


@pytest.mark.parametrize("ranges", [True, False])
def test_no_room(
    ranges: bool,
    archive: Path,
    server: "FileServer",
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server.ranges = ranges
    usage = shutil.disk_usage(cache.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=270_000))
    # Law: what has no room on the disk is not begun, whether it comes whole or in members.
    with pytest.raises(UserError, match="only 270,000 are free on its disk: make room or set LETT"):
        fetch(server.url, cache, WANTED.__contains__)
    assert not local_path(server.url, cache).exists()
    assert local_path(server.url, cache).with_suffix(".part").stat().st_blocks * 512 < 270_000


def test_disk_full(archive: Path, server: "FileServer", cache: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        # Law: a disk that takes no more is an error in a sentence, with no half file.
        with pytest.raises(UserError, match="must be writable and have room.*File too large"):
            fetch(server.url, cache, WANTED.__contains__)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert leftovers(cache) <= {".part", ".json"}
    # Law: with room again the next call succeeds.
    assert same(fetch(server.url, cache, WANTED.__contains__), archive)


@pytest.mark.parametrize("note", ["", "[1, ", '[99, "x", [[0, 99]]]'])
def test_spoilt_note(archive: Path, server: "FileServer", cache: Path, note: str) -> None:
    cache.mkdir()
    local_path(server.url, cache).with_suffix(".json").write_text(note)
    # Law: a note that tells of nothing, or of a copy that is gone, does no harm.
    assert same(fetch(server.url, cache, WANTED.__contains__), archive)
