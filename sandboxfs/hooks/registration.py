"""The hooks in the formats that runtimes and engines read them in."""

STAGES = ("createRuntime", "createContainer", "poststop")
# Seconds after which a runtime kills the hook.  createRuntime and poststop may wait for another
# container of the pod; none of them takes longer than some milliseconds otherwise.
TIMEOUTS = {"createRuntime": 30, "createContainer": 30, "poststop": 30}
# All of it: a runtime that finds none gives hooks the environment of the image.
ENVIRONMENT = ["PATH=/usr/sbin:/usr/bin"]
ANNOTATION_PREFIXES = ("dev.sandboxfs.", "dev.gvisor.spec.mount.")
# Containers that carry annotations of ours; POSIX extended regular expressions.
ANNOTATED = {r"^dev\.(sandboxfs|gvisor\.spec\.mount)\.": ".*"}


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


def hooks_d(launcher, stage, config=None, annotated=False):
    """Return the content of one of the files that podman and CRI-O read (oci-hooks(5)).

    annotated: only for containers that carry annotations of ours.
    """
    return {
        "version": "1.0.0",
        "hook": hook(launcher, stage, config),
        "when": {"annotations": ANNOTATED} if annotated else {"always": True},
        "stages": [stage],
    }


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
