"""The report of scripts/bench/mirror: what was measured, the bar, and whether it is met. Medians of the rounds.

bars.py --table|--json DIR COMMAND VERSION

DIR has measured.jsonl, one line for each thing that was measured; mirror.md and mirror.json are written beside it.
"""

import json
import pathlib
import statistics
import sys

form, directory, command, version = sys.argv[1:]
directory = pathlib.Path(directory)
# In memory a mirrored write costs a core more than twice one write, whoever does it: what peers keep is the bar there.
PEERS_IN_SYNC = {1: 0.56, 32: 0.47}
# How long what a start or a switch-over does to the guest may show, seconds.
AFTERMATH = 0.05


class Row:
    """One line of the table: some figures, each with its bar."""

    def __init__(self, what):
        self.what = what
        self.figures = []

    def add(self, name, values, bar, bound, unit="", digits=2):
        """`bar` is "least", "most" or None for what is only told."""
        values = [value for value in values if value is not None]
        if not values:
            return
        median = statistics.median(values)
        met = {None: None, "least": median >= bound if bound is not None else None,
               "most": median <= bound if bound is not None else None}[bar]
        self.figures.append({"name": name, "median": median, "min": min(values), "max": max(values), "rounds": len(values),
                             "bar": bar, "bound": bound, "unit": unit, "met": met, "digits": digits})

    def met(self):
        judged = [figure["met"] for figure in self.figures if figure["met"] is not None]
        return all(judged) if judged else None

    def cells(self):
        told = [f"{it['name']} {it['median']:.{it['digits']}f}{it['unit']}" for it in self.figures]
        sign = {"least": "≥", "most": "≤"}
        bars = [f"{sign[it['bar']]} {it['bound']:.{it['digits']}f}{it['unit']}" if it["bar"] else "–" for it in self.figures]
        missed = [it["name"] for it in self.figures if it["met"] is False]
        verdict = {True: "yes", False: "no: " + ", ".join(missed), None: "–"}[self.met()]
        return [self.what, ", ".join(told), ", ".join(bars), verdict]

    def to_json(self):
        return {"what": self.what, "met": self.met(), "figures": self.figures}


def phase(life, name):
    return next(it for it in life["phases"] if it["phase"] == name)


def latency(life, name, which):
    return phase(life, name)["latency_ns"][which]


def ends(life):
    """When each phase ended, seconds from the beginning."""
    at, found = 0, {}
    for it in life["phases"]:
        at += it["seconds"]
        found[it["phase"]] = at
    return found


def longest(life, begin, end):
    """The longest latency of what ended in a stretch, nanoseconds."""
    width = life["slice_seconds"]
    slices = life["slices_requests_and_longest_ns"][int(begin / width) : int(end / width) + 1]
    return max((slice[1] for slice in slices), default=0)


def stall(life, at, until, as_in):
    """How much longer than usual a request took there, milliseconds: beyond the median, over stretches as long of the phase `as_in`,
    of the longest."""
    length, end = until + AFTERMATH - at, ends(life)[as_in]
    usual, begin = [], end - phase(life, as_in)["seconds"]
    while begin + length <= end:
        usual.append(longest(life, begin, begin + length))
        begin += length
    if not usual:
        return None
    return max(0, longest(life, at, until + AFTERMATH) - statistics.median(usual)) / 1e6


def seconds(life):
    return life["job"]["ready"] - life["job"]["started"]


def copy_share(it):
    """The copy's rate under load, as a share of that alone."""
    life, total = it["life"], it["life"]["job"]["total_bytes"]
    return (life["job"]["copied_bytes"] / seconds(life)) / (total / it["alone"])


def kept(life):
    return phase(life, "copying")["iops"] / phase(life, "before")["iops"]


def times(life, which):
    return latency(life, "copying", which) / latency(life, "before", which)


def beyond(life):
    return (latency(life, "copying", "max") - latency(life, "before", "max")) / 1e6


def of_lives(row, lives):
    """What every copy under load shows."""
    row.add("IOPS before", [phase(it["life"], "before")["iops"] / 1000 for it in lives], None, None, "k", 1)


def writes(key, lives):
    place, mode, depth = key
    row = Row(f"writes while copying, {place}, {mode}, depth {depth}")
    of_lives(row, lives)
    row.add("kept", [kept(it["life"]) for it in lives], "least", 0.6)
    row.add("p99", [times(it["life"], "p99") for it in lives], "most", 2, "×", 1)
    row.add("longest", [beyond(it["life"]) for it in lives], "most", 5, " ms more", 1)
    row.add("copy rate", [copy_share(it) for it in lives], "least", 0.3)
    row.add("READY", [seconds(it["life"]) / it["alone"] for it in lives], "most", 4, "×", 1)
    yield row
    if depth == 32:
        row = Row(f"stall, {place}, {mode}, depth {depth}")
        end = [ends(it["life"]) for it in lives]
        start = [stall(it["life"], at["before"], at["before"], "before") for it, at in zip(lives, end)]
        row.add("at the start", start, "most", 1, " ms")
        # What is in flight then goes to both legs.
        switch = [stall(it["life"], at["in sync"], at["switching"], "in sync") for it, at in zip(lives, end)]
        row.add("at the switch-over", switch, "most", 1, " ms")
        yield row


