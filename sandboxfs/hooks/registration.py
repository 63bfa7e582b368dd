"""What a runtime is told about the hooks, as files: their places and their contents.

podman and CRI-O read the same directory of JSON files (oci-hooks(5), schema 1.0.0), so one
registration is for both.  containerd takes hooks from the spec that its CRI plugin starts every
container's from (``base_runtime_spec``).  runc and crun read each bundle's own config.json.
"""

import json
import os

from sandboxfs.errors import UsageError

STAGES = ("createRuntime", "createContainer", "poststop")
# Seconds after which a runtime kills the hook.  createRuntime and poststop may wait for another
# container of the pod; none of them takes longer than some milliseconds otherwise.
TIMEOUTS = {"createRuntime": 30, "createContainer": 30, "poststop": 30}
# All of it: a runtime that finds none gives hooks the environment of the image.
ENVIRONMENT = ["PATH=/usr/sbin:/usr/bin"]
ANNOTATION_PREFIXES = ("dev.sandboxfs.", "dev.gvisor.spec.mount.")
# Containers that carry annotations of ours; POSIX extended regular expressions.
ANNOTATED = {r"^dev\.(sandboxfs|gvisor\.spec\.mount)\.": ".*"}

# runtime → (which of the two registrations, where that goes by default).
RUNTIMES = {
    "podman": ("oci", "/usr/share/containers/oci/hooks.d"),
    "cri-o": ("oci", "/usr/share/containers/oci/hooks.d"),
    "containerd": ("containerd", "/etc/containerd"),
}
LAUNCHER_DIRECTORY = "/usr/local/libexec"


class Registration:
    """The files of one registration.

    kind: ``"oci"`` or ``"containerd"``.  directory: where it goes.  launcher: path of the
    launcher.  files: path → (bytes, mode), in the order of writing: what others name comes first.
    notes: lines for the operator about what is left to do by hand.
    """

    __slots__ = ("directory", "files", "kind", "launcher", "notes")

    def __init__(self, kind, directory, launcher):
        self.kind = kind
        self.directory = directory
        self.launcher = launcher
        self.files = {}
        self.notes = []

    @property
    def manifest(self):
        """The path of the list of what was written."""
        return manifest_path(self.kind, self.directory)


def manifest_path(kind, directory):
    """Return where the list of what was written lies, in the format of sha256sum."""
    return os.path.join(directory, f"sandboxfs-{kind}-hooks.sha256")


def place(runtime, directory=None, launcher=None):
    """Return the empty `Registration` for `runtime`: kind and absolute paths."""
    kind, default = RUNTIMES[runtime]
    name = f"sandboxfs-{kind}-hook"
    if launcher is None:
        launcher = os.path.join(directory or LAUNCHER_DIRECTORY, name)
    found = Registration(kind, os.path.abspath(directory or default), os.path.abspath(launcher))
    for path in (found.directory, found.launcher):
        if not path.isprintable() or "\\" in path:
            raise UsageError("", "hooks", path, "no registration can hold this path")
    return found


def of(runtime, launcher_content, directory=None, launcher=None, config=None, annotated=False,
       base=None):
    """Return the `Registration` for `runtime`, with its files.

    launcher_content: bytes.  directory, launcher: other places than the default ones (str).
    config: absolute path of the operator's file, where it isn't the default one.  annotated:
    only for containers that carry annotations of ours.  base: the spec that containerd's is made
    from, parsed.
    """
    found = place(runtime, directory, launcher)
    found.files[found.launcher] = (launcher_content, 0o755)
    if found.kind == "containerd":
        _containerd(found, config, base)
    else:
        for stage in STAGES:
            path = os.path.join(found.directory, f"sandboxfs-{stage}.json")
            entry = _hooks_d(found.launcher, stage, config, annotated)
            found.files[path] = (_json(entry), 0o644)
    return found


def hook(launcher, stage, config=None):
    """Return one hook as config.json has it (config.md, "POSIX-platform Hooks")."""
    options = ["--config", config] if config else []
    return {
        "path": launcher,
        "args": [launcher, "hook", stage, *options],
        "env": list(ENVIRONMENT),
        "timeout": TIMEOUTS[stage],
    }


def hooks_object(launcher, config=None):
    """Return the object `hooks` of config.json with all stages."""
    return {stage: [hook(launcher, stage, config)] for stage in STAGES}


def _hooks_d(launcher, stage, config, annotated):
    return {
        "version": "1.0.0",
        "hook": hook(launcher, stage, config),
        "when": {"annotations": ANNOTATED} if annotated else {"always": True},
        "stages": [stage],
    }


# -- containerd -------------------------------------------------------------------------


def _containerd(found, config, base):
    path = os.path.join(found.directory, "sandboxfs-base-spec.json")
    found.files[path] = (_json(with_hooks(base, found.launcher, config)), 0o644)
    found.notes += containerd_lines(path)


def with_hooks(base, launcher, config=None):
    """Return a copy of the spec `base` with our hooks behind those it has.

    Hooks of ours that are in it already, from an earlier registration, don't come twice.
    """
    document = dict(base)
    hooks = dict(document.get("hooks") or {})
    for stage, ours in hooks_object(launcher, config).items():
        others = [entry for entry in hooks.get(stage) or () if not is_ours(entry, stage)]
        hooks[stage] = [*others, *ours]
    document["hooks"] = hooks
    return document


def is_ours(entry, stage):
    """Return whether an entry of config.json's hooks is ours of this stage."""
    arguments = entry.get("args") or ()
    return list(arguments[1:3]) == ["hook", stage] and "sandboxfs" in str(entry.get("path"))


def containerd_lines(path):
    """Return the lines of containerd's config.toml that belong to the base spec at `path`.

    A file that names a runtime drops those that are built in, runc among them, and then the CRI
    plugin isn't loaded: its default runtime is missing (seen with 1.6.20).
    """
    globs = ", ".join(f'"{prefix}*"' for prefix in ANNOTATION_PREFIXES)
    table = '[plugins."io.containerd.grpc.v1.cri".containerd.runtimes'
    return [
        "# /etc/containerd/config.toml, which begins with version = 2.  In one with version = 3",
        '# (containerd 2) the tables begin with plugins."io.containerd.cri.v1.runtime".',
        f"{table}.sandboxfs]",
        '  runtime_type = "io.containerd.runc.v2"',
        f"  base_runtime_spec = {json.dumps(path)}",
        f"  pod_annotations = [{globs}]",
        f"  container_annotations = [{globs}]",
        "# Leave this out where the file has it: naming one runtime drops the built-in ones.",
        f"{table}.runc]",
        '  runtime_type = "io.containerd.runc.v2"',
    ]


def _json(document):
    return (json.dumps(document, indent=2) + "\n").encode("ascii")
