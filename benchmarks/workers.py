"""A Dask cluster of processes on this machine: real in everything but distance."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from pipeline import owner
from sweeps import processes

READY_SECONDS = 60.0
_TICK = os.sysconf("SC_CLK_TCK")


class Workers:
    """A scheduler on 127.0.0.1, and workers of one thread each that come and go.

    The process that has this adopts the orphans of its descendants, so that what a killed worker's
    children have spent is known to the last.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str], tls: bool = False) -> None:
        """Logs go to ``folder``. With ``tls``, Dask's configuration names the certificates."""
        self.folder, self.environment = folder, dict(environment)
        self.nannies: dict[str, subprocess.Popen[bytes]] = {}
        self.family: set[int] = set()  # all descendants that were ever seen
        self.orphaned = 0.0  # CPU-seconds of orphans that have ended
        processes.adopt_orphans()
        words = ["scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
        words += ["--protocol", "tls"] if tls else []
        self.scheduler = self._dask("scheduler", words, {})
        self.address = self._address()

    def _address(self) -> str:
        """Where the scheduler listens, once it does."""
        until = time.monotonic() + READY_SECONDS
        path = self.folder / "scheduler.log"
        while time.monotonic() < until and self.scheduler.poll() is None:
            for line in path.read_text().splitlines():
                if "Scheduler at:" in line:
                    return line.split("Scheduler at:")[1].strip()
            time.sleep(0.1)
        raise RuntimeError(f"the scheduler did not start: {path.read_text()[-2000:]}")

    def _dask(
        self, name: str, words: list[str], more: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", f"distributed.cli.dask_{words[0]}", *words[1:]],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=self.environment | dict(more),
                start_new_session=True,
            )

    def add(self, name: str, **environment: str) -> None:
        """Start a worker, which a nanny starts anew should it die; waits until it is there."""
        words = ["worker", self.address, "--nthreads", "1", "--name", name, "--no-dashboard"]
        words += ["--local-directory", str(self.folder / "scratch")]
        self.nannies[name] = self._dask(name, words, environment)
        until = time.monotonic() + READY_SECONDS
        while "Registered to" not in (self.folder / f"{name}.log").read_text():
            if time.monotonic() > until or self.nannies[name].poll() is not None:
                raise RuntimeError((self.folder / f"{name}.log").read_text()[-2000:])
            time.sleep(0.1)

    def process(self, name: str) -> int:
        """The worker's process, 0 where there is none; its nanny's other child is a tracker."""
        found = processes.children(self.nannies[name].pid)
        return max(found, key=processes.cpu_seconds, default=0)

    def trials(self, name: str) -> list[int]:
        """Processes that a worker's nursery has forked for trials."""
        nurseries = filter(_is_nursery, processes.children(self.process(name)))
        forks = [pid for nursery in nurseries for pid in processes.children(nursery)]
        return list(filter(_is_nursery, forks))  # not the programs that it runs while it loads

    def kill(self, name: str) -> None:
        """kill -9 of a worker; its nanny will start another one."""
        self.cpu_seconds()
        os.kill(self.process(name), signal.SIGKILL)

    def cpu_seconds(self) -> float:
        """What workers and all below them have spent so far, without their nannies.

        Those that were never seen by this are missed once their parents are dead.
        """
        for nanny in self.nannies.values():
            self.family |= set(processes.tree(nanny.pid)[1:])
        # Orphans are our children now, but not the only ones.
        for pid in set(processes.children(os.getpid())) & self.family:
            with suppress(ChildProcessError):
                done, _, usage = os.wait4(pid, os.WNOHANG)
                self.orphaned += usage.ru_utime + usage.ru_stime if done else 0.0
        return self.orphaned + sum(map(_below, self.nannies.values()))

    def n_drivers(self) -> list[int]:
        """Sweeps that have come to the cluster, and those that have left it."""
        lines = (self.folder / "scheduler.log").read_text().splitlines()
        said = "Receive client connection", "Remove client"
        return [sum(words in line and "Client-letters" in line for line in lines) for words in said]

    def used(self, driver: subprocess.Popen[bytes], each: Callable[[float], None]) -> float:
        """CPU-seconds of a driver, and of the workers while it is at the cluster, by the kernel.

        ``each`` is called five times a second with the workers' part so far. What idle workers
        spend before and after is Dask's: three per cent of a core each.
        """
        come, gone = self.n_drivers()
        start = end = self.cpu_seconds()
        done, status, usage = 0, 0, None
        while not done:
            time.sleep(0.2)
            done, status, usage = os.wait4(driver.pid, os.WNOHANG)
            spent = self.cpu_seconds()
            if self.n_drivers()[0] == come:
                start = spent
            if self.n_drivers()[1] == gone:
                end = spent
            each(end - start)
        driver.returncode = os.waitstatus_to_exitcode(status)
        assert usage is not None
        return end - start + usage.ru_utime + usage.ru_stime

    def remove(self, name: str) -> None:
        """End a worker for good."""
        self.cpu_seconds()
        nanny = self.nannies.pop(name)
        processes.kill_tree(nanny.pid)
        nanny.wait()

    def stop(self) -> None:
        """End all of it."""
        for name in list(self.nannies):
            self.remove(name)
        self.scheduler.kill()
        self.scheduler.wait()


def _below(nanny: "subprocess.Popen[bytes]") -> float:
    """CPU-seconds of a nanny's descendants, dead and alive."""
    ended = sum(map(int, owner.stat(nanny.pid)[13:15])) / _TICK
    return ended + sum(map(processes.cpu_seconds, processes.tree(nanny.pid)[1:]))


def _is_nursery(pid: int) -> bool:
    """Whether a process is a nursery or a fork of one."""
    with suppress(OSError):
        return b"sweeps.nursery" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False
