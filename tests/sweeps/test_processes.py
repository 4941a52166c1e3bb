"""A tree of processes is seen whole, also while threads and processes of it end."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sweeps import processes

needs_proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="the system has no /proc")


@needs_proc
def test_a_thread_that_ends_hides_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = Path.iterdir

    def iterdir(folder: Path) -> Iterator[Path]:
        yield folder / "0"  # listed, and gone before it is read
        yield from listed(folder)

    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        monkeypatch.setattr(Path, "iterdir", iterdir)
        assert child.pid in processes.children(os.getpid())
        child.communicate(b"\n")
    assert child.pid not in processes.children(os.getpid())


@needs_proc
def test_children_of_all_threads_are_found() -> None:
    started: list[subprocess.Popen[bytes]] = []
    done = threading.Event()

    def start() -> None:
        words = [sys.executable, "-c", "input()"]
        started.append(subprocess.Popen(words, stdin=subprocess.PIPE))
        there.set()
        done.wait(60)  # where its thread ends the child is another thread's

    there = threading.Event()
    thread = threading.Thread(target=start)
    thread.start()
    try:
        assert there.wait(60)
        assert started[0].pid in processes.tree(os.getpid())
    finally:
        done.set()
        thread.join()
        started[0].communicate(b"\n")


@needs_proc
def test_nobody_is_the_child_of_a_process_that_is_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    assert processes.children(child.pid) == []
    assert processes.tree(child.pid) == [child.pid]
    assert processes.cpu_seconds(child.pid) == 0
    assert processes.parent(child.pid) == 0