def reads(key, lives):
    place, _, depth = key
    row = Row(f"reads while copying, {place}, depth {depth}")
    of_lives(row, lives)
    row.add("kept", [kept(it["life"]) for it in lives], None, None)
    row.add("p99", [times(it["life"], "p99") for it in lives], "most", 1.2, "×")
    row.add("copy rate", [copy_share(it) for it in lives], None, None)
    yield row


def ceiling(key, lives):
    place, _, depth = key
    row = Row(f"writes under a ceiling, {place}, depth {depth}")
    of_lives(row, lives)
    held = [latency(it["life"], "copying", "p99") / 1000 / it["ceiling_us"] for it in lives]
    row.add("p99 of the ceiling", held, "most", 1, "×")
    row.add("copy rate", [copy_share(it) for it in lives], None, None)
    yield row


def in_sync(place, rounds):
    memory = place in ("tmpfs", "malloc")
    for cell in range(len(rounds[0]["bench"]["cells"])):
        cells = [it["bench"]["cells"][cell] for it in rounds]
        depth = cells[0]["iodepth"]
        alone, both = ([it["targets"][which]["runs"][0] for it in cells] for which in (0, 1))
        row = Row(f"writes in sync, {place}, depth {depth}")
        row.add("IOPS of one leg", [run["iops"] / 1000 for run in alone], None, None, "k", 1)
        kept_of_one = [theirs["iops"] / ours["iops"] for ours, theirs in zip(alone, both)]
        row.add("kept", kept_of_one, "least", PEERS_IN_SYNC[depth] if memory else 1 / 1.15)
        p50 = [theirs["p50_ns"] / ours["p50_ns"] for ours, theirs in zip(alone, both)]
        row.add("p50", p50, None if memory else "most", None if memory else 1.15, "×")
        if memory:
            row.add("of the bare loop", [run["iops"] / it["loop"] for run, it in zip(both, rounds)], "least", 0.9)
        yield row


def copy(place, rounds):
    row = Row(f"copy, nobody at work, {place}")
    row.add("seconds", [it["ours"] for it in rounds], None, None, " s")
    # Speed beside theirs: their time by ours.
    row.add("of dd", [it["dd"] / it["ours"] for it in rounds], "least", 0.9)
    row.add("of qemu-img", [it["qemu"] / it["ours"] for it in rounds if it["qemu"]], "least", 1)
    yield row


def sparse(place, rounds):
    row = Row(f"sparse copy, {place}")
    row.add("seconds", [it["seconds"] for it in rounds], None, None, " s")
    row.add("of its data alone", [it["seconds"] / it["full"] for it in rounds], "most", 1.5, "×")
    row.add("allocated", [it["target_blocks"] / it["source_blocks"] for it in rounds], "most", 1.01, "×")
    yield row


def small(rounds):
    row = Row("a target")
    row.add("first answer", [it["first_answer"] * 1000 for it in rounds], "most", 100, " ms", 0)
    row.add("RPC", [it["round_trip"] * 1000 for it in rounds], "most", 1, " ms", 3)
    for name, words in [("idle", "no disk"), ("null", "a null disk"), ("64_null", "64 null disks"), ("64_file", "64 files")]:
        values = [it[f"resident_{name}"] / 1024 for it in rounds]
        row.add(f"resident with {words}", values, "most" if name in ("idle", "null") else None,
                15 if name in ("idle", "null") else None, " MiB", 1)
    yield row


def grouped(lines, key):
    found = {}
    for line in lines:
        found.setdefault(key(line), []).append(line)
    return found.items()


lines = [json.loads(line) for line in (directory / "measured.jsonl").read_text().splitlines()]
by_part = dict(grouped(lines, lambda it: it["part"]))
rows = []
for name, rows_of in (("writes", writes), ("reads", reads), ("ceiling", ceiling)):
    for key, lives in grouped(by_part.get(name, []), lambda it: (it["place"], it["mode"], it["life"]["iodepth"])):
        rows.extend(rows_of(key, lives))
for name, rows_of in (("copy", copy), ("sparse", sparse)):
    for place, rounds in grouped(by_part.get(name, []), lambda it: it["place"]):
        rows.extend(rows_of(place, rounds))
for place, rounds in grouped(by_part.get("sync", []), lambda it: it["place"]):
    rows.extend(in_sync(place, rounds))
if "small" in by_part:
    rows.extend(small(by_part["small"]))

machines = [it["life"]["machine"] for it in lines if "life" in it] + [it["bench"]["machine"] for it in lines if "bench" in it]
busy = sum(it["busy"] for it in machines)
told = {key: statistics.median(it[key] for it in machines) for key in ("foreign_cpus", "waited", "stolen_cpus")} if machines else {}
machine = f"In {busy} of {len(machines)} runs under load the machine was busy" + (
    ": in the median others used {foreign_cpus:.2f} CPUs, client and server waited for a core {waited:.1%} of the time, {stolen_cpus:.1%} "
    "of a CPU was stolen.".format(**told) if machines else ".")
table = ["| what | measured | bar | met |", "| --- | --- | --- | --- |"]
table += ["| " + " | ".join(row.cells()) + " |" for row in rows]
text = "\n".join([f"{version}, `{command}`", "", *table, "", machine]) + "\n"
report = {"version": version, "command": command, "rows": [row.to_json() for row in rows], "busy_runs": busy, "runs": len(machines),
          "machine": told}
(directory / "mirror.md").write_text(text)
(directory / "mirror.json").write_text(json.dumps(report, indent=1) + "\n")
print(json.dumps(report, indent=1) if form == "--json" else text, end="")
