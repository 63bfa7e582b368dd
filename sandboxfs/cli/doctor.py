"""``sandboxfs doctor``: what this kernel and user can do, and what each missing piece costs."""

import json
import os
import sys

from sandboxfs.errors import shown
from sandboxfs.kernel.features import Features
from sandboxfs.kernel.probe import NOT_TRIED

# (name in Features, what it is, what is lost without it), in the order of their weight.
TABLE = (
    ("mount_namespace", "mount namespaces",
     ("Nothing can be built: a container needs a mount namespace of its own, and this user may "
      "make neither one nor a user namespace for it.")),
    ("mount_setattr", "mount_setattr, fsopen (5.12)",
     ("Nothing can be built: this kernel lacks the mount calls, or a policy (seccomp, an LSM) "
      "forbids them.")),
    ("openat2", "openat2",
     "Nothing can be built: paths inside a root can't be resolved safely."),
    ("pivot_root", "pivot_root",
     ("run can't enter a root from here: / is an initramfs (leave it with switch-root), or this "
      "process is chrooted.")),
    ("clone3", "clone3", "run can't start the payload in its namespaces."),
    ("pidfd", "pidfd",
     ("run can't make a user namespace as root or move network devices, and the library's Sandbox "
      "can't wait for its commands.")),
    ("close_range", "close_range",
     "run can't make sure that no open file of the caller reaches the payload."),
    ("overlay", "overlayfs",
     "The root can't be copy-on-write: only --overlay none works, which writes to the rootfs."),
    ("overlay_by_descriptor", "overlay layers by descriptor (6.13)",
     "Overlays need the attached engine, and a procfs to name their layers by."),
    ("detached_trees", "mounts on detached trees (6.15)",
     ("The attached engine is used: each build needs a mount namespace of its own, and "
      "Root.attach(path) of the library doesn't work outside of it.")),
    ("user_namespaces", "user namespaces for everybody",
     "Users without privileges can't run containers; root still can."),
    ("overlay_in_user_namespace", "overlay in a user namespace",
     "Containers of unprivileged users have no copy-on-write root: only --overlay none."),
    ("user_attributes", "user.* attributes on a tmpfs (6.6)",
     ("In an overlay of a user namespace, a directory that was removed can't be made again "
      "(EIO).")),
    ("id_ranges", "newuidmap, newgidmap",
     ("A container of this user has one user and one group: files can't be given to others, "
      "and programs that change their user fail.")),
    ("idmapped_mounts", "idmapped mounts",
     "Mounts with idmap, ridmap or uidMappings are refused."),
    ("device_nodes", "making device nodes",
     "Devices are bound from the host's /dev: one that the host lacks can't be had."),
    ("erofs_file", "EROFS images without a loop device (6.12)",
     "An EROFS image as lower needs a loop device, so root; otherwise unpack it."),
    ("squashfs", "squashfs images (loop device)",
     "A squashfs image can't be a lower: unpack it, or run as root with loop devices."),
    ("time_namespaces", "time namespaces",
     "A spec with a time namespace or linux.timeOffsets is refused."),
    ("statmount", "statmount and listmount (6.13)",
     "Mount tables come from /proc/self/mountinfo, slower on hosts with thousands of mounts."),
    ("proc_pidns", "procfs of a given pid namespace (6.18)",
     "The procfs of a new pid namespace has to be mounted by a process inside it."),
    ("open_tree_namespace", "OPEN_TREE_NAMESPACE (7.0)",
     ("A new mount namespace copies every mount of the host first; on hosts with thousands, "
      "that takes milliseconds.")),
    ("cgroups", "cgroups", "A mount of type cgroup has nothing to show."),
    ("mount_max", "room for mounts (fs.mount-max)",
     "Mounts may fail with ENOSPC: raise the sysctl fs.mount-max."),
    ("selinux", "SELinux", "linux.mountLabel has no effect."),
)
REQUIRED = (
    "mount_namespace", "mount_setattr", "openat2", "pivot_root", "clone3", "pidfd", "close_range",
)


def add_arguments(parser):
    """Add this command's arguments to an argparse parser."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def main(arguments):
    """Print the findings; returns 0 if containers can be built by this user here, else 1."""
    findings = examine(Features())
    possible = all(entry["found"] for entry in findings if entry["name"] in REQUIRED)
    if arguments.json:
        json.dump(
            {"uid": os.geteuid(), "possible": possible, "findings": findings}, sys.stdout, indent=2
        )
        print()
    else:
        print(as_text(findings, possible))
    return 0 if possible else 1


def examine(features):
    """Return the table's findings as dicts: name, title, found, detail, lost (str or None)."""
    findings = []
    for name, title, lost in TABLE:
        finding = getattr(features, name)
        findings.append({
            "name": name,
            "title": title,
            "found": finding.found,
            "detail": shown(finding.detail),
            # Where not even the attempt could be made, the first row has said what is lost.
            "lost": None if finding.found or finding.detail.startswith(NOT_TRIED) else lost,
        })
    return findings


def as_text(findings, possible):
    """Return the findings as a table for people, the verdict last."""
    width = max(len(entry["title"]) for entry in findings)
    lines = []
    for entry in findings:
        answer = "yes" if entry["found"] else "no" if entry["lost"] else "?"
        lines.append(f"{answer:3}  {entry['title']:{width}}  {entry['detail']}".rstrip())
        if entry["lost"]:
            lines.append(f"       {entry['lost']}")
    who = "root" if os.geteuid() == 0 else f"user {os.geteuid()}"
    verdict = "can be built and run" if possible else "can't be built"
    lines += ["", f"Containers {verdict} here by {who}."]
    return "\n".join(lines)
