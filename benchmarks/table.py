"""Writes the tables of `benchmarks/README.md` from `benchmarks/results/`, between the two comments of each.

Those of `peers.py` come from `peers.json`, those of `gpu.py` from the lines of JSON in `gpu/`, the other figures from
the file of the script that measured them; a file that is missing leaves its figures out.

python benchmarks/table.py
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

from common import interval

HERE = Path(__file__).parent
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
GPU_BEGIN, GPU_END = "<!-- gpu: begin -->", "<!-- gpu: end -->"
FIGURES_BEGIN, FIGURES_END = "<!-- figures: begin -->", "<!-- figures: end -->"
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}  # dense bf16, per second
Cell = dict[str, Any]
Samples = dict[str, Any]


def is_void(samples: Samples) -> bool:
    """Whether the last test losses are not those of the reference: to 5 %, or 3 of its standard deviations."""
    own, reference = samples["test_loss"]["own"], samples["test_loss"]["reference"]
    expected = statistics.mean(reference)
    spread = statistics.stdev(reference) if len(reference) > 1 else 0.0
    return not abs(statistics.mean(own) - expected) <= max(0.05 * abs(expected), 3 * spread)


def ratios(samples: Samples, what: str = "seconds_per_epoch") -> list[float]:
    return [own / other for own, other in zip(samples[what]["own"], samples[what]["reference"], strict=True)]


def median_ratio(samples: Samples) -> str:
    return "void" if is_void(samples) else f"{statistics.median(ratios(samples)):.2f}"


def row(cell: Cell, name: str) -> dict[str, str]:
    """Return what the table of a cell says of a contender, by heading."""
    samples = cell["contenders"][name]
    every = ratios(samples)
    low, high = interval(every)
    seconds = statistics.median(samples["seconds_per_epoch"]["own"])
    told = {
        cell["data"]: name,
        "ratio [95 %]": f"{median_ratio(samples)} [{low:.2f}, {high:.2f}]",
        "range": f"{min(every):.2f} to {max(every):.2f}",
        "s per epoch": f"{seconds:.3f}",
        f"{cell['unit']} / s": f"{cell['units_per_epoch'] / seconds:,.0f}",
        "test loss": f"{statistics.mean(samples['test_loss']['own']):.4f}",
    }
    if is_void(samples):
        told |= dict.fromkeys(("ratio [95 %]", "range", "s per epoch", f"{cell['unit']} / s"), "void")
    elif cell["flops_per_epoch"]:
        peak = next((peak for card, peak in PEAKS.items() if card in cell["device"]), None)
        told["MFU"] = "MFU unknown" if peak is None else f"{cell['flops_per_epoch'] / seconds / peak:.1%}"
    if "peak_device_mib" in samples:
        memory = statistics.median(ratios(samples, "peak_device_mib"))
        told["peak GPU memory"] = f"{memory:.2f}"
    if "peak_memory_mib" in samples:
        memory = statistics.median(samples["peak_memory_mib"])
        of_reference = statistics.median(cell["contenders"][cell["reference"]].get("peak_memory_mib", [math.nan]))
        told["peak memory"] = f"{memory / of_reference:.2f}"
    if "startup_seconds" in samples:
        startups = samples["startup_seconds"]
        told["start-up, s"] = f"{statistics.median(startups):.1f} ({min(startups):.1f} to {max(startups):.1f})"
    return told


def to_the_limit(cell: Cell) -> str:
    """Return the ratio of accel_trainer to whole-batch slices, by way of the reference, with its interval."""
    own, limit = (cell["contenders"].get(name) for name in ("accel_trainer", "whole-batch slices"))
    if own is None or limit is None or is_void(own) or is_void(limit):
        return ""
    own_ratios, limit_ratios, draw = ratios(own), ratios(limit), random.Random(0)
    quotients = sorted(
        statistics.median(draw.choices(own_ratios, k=len(own_ratios)))
        / statistics.median(draw.choices(limit_ratios, k=len(limit_ratios)))
        for _ in range(2000)
    )
    return f"{statistics.median(quotients):.2f} [{quotients[50]:.2f}, {quotients[1949]:.2f}]"


def markdown(rows: list[dict[str, str]]) -> str:
    """Return rows as a table; a heading is there if any row has it."""
    headings = list(dict.fromkeys(heading for one in rows for heading in one))
    lines = [headings, ["---"] * len(headings), *([one.get(heading, "") for heading in headings] for one in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell_table(cell: Cell) -> str:
    epochs = "1 epoch" if cell["num_epochs"] == 1 else f"{cell['num_epochs']} epochs"
    title = f"#### {cell['workload']}, {cell['data']} ({epochs} of {cell['rows']:,} rows)"
    return f"{title}\n\n{markdown([row(cell, name) for name in cell['contenders']])}\n"


def overview(cells: list[Cell]) -> str:
    """Return the median ratios of all cells, a row per contender."""
    names = list(dict.fromkeys(name for cell in cells for name in cell["contenders"]))
    rows = [{"median ratio": name} for name in names]
    for cell in cells:
        for name, one in zip(names, rows, strict=True):
            found = cell["contenders"].get(name)
            one[f"{cell['workload']}, {cell['data']}"] = median_ratio(found) if found else ""
    limits = {f"{cell['workload']}, {cell['data']}": to_the_limit(cell) for cell in cells}
    if any(limits.values()):
        rows.append({"median ratio": "accel_trainer to the slices [95 %]"} | limits)
    return markdown(rows) + "\n"


def tables(results: dict[str, Cell]) -> str:
    """Return all tables, by device and number of processes."""
    groups: dict[str, list[Cell]] = {}
    for cell in results.values():
        processes = "1 process" if cell["processes"] == 1 else f"{cell['processes']} processes"
        size = ", small: a smoke test" if cell["small"] else ""
        groups.setdefault(f"### {cell['device']}, {processes}{size}", []).append(cell)
    parts = []
    for heading, cells in groups.items():
        where = {
            f"Python {cell['machine']['python']}, {cell['machine']['cpus']} CPU cores, "
            + ", ".join(f"{name} {version}" for name, version in cell["versions"].items())
            for cell in cells
        }
        parts += [f"{heading}\n", *(f"{line}.\n" for line in sorted(where))]
        parts += [overview(cells)] if len(cells) > 1 else []
        parts += [cell_table(cell) for cell in cells]
    return "\n".join(parts)


# --- what gpu.py has found --------------------------------------------------------------------------------------------


def findings(folder: Path) -> list[dict[str, Any]]:
    """Return what `gpu.py` has found, in order."""
    lines = [line for name in ("first", "second") for line in _lines(folder / f"{name}.jsonl")]
    return [json.loads(line) for line in lines]


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def gpu_tables(found: list[dict[str, Any]]) -> str:
    """Return what was found on a GPU: what is right or wrong, and the times."""
    if not found:
        return "No GPU has been asked yet: `python benchmarks/gpu.py first` and `second`.\n"
    machine = next((one for one in found if one["name"] == "machine"), {})
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    where = f"{machine.get('gpu') or 'CPU'}, Python {machine.get('python')}, {versions}."
    ratios = [f"- {one['name']}: {_spread(one['ratios'], 3)}" for one in found if "ratios" in one]
    return "\n".join([where, "", markdown(_answers(found)), "", markdown(_times(found)), "", *ratios]) + "\n"


def _answers(found: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return a row for each part: how much is right, and what is not."""
    by_part: dict[str, list[dict[str, Any]]] = {}
    for one in found:
        if one.get("right") is not None:
            by_part.setdefault(one["part"], []).append(one)
    rows = []
    for part, own in by_part.items():
        wrong = [f"{one['name']} ({one.get('error') or one.get('found')})" for one in own if not one["right"]]
        rows.append({"part": part, "right": f"{len(own) - len(wrong)} of {len(own)}", "not right": "; ".join(wrong)})
    return rows


