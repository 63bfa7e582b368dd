"""The picture of a run: one panel a bench, medians as bars, quartiles as whiskers."""

from benchmarks import measure

OURS = ("sandboxfs", "build", "Sandbox", "Pool", "hook", "parse", "plan", "drop")
COLOURS = {True: "#1f6f8b", False: "#b8b8b8"}


def draw(path, reports):
    """Write the picture to `path`; its ending says which format."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install sandboxfs[bench]") from None
    mpl.use("Agg")
    mpl.rcParams["svg.fonttype"] = "none"
    mpl.rcParams["svg.hashsalt"] = "sandboxfs"
    from matplotlib import pyplot as plt

    reports = [report for report in reports if report.rows]
    heights = [len(report.rows) + 2 for report in reports]
    figure, panels = plt.subplots(
        len(reports), 1, figsize=(9, 0.28 * sum(heights) + 0.6), squeeze=False,
        gridspec_kw={"height_ratios": heights}, layout="constrained",
    )
    for report, (panel,) in zip(reports, panels, strict=True):
        _bars(panel, report)
    machine = measure.machine()
    figure.suptitle(f"Linux {machine['kernel']}, {machine['cpus']} processors, Python "
                    f"{machine['python']}", fontsize=9)
    figure.savefig(path)
    plt.close(figure)


def _bars(panel, report):
    names = list(report.rows)
    rows = [report.rows[name] for name in names]
    medians = [row["median"] / 1e6 for row in rows]
    whiskers = [
        [(row["median"] - row["lower"]) / 1e6 for row in rows],
        [(row["upper"] - row["median"]) / 1e6 for row in rows],
    ]
    colours = [COLOURS[name.removeprefix("with cgroups: ").startswith(OURS)] for name in names]
    panel.barh(range(len(names)), medians, xerr=whiskers, color=colours, height=0.7,
               error_kw={"elinewidth": 0.8})
    panel.set_yticks(range(len(names)), names, fontsize=7)
    panel.invert_yaxis()
    panel.set_title(report.title, fontsize=9, loc="left")
    panel.set_xlabel("ms", fontsize=7)
    panel.tick_params(axis="x", labelsize=7)
    if max(medians) > 30 * min(medians):
        panel.set_xscale("log")
