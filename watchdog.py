"""
Watching over the ranks of a run. One that has died is known at once, one that hangs within a minute: one line
names the rank, the step and the place, a hanging rank shows its stack, and all processes end, so that
torchrun starts them again. A collective would only give up after minutes, and could not say whom it waited
for.

Every rank has a thread with a connection to rank 0, which tells every second how far the rank is. That costs
the training nothing: the loop only notes where it is.

    died     Its connection is closed without a word. The system does that for a dead process, and for a
             machine that is gone after some probes without an answer. A process that is merely busy never
             counts as dead.
    hangs    No rank is behind it, and it has not moved for its allowance, which it learns from its own steps.
             Ranks that wait for another one are ahead of it and are not accused, and nobody is while the last
             one compiles, evaluates or saves, which may take any time. Time in which the judge itself stood
             still, as all of a machine that swaps or is suspended does, is held against nobody.

A rank whose thread still runs shows its stack itself. Another one, which was stopped or is stuck outside
Python, is made to by a rank on the same machine, which then kills it; `kill -USR1 PID` shows the stack of any
rank at any time.

Sources: the parts are old (TCP keepalive, heartbeats); NVIDIA's resiliency extension and torchft have
processes of their own for them (OPERATIONS.md).
"""

import contextlib
import faulthandler
import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch.distributed as dist

from common import UserError, flush_streams, say_error

BEAT = 1.0  # seconds between two messages of a rank
SILENT = 5.0  # a rank from which nothing was heard for so long is stopped, or stuck outside Python
LEAST_ALLOWANCE = 50.0  # seconds without progress that no rank is accused for, however fast its steps are
ALLOWANCE = 20  # the allowance, in multiples of the slowest part of a recent step
FORGET = 0.999  # by which the slowest part counts less with every part that follows
PATIENCE = 2.0  # a rank that fails waits so long for the news that another one has died, which explains it
GRACE = 3.0  # when a rank has left with an error, the others have so long to find the same one
STACK_SECONDS = 4  # that a process has to write its stack, before it is killed; a busy machine needs some
PROBES = 3  # keepalive probes without an answer, one a second, until a machine counts as gone


# -----------------------------------------------------------------------------
# What is known of a rank

@dataclass
class Progress:
    """How far a rank is, as it tells the others."""
    count: int = 0  # notes made so far: ranks make the same ones in the same order, so the least is behind
    step: int = 0
    place: str = "setup"  # the part of the step, or what is done between two steps
    timed: bool = False  # whether it may hang here: in a step of a kind that has been run before
    allowance: float = LEAST_ALLOWANCE
    frame: str = ""  # the innermost line of ours that is being run, once it has been there for a while

    def __str__(self):
        return f"step {self.step} ({self.place})"

@dataclass
class Rank:
    """A rank as another one sees it. Times are of the latter's clock."""
    host: str  # names a machine, or a container on it
    pid: int
    started: str  # when the process began, so that its id cannot mean another one; empty: not known
    progress: Progress = field(default_factory=Progress)
    moved: float = 0.0  # when it last got further
    heard: float = 0.0  # when it last told anything
    left: float | None = None  # when it left
    reason: str | None = None  # why it did, if that was an error

    def hear(self, progress, now):
        """Take note of what the rank tells of itself."""
        if progress.count != self.progress.count:
            self.moved = now
        self.progress = progress
        self.heard = now

def hanging(ranks, now):
    """The ranks, of a dict {rank: Rank}, that hang: a list of numbers, empty as long as all is well."""
    present = {number: rank for number, rank in ranks.items() if rank.left is None}
    least = min((rank.progress.count for rank in present.values()), default=0)
    late = []
    for number, rank in present.items():
        is_behind = rank.progress.count == least
        if is_behind and rank.progress.timed and now - rank.moved > rank.progress.allowance:
            late.append(number)
    silent = [number for number in late if now - ranks[number].heard > SILENT]
    return silent or late

def describe_hanging(numbers, ranks, now):
    """The line about ranks that hang."""
    parts = []
    for number in numbers[:4]:
        rank = ranks[number]
        seconds = f"{now - rank.moved:.0f} s"
        if now - rank.heard > SILENT:
            part = f"rank {number} is stopped or stuck outside Python since {rank.progress}, {seconds} ago"
        else:
            part = f"rank {number} hangs in {rank.progress} for {seconds}"
            if rank.progress.frame:
                part += f", at {rank.progress.frame}"
        parts.append(part)
    if len(numbers) > 4:
        parts.append(f"and so do {len(numbers) - 4} more")
    return "; ".join(parts)

def this_host():
    """A name for this machine, or this container, that no other has: process ids are valid within it."""
    name = socket.gethostname()
    with contextlib.suppress(OSError):
        name += Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        name += os.readlink("/proc/self/ns/pid")
    return name

