"""The targets of a run as a table in Markdown, with the machine and the versions."""

import shutil
import subprocess

from benchmarks import measure

PEERS = ("runc", "crun", "bwrap", "containerd")
# What has no target and is to be reported: (bench, rows whose name begins so).
REPORTED = {
    "process": ("sandboxfs run", "python3", "runc", "crun", "bwrap"),
    "warm": ("Sandbox", "Pool", "subprocess"),
}


def write(path, reports):
    """Write the table to a file."""
    machine = measure.machine()
    lines = [
        f"Linux {machine['kernel']}, {machine['cpus']} processors, Python {machine['python']}; "
        + ", ".join(filter(None, map(version, PEERS)))
        + ". Medians of interleaved rounds; a ratio is the median of the rounds' own ratios.", "",
        "| what | measured | target | |", "|---|---|---|---|",
    ]
    for report in reports:
        for entry in report.targets:
            word = "met" if entry["met"] else "**missed**"
            numbers = f"{entry['value']:.2f} | {entry['at_most']}"
            lines.append(f"| {entry['target']} | {numbers} | {word} |")
    lines += ["", "| time | median | quartiles |", "|---|---|---|"]
    for report in reports:
        wanted = REPORTED.get(report.name, ())
        for name, row in report.rows.items():
            if name.startswith(wanted):
                quartiles = f"{measure.shown(row['lower'])} … {measure.shown(row['upper'])}"
                lines.append(f"| {name} | {measure.shown(row['median'])} | {quartiles} |")
    values = [(name, each) for report in reports for name, each in report.values.items()]
    if values:
        lines += ["", "| reported | |", "|---|---|"]
        lines += [f"| {name} | {', '.join(f'{value:,} {unit}' for unit, value in each.items())} |"
                  for name, each in values]
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


def version(program):
    """Return the name and version of a program, or None where there is none."""
    found = shutil.which(program, path="/usr/sbin:/usr/bin")
    if found is None:
        return None
    words = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    numbers = [word for word in words.split() if word[:1].isdigit()]
    return f"{program} {numbers[0].split('+')[0].split('~')[0]}" if numbers else program
