"""A wide-area link between two bridges of one network namespace: reads frames from a TAP on each side, and passes them on late,
or not at all. Runs inside that namespace; the kernels that this has to run on have no netem.

  link.py TAP_A BRIDGE_A TAP_B BRIDGE_B

Standard input sets the link, one line at a time: "DELAY_MS JITTER_MS LOSS_PERCENT KBIT_PER_S" (0 = no limit), or "cut".
Delay is per direction. Ends when standard input ends. Prints "ready" when frames pass."""
import fcntl, heapq, os, random, select, struct, subprocess, sys, time

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000


class Side:
    def __init__(self, name, bridge):
        self.fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(self.fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
        subprocess.run(["ip", "link", "set", name, "master", bridge, "up"], check=True)
        self.free_at = 0.0  # When the line to this side has sent what was given to it.
        self.last = 0.0  # Frames arrive in the order in which they were sent.


def main():
    a, b = Side(*sys.argv[1:3]), Side(*sys.argv[3:5])
    other = {a.fd: b, b.fd: a}
    delay, jitter, loss, rate, cut = 0.0, 0.0, 0.0, 0.0, False
    waiting, count, typed = [], 0, b""
    print("ready", flush=True)
    while True:
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, _, to, frame = heapq.heappop(waiting)
            try:
                os.write(to.fd, frame)
            except OSError:
                pass  # The side's queue is full: a real line drops then too.
        wait = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        readable, _, _ = select.select([0, a.fd, b.fd], [], [], wait)
        for fd in readable:
            if fd == 0:
                chunk = os.read(0, 4096)
                if not chunk:
                    return
                typed += chunk
                *lines, typed = typed.split(b"\n")
                for line in lines:
                    cut = line.strip() == b"cut"
                    if cut:
                        waiting.clear()
                    else:
                        delay, jitter, loss, rate = (float(word) for word in line.split())
                continue
            to = other[fd]
            for _ in range(64):
                try:
                    frame = os.read(fd, 65535)
                except BlockingIOError:
                    break
                if cut or random.random() * 100 < loss:
                    continue
                now = time.monotonic()
                to.free_at = max(to.free_at, now) + (len(frame) / (rate * 125.0) if rate else 0.0)
                late = max(0.0, delay + random.uniform(-jitter, jitter)) / 1000
                to.last = max(to.last, to.free_at + late)
                count += 1
                heapq.heappush(waiting, (to.last, count, to, frame))


main()