def start_time(pid):
    """When a process of this machine began, a number in text; empty if it is gone, or without /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rsplit(")", 1)[1].split()[19]

def innermost_frame(thread):
    """Where a thread is: "FILE:LINE in FUNCTION" of the innermost line of this repository; or empty."""
    frame = sys._current_frames().get(thread)
    folder = Path(__file__).parent
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.parent == folder:
            return f"{path.name}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return ""


# -----------------------------------------------------------------------------
# Connections

class Connection:
    """Messages, JSON objects of a line each, over a socket."""

    def __init__(self, sock):
        self.sock = sock
        self.number = None  # the rank at the other end, once it is known
        self.unread = b""
        self.sending = threading.Lock()
        sock.settimeout(SILENT)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        options = dict(TCP_KEEPIDLE=1, TCP_KEEPINTVL=1, TCP_KEEPCNT=PROBES, TCP_USER_TIMEOUT=PROBES * 1000)
        for name, value in options.items():
            if hasattr(socket, name):  # macOS has not all of them
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, **message):
        """Send a message; one who has gone is noticed by receive()."""
        with self.sending, contextlib.suppress(OSError):
            self.sock.sendall(json.dumps(message).encode() + b"\n")

    def leave(self, reason):
        """Say goodbye, and wait a moment until the other end has read that: a reset would overtake it."""
        self.send(left=True, reason=reason)
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
            self.sock.settimeout(1)
            while self.sock.recv(1 << 16):
                pass

    def receive(self):
        """What has come, a list of messages. Raises EOFError if the other end is gone, or no rank."""
        try:
            data = self.sock.recv(1 << 16)
        except OSError as e:
            raise EOFError from e
        if not data:
            raise EOFError
        *lines, self.unread = (self.unread + data).split(b"\n")
        try:
            return [json.loads(line) for line in lines]
        except ValueError as e:  # a stranger's
            raise EOFError from e

def listen():
    """A socket on a free port of all addresses of this machine."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


# -----------------------------------------------------------------------------
# The watchdog

