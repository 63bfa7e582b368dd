"""The bundle that is measured: busybox and the spec that containerd gives a container."""

import json
import os
import shutil
from pathlib import Path

CAPABILITIES = [
    "CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL",
    "CAP_MKNOD", "CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID",
    "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
]
MASKED_PATHS = [
    "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
    "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi",
]
READONLY_PATHS = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
NO_ESCAPE = ["nosuid", "noexec", "nodev"]
CGROUP_MOUNT = ("/sys/fs/cgroup", "cgroup", "cgroup", [*NO_ESCAPE, "relatime", "ro"])


def mounts():
    """Return the seven mounts of containerd's default spec."""
    entries = [
        ("/proc", "proc", "proc", NO_ESCAPE),
        ("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
        ("/dev/pts", "devpts", "devpts",
         ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
        ("/dev/shm", "tmpfs", "shm", [*NO_ESCAPE, "mode=1777", "size=65536k"]),
        ("/dev/mqueue", "mqueue", "mqueue", NO_ESCAPE),
        ("/sys", "sysfs", "sysfs", [*NO_ESCAPE, "ro"]),
        ("/run", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
    ]
    return [entry(*words) for words in entries]


def entry(destination, type, source, options):
    """Return one entry of `mounts`."""
    return {"destination": destination, "type": type, "source": source, "options": options}


def document(extra_mounts=()):
    """Return the whole spec, with further mounts at the end."""
    return {
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs"},
        "process": {
            "args": ["/bin/true"], "cwd": "/", "env": ["PATH=/bin"], "noNewPrivileges": True,
            "user": {"uid": 0, "gid": 0},
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), CAPABILITIES),
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
        },
        "mounts": [*mounts(), *extra_mounts],
        "linux": {
            "namespaces": [
                {"type": type} for type in ("pid", "ipc", "uts", "mount", "network")
            ],
            "maskedPaths": MASKED_PATHS,
            "readonlyPaths": READONLY_PATHS,
        },
    }


def document_with_cgroups():
    """Return the spec with a cgroup mount below /sys, in a new cgroup namespace."""
    content = document()
    after_sys = [mount["destination"] for mount in content["mounts"]].index("/sys") + 1
    content["mounts"].insert(after_sys, entry(*CGROUP_MOUNT))
    content["linux"]["namespaces"].append({"type": "cgroup"})
    return content


def make(path, extra_mounts=()):
    """Make a bundle at `path` (a directory that doesn't exist yet); returns it as `Path`."""
    path = Path(path)
    rootfs = path / "rootfs"
    for name in ("bin", "dev", "etc", "proc", "run", "sys", "tmp"):
        (rootfs / name).mkdir(parents=True)
    (rootfs / "tmp").chmod(0o1777)
    busybox = shutil.which("busybox")
    if busybox is None:
        raise SystemExit("the benchmarks need busybox-static")
    shutil.copy2(busybox, rootfs / "bin" / "busybox")
    for applet in ("sh", "true"):
        os.symlink("busybox", rootfs / "bin" / applet)
    write(path, document(extra_mounts))
    return path


def write(path, content):
    """Write config.json."""
    (Path(path) / "config.json").write_text(json.dumps(content), encoding="utf-8")


def binds(directory, count):
    """Make `count` directories below `directory`; return mounts that bind them on /data/N."""
    entries = []
    for number in range(count):
        source = Path(directory) / f"{number}"
        source.mkdir(parents=True, exist_ok=True)
        entries.append(
            entry(f"/data/{number}", "bind", str(source), ["rbind", "rprivate", "nosuid"])
        )
    return entries