def _times(found: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return a row for each task and trainer."""
    steps: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in found:
        if "step_ms" in one:
            task = one["name"] + (f", cut in {one['cut']}" if "cut" in one else "")
            steps.setdefault((task, one["who"]), []).append(one)
    return [
        {
            "task": task,
            "who": who,
            "ms per step": _spread([one["step_ms"] for one in own], 1),
            "first step, s": f"{own[0]['first_step_s']:.1f}",
            "peak MiB": f"{own[-1]['peak_mib']:,}",
        }
        for (task, who), own in steps.items()
    ]


def _spread(numbers: list[float], digits: int) -> str:
    return f"{statistics.median(numbers):.{digits}f} ({min(numbers):.{digits}f} to {max(numbers):.{digits}f})"


# --- the other figures ------------------------------------------------------------------------------------------------


def figures(folder: Path) -> str:
    """Return what the other scripts have measured, a part for each file of results that is there."""
    parts = {
        "overhead.json": _overhead,
        "parity_cost.json": _parity_cost,
        "checkpoint.json": _checkpoint,
        "data.json": _data,
        "streams.json": _streams,
        "sharding.json": _sharding,
        "steady.json": _steady,
        "startup.json": _startup,
        "torture.json": _torture,
    }
    there = {name: tell for name, tell in parts.items() if (folder / name).exists()}
    return "\n".join(tell(json.loads((folder / name).read_text())) for name, tell in there.items())


def _heading(title: str, name: str, found: dict[str, Any]) -> str:
    machine, versions = found["machine"], found.get("versions") or found["machine"]["versions"]
    cpus = machine.get("cpus") or machine["cpu_count"]
    told = ", ".join(f"{name} {versions[name]}" for name in ("torch", "accelerate", "accel_trainer"))
    return f"### {title}\n\nPython {machine['python']}, {cpus} CPU cores, {told}: [{name}](results/{name}).\n"


def _with_interval(found: dict[str, Any], digits: int = 2) -> str:
    median = found["median"] if "median" in found else found["ratio"]
    low, high = found["interval"]
    return f"{median:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _overhead(found: dict[str, Any]) -> str:
    rows = [
        {"median ratio to a hand-written loop [95 %]": name}
        | {workload: _with_interval(one["ratios"][name]) for workload, one in found["results"].items()}
        for name in next(iter(found["results"].values()))["ratios"]
    ]
    return f"{_heading('Seconds per epoch, without start and end', 'overhead.json', found)}\n{markdown(rows)}\n"


def _parity_cost(found: dict[str, Any]) -> str:
    rows: dict[str, dict[str, str]] = {}
    for case, one in found["results"].items():
        workload, number = case.split(", ")
        processes = "1 process" if number == "1 processes" else number
        rows.setdefault(workload, {"seconds per epoch, bitwise to default [95 %]": workload})
        rows[workload][processes] = _with_interval(one["ratio"])
        sent = one.get("bytes_sent_per_step")
        told = "0" if sent is None else _bytes_sent(sent)
        name = f"{workload}, bytes per step"
        rows.setdefault(name, {"seconds per epoch, bitwise to default [95 %]": f"{workload}: bytes sent per step"})
        rows[name][processes] = told
    heading = _heading("What `bitwise=True` costs", "parity_cost.json", found)
    how = (
        "At the same number of micro-batches; a CNN of 21 k parameters and a transformer of 0.2 M parameters, "
        "batch 64 = 8 x 8,\none thread per process. Communication does not overlap with the backward, which is what "
        "several processes pay for.\n"
    )
    return f"{heading}\n{how}\n{markdown(list(rows.values()))}\n"


def _bytes_sent(sent: list[dict[str, float]]) -> str:
    most = max(one["all_to_all_single"] + one["all_gather"] for one in sent)
    return f"{most:,.0f} ({most / sent[0]['gradients']:.2f} x the gradients)"


def _checkpoint(found: dict[str, Any]) -> str:
    saves, positions = found["results"]["saves"], found["results"]["positions"]
    return (
        f"{_heading('Checkpoints', 'checkpoint.json', found)}\n"
        f"- With {saves['parameters'] / 1e6:.0f} million parameters and AdamW on the CPU the training waits for "
        f"{_with_interval(saves, 3)} of the time of a\n  plain `save_file` and fsync of the same bytes; the first save "
        f"takes {saves['seconds_of_first_save']:.2f} s.\n"
        f"- In a pass over {positions['samples']:,} shuffled samples the time to the first micro-batch, compared with "
        f"that at the start, is\n  {positions['ratio_of_middle']:.2f} when going on from the middle and "
        f"{positions['ratio_of_end']:.2f} from the end.\n" + _memory(found["results"].get("memory"))
    )


def _memory(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    sizes = {kind: [one["Pss"] / 2**30 for one in own] for kind, own in found["peak_bytes"].items()}
    (main, other), (main_resumed, other_resumed) = sizes["from_the_start"], sizes["resumed"]
    return (
        f"- Two processes that train that model on one host take at most {main:.2f} GiB (the main one, with the copy "
        f"that it\n  writes) and {other:.2f} GiB from the start; {main_resumed:.2f} and {other_resumed:.2f} GiB when "
        f"they go on from a checkpoint\n  of {found['checkpoint_bytes'] / 2**30:.2f} GiB.\n"
    )


def _data(found: dict[str, Any]) -> str:
    results = found["results"]
    rows = [
        {
            f"{results['rows']:,} images in a memory-mapped table": name,
            "samples / s": f"{statistics.median(every):,.0f}",
            "ratio to a plain `DataLoader` [95 %]": _with_interval(results[name], 1) if name in results else "1",
        }
        for name, every in results["samples_per_second"].items()
    ]
    return f"{_heading('Samples per second from a `datasets.Dataset`', 'data.json', found)}\n{markdown(rows)}\n"


def _sharding(found: dict[str, Any]) -> str:
    results = found["results"]
    of_steps = {name.removeprefix("steps, "): one for name, one in results.items() if name.startswith("steps, ")}
    rows = [
        {"seconds per step, ratio to `fully_shard` by hand [95 %]": _named(name)}
        | {contender: _with_interval(one, 3) for contender, one in contenders.items() if "hand" not in contender}
        for name, contenders in of_steps.items()
    ]
    memory, files = results["memory"], results["files"]["seconds"]
    peaks = memory["peak_mib"]
    number, size = results["files"]["num_processes"], results["files"]["width"] ** 2 * results["files"]["num_blocks"]
    told = (
        f"\n- {memory['millions']:.0f} million parameters, AdamW, {memory['num_processes']} processes: a process takes "
        f"at most\n  {peaks['ours']:,.0f} MiB more than before the model, with DDP {peaks['DDP']:,.0f}: ratio "
        f"{memory['ratio']:.2f}.\n- A checkpoint of {12 * 8 * size / 2**20:,.0f} MiB on {number} processes is saved in "
        f"{_spread(files['save, ours'], 2)} s, with checksums,\n  which torch's own (DCP, "
        f"{_spread(files['save, DCP'], 2)} s) leaves out; it is verified and\n  loaded in "
        f"{_spread(files['load, ours'], 2)} s (DCP {_spread(files['load, DCP'], 2)} s)."
    )
    return f"{_heading('A divided model', 'sharding.json', found)}\n{markdown(rows)}\n{told}\n"


def _named(part: str) -> str:
    return part.replace("1 each", "1 micro-batch each").replace("2 each", "2 micro-batches each")


def _streams(found: dict[str, Any]) -> str:
    results = found["results"]
    rows = [
        {
            f"{results['samples']:,} samples in {results['files']} Parquet files": name,
            "samples / s": f"{statistics.median(every):,.0f}",
            "ratio to `datasets` alone [95 %]": _with_interval(results["ratios"][name], 2),
        }
        for name, every in results["samples_per_second"].items()
    ]
    return f"{_heading('Samples per second from a stream', 'streams.json', found)}\n{markdown(rows)}\n"


def _steady(found: dict[str, Any]) -> str:
    rows = [
        {
            "100,000 steps": name,
            "last tenth of the steps to the first [95 %]": _with_interval(one["last_tenth_to_first"]),
            "growth of memory, MiB": _spread([each["grown_mebibytes"] for each in one["rounds"]], 2),
        }
        for name, one in found["results"].items()
    ]
    return f"{_heading('Time per step and memory over a long run', 'steady.json', found)}\n{markdown(rows)}\n"


def _startup(found: dict[str, Any]) -> str:
    rows = [
        {
            "fresh process": f"`{name}`" if name.startswith(("import", "from", "python")) else name,
            "seconds": f"{statistics.median(one['seconds']):.2f}",
            "ratio to `import accelerate` [95 %]": _with_interval(one),
        }
        for name, one in found["results"].items()
    ]
    return f"{_heading('Start-up', 'startup.json', found)}\n{markdown(rows)}\n"


def _torture(found: dict[str, Any]) -> str:
    rows = [
        {
            "run": "bitwise" if one["bitwise"] else "default",
            "epochs": str(one["epochs"]),
            "kills": str(sum(one["kills"].values())),
            "damaged checkpoints": str(one["damaged_checkpoints"]),
            "greatest relative difference": f"{one['greatest_relative_difference']:.2g}",
        }
        for one in found["runs"]
    ]
    kills = sum(int(one["kills"]) for one in rows)
    return f"{_heading(f'{kills} random kills', 'torture.json', found)}\n{markdown(rows)}\n"


def between(text: str, begin: str, end: str, inner: str) -> str:
    """Return a text with something else between two comments."""
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{inner}\n{end}{rest.split(end)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results", help="default: %(default)s")
    parser.add_argument("--readme", type=Path, default=HERE / "README.md", help="default: %(default)s")
    options = parser.parse_args()
    results = json.loads((options.results / "peers.json").read_text())["results"]
    text = between(options.readme.read_text(), BEGIN, END, tables(results))
    text = between(text, GPU_BEGIN, GPU_END, gpu_tables(findings(options.results / "gpu")))
    text = between(text, FIGURES_BEGIN, FIGURES_END, figures(options.results))
    options.readme.write_text(text)


if __name__ == "__main__":
    main()