class Watchdog:
    """
    Watches the ranks of a process group from `with Watchdog(..)` on to its end, or to close(). Without other
    ranks it takes notes and does nothing. All ranks have to begin together. Raises UserError if rank 0
    cannot be reached.
    """

    def __init__(self, rank=0, world_size=1):
        self.rank = rank
        self.active = dist.is_initialized() and world_size > 1
        self.closed = False
        self.main_thread = threading.get_ident()

        # where the training loop is
        self.progress = Progress()
        self.since = time.monotonic()  # when it got there
        self.begun = Counter()  # steps, by their kind
        self.interrupted = False  # whether anything came between the last step and the next one
        self.learns = False  # whether the parts of this step count for the allowance
        self.slowest = 0.0  # seconds of the slowest part of a recent step

        self.lost = 0.0  # seconds in which the thread should have run and did not
        if self.active:
            self.connect(world_size)

    # -------------------------------------------------------------------------
    # Notes of the training loop

    def begin_step(self, step, kind):
        """
        A step begins, of a kind of which all take about as long. The first one of a kind may compile, and the
        second one shows how long they take.
        """
        self.begun[kind] += 1
        self.note("begin", step, timed=self.begun[kind] > 2)
        # after a save, the other ranks may wait for rank 0
        self.learns = self.begun[kind] > 1 and not self.interrupted
        self.interrupted = False

    def at(self, place):
        """The next part of the step begins."""
        self.note(place, self.progress.step, self.progress.timed)

    def between(self, what, step):
        """Between two steps, something begins that may take any time: an evaluation, a save."""
        self.learns = False
        self.interrupted = True
        self.note(what, step, timed=False)

    def note(self, place, step, timed):
        now = time.monotonic()
        if self.learns:
            self.slowest = max(now - self.since, FORGET * self.slowest)
        allowance = max(LEAST_ALLOWANCE, ALLOWANCE * self.slowest)
        self.since = now
        self.progress = Progress(self.progress.count + 1, step, place, timed, allowance)

    # -------------------------------------------------------------------------
    # Begin and end

    def connect(self, world_size):
        """Make the connections, and start the thread."""
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        server = listen() if self.rank == 0 else None
        mine = dict(host=this_host(), pid=os.getpid(), started=start_time(os.getpid()))
        port = server.getsockname()[1] if server else 0
        everybody = [None] * world_size
        dist.all_gather_object(everybody, (mine, port, secrets.token_hex(16)))
        now = self.clock()
        self.ranks = {}
        for number, (fields, _, _) in enumerate(everybody):
            self.ranks[number] = Rank(**fields, moved=now, heard=now)
        _, port, self.token = everybody[0]

        self.connections = []
        self.selector = selectors.DefaultSelector()
        if self.rank == 0:
            self.selector.register(server, selectors.EVENT_READ, None)
        else:
            address = os.environ["MASTER_ADDR"], port
            try:
                connection = Connection(socket.create_connection(address, timeout=60))
            except OSError as e:
                raise UserError(f"rank {self.rank} cannot connect to rank 0 at {address} ({e}): "
                                "let the nodes reach each other on all ports") from e
            connection.number = 0
            connection.send(token=self.token, number=self.rank)
            self.add(connection)
        threading.Thread(target=self.watch, daemon=True).start()

    def add(self, connection):
        self.connections.append(connection)
        self.selector.register(connection.sock, selectors.EVENT_READ, connection)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        """
        The rank leaves. An error may come from the death of another rank: then that is what is said, and the
        process ends in here.
        """
        is_own = error is None or isinstance(error, (UserError, KeyboardInterrupt, SystemExit))
        if self.active and not self.closed and not is_own:
            time.sleep(PATIENCE)
        self.close(None if error is None else (str(error) or kind.__name__).split("\n")[0])

    def close(self, reason=None):
        """End watching. The others are told, and why if that is an error."""
        if self.active and not self.closed:
            self.closed = True
            for connection in list(self.connections):
                connection.leave(reason)

    # -------------------------------------------------------------------------
    # The thread

    def watch(self):
        """Until the end: listen, tell, judge."""
        next_beat = time.monotonic()
        while not self.closed:
            ready = self.selector.select(max(next_beat - time.monotonic(), 0))
            late = time.monotonic() - next_beat
            if late > BEAT:
                self.lost += late
            for key, _ in ready:
                if key.data is None:  # rank 0 is called
                    self.add(Connection(key.fileobj.accept()[0]))
                else:
                    self.read(key.data)
            if late < 0:
                continue
            next_beat = time.monotonic() + BEAT
            self.tell(self.clock())
            self.judge(self.clock())

    def clock(self):
        """Seconds in which this thread could have heard of others."""
        return time.monotonic() - self.lost

    def tell(self, now):
        """Tell the other ranks how far this one is: rank 0 tells all, all tell rank 0."""
        progress = self.progress
        if time.monotonic() - self.since > SILENT:
            progress.frame = innermost_frame(self.main_thread)
        self.ranks[self.rank].hear(progress, now)
        for connection in self.connections:
            connection.send(**asdict(progress))

    def read(self, connection):
        """Take note of what another rank tells, of its end, and of the verdict about a third one."""
        now = self.clock()
        rank = self.ranks.get(connection.number)
        try:
            messages = connection.receive()
            if rank is None and messages:
                rank = self.identify(connection, messages.pop(0))
        except EOFError:
            self.selector.unregister(connection.sock)
            self.connections.remove(connection)
            connection.sock.close()
            if rank is not None and rank.left is None:
                self.end(f"rank {connection.number} died in {rank.progress}", [connection.number])
            return
        for message in messages:
            if "verdict" in message:
                self.end(**message["verdict"])
            elif "left" in message:
                rank.left = now
                rank.reason = message["reason"]
            else:
                rank.hear(Progress(**message), now)

    def identify(self, connection, hello):
        """The Rank at the other end, from its first message. Raises EOFError if it is a stranger."""
        if not isinstance(hello, dict) or hello.get("token") != self.token:
            raise EOFError
        connection.number = hello["number"]
        return self.ranks[connection.number]

    def judge(self, now):
        """Does a rank hang, or has one left that the others still wait for?"""
        for number, rank in self.ranks.items():
            if rank.reason is not None and now - rank.left > GRACE:
                self.end(f"rank {number} ended in {rank.progress}: {rank.reason}", [number])
        # only rank 0 knows of all; of rank 0 the others know
        known = self.ranks
        if self.rank != 0:
            known = {0: self.ranks[0]}
            if now - known[0].heard <= SILENT:  # it judges itself
                return
        numbers = hanging(known, now)
        if numbers:
            self.end(describe_hanging(numbers, known, now), numbers, hang=True)

    def end(self, what, numbers, hang=False):
        """
        End this process, and say why; the others hear of it from rank 0. numbers: the ranks at fault; hang:
        they hang, so their stacks are shown. On every machine one of the other ranks says the line.
        """
        if self.closed:  # training is over
            return
        for connection in self.connections:
            connection.send(verdict=dict(what=what, numbers=numbers, hang=hang))
        host = self.ranks[self.rank].host
        here = {number: rank for number, rank in self.ranks.items() if rank.host == host}
        innocent = [number for number in here if number not in numbers]
        if self.rank == min(innocent or here):
            say_error(f"{what}; all processes end, go on with --resume")
        if hang and self.rank in numbers:
            print(f"rank {self.rank} hangs in {self.progress}:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(2)
        if hang and self.rank == min(innocent, default=None):
            end_by_force([here[number] for number in numbers if number in here])
        flush_streams()
        os._exit(1)

def end_by_force(ranks):
    """
    End processes of this machine that hang. They have a second to show their stack and to end by themselves,
    and some more to show it when signalled, which works for a stopped process, and for one that is stuck
    outside Python, too. Then they are killed.
    """
    for seconds, signals in ((1, (signal.SIGUSR1, signal.SIGCONT)), (STACK_SECONDS, (signal.SIGKILL,))):
        time.sleep(seconds if ranks else 0)
        for rank in ranks:
            if rank.started and start_time(rank.pid) == rank.started:
                for number in signals:
                    with contextlib.suppress(OSError):
                        os.kill(rank.pid, number)
