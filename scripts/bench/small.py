"""A target from its start, for scripts/bench/mirror: prints, as JSON, seconds to the first answer, the median round trip of a call over one
connection, and the resident set with so many disks, KiB.

small.py RESILVER RUN_DIR MEMORY_DIR SERVER_CORE CLIENT_CORE
"""

import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import time

resilver, run_dir, memory_dir, server_core, client_core = sys.argv[1:]
ROUND_TRIPS = 1000
DISKS = 64
path = f"{run_dir}/small.rpc"


class Target:
    """A target and one connection to it."""

    def __init__(self):
        arguments = [resilver, "serve", "--rpc-socket", path, "--vhost-dir", f"{run_dir}/small", "--cores", server_core]
        with open(f"{run_dir}/small.log", "wb") as log:
            begun = time.perf_counter()
            self.process = subprocess.Popen(arguments, stdout=log, stderr=log)
        while True:
            try:
                self.connection = socket.socket(socket.AF_UNIX)
                self.connection.connect(path)
                break
            except OSError:
                self.connection.close()
                if self.process.poll() is not None or time.perf_counter() - begun > 20:
                    sys.exit("the target does not answer; see " + f"{run_dir}/small.log")
                time.sleep(0.0005)
        self.call("rpc_get_methods")
        self.first_answer = time.perf_counter() - begun

    def call(self, method, **params):
        request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        self.connection.sendall(json.dumps(request).encode())
        answer = b""
        while True:
            answer += self.connection.recv(1 << 20) or sys.exit(f"{method}: the target has hung up")
            try:
                answer = json.loads(answer)
            except ValueError:
                continue
            return answer["result"] if "result" in answer else sys.exit(f"{method}: {answer['error']}")

    def resident(self):
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))

    def end(self):
        self.connection.close()
        self.process.terminate()
        self.process.wait()


def serve(target, count, make):
    for at in range(count):
        make(target, f"d{at}")
        target.call("vhost_create_blk_controller", ctrlr=f"d{at}", dev_name=f"d{at}")


def null(target, name):
    target.call("bdev_null_create", name=name, num_blocks=1 << 21, block_size=512)


def file(target, name):
    where = f"{memory_dir}/{name}.small"
    with open(where, "wb") as made:
        made.truncate(1 << 30)
    target.call("bdev_uring_create", name=name, filename=where, block_size=512)


os.sched_setaffinity(0, {int(client_core)})
found = {}
target = Target()
found["first_answer"] = target.first_answer
found["resident_idle"] = target.resident()
serve(target, 1, null)
found["resident_null"] = target.resident()
trips = []
for _ in range(ROUND_TRIPS):
    begun = time.perf_counter()
    target.call("bdev_get_bdevs", name="d0")
    trips.append(time.perf_counter() - begun)
found["round_trip"] = statistics.median(trips)
target.end()
for kind in (null, file):
    target = Target()
    serve(target, DISKS, kind)
    found[f"resident_{DISKS}_{kind.__name__}"] = target.resident()
    target.end()
print(json.dumps(found))
