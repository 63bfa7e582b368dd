"""``sandboxfs hooks``: register the hooks with a runtime, take them away, show what there is."""

import json
import os
import shutil
import subprocess
import sys

from sandboxfs import archive, policy
from sandboxfs.cli import launcher, report
from sandboxfs.errors import SandboxError, UsageError
from sandboxfs.hooks import install, registration
from sandboxfs.spec import load

# These have no place for a registration: the hooks stand in every bundle.
BUNDLES = ("runc", "crun")


def add_arguments(parser):
    """Add this command's arguments to an argparse parser."""
    parser.add_argument("action", choices=("install", "uninstall", "show"),
                        help="show alone prints the effective policy; with --for, what install "
                        "would write, and writes nothing")
    parser.add_argument("--for", dest="runtime", choices=(*registration.RUNTIMES, *BUNDLES),
                        help="the runtime; runc and crun have no registration, show prints the "
                        "hooks for a bundle's config.json")
    parser.add_argument("--dest", metavar="DIR", help="where everything goes, instead of the "
                        "runtime's own directory and " + registration.LAUNCHER_DIRECTORY)
    parser.add_argument("--launcher", metavar="PATH", help="where the launcher goes")
    parser.add_argument("--config", metavar="FILE",
                        help=f"the operator's file, if it isn't {policy.FILE}")
    parser.add_argument("--when", choices=("always", "annotated"), default="always",
                        help="podman, cri-o: for all containers, or those with an annotation")
    parser.add_argument("--base", metavar="FILE", help="the spec to add the hooks to; containerd: "
                        "instead of what `ctr oci spec` prints")


def main(arguments):
    """Do what was asked; returns the exit status."""
    if arguments.config is not None:
        arguments.config = os.path.abspath(arguments.config)
    if arguments.action == "show":
        return _show(arguments)
    if arguments.runtime is None:
        raise UsageError("", "hooks", arguments.action, "--for RUNTIME is missing")
    if arguments.runtime in BUNDLES:
        raise UsageError(
            "", "hooks", arguments.action, f"{arguments.runtime} reads hooks from each bundle only",
            hint=f"sandboxfs hooks show --for {arguments.runtime} prints them, for its config.json",
        )
    return (_install if arguments.action == "install" else _uninstall)(arguments)


# -- install, uninstall -----------------------------------------------------------------


def _install(arguments):
    # Wrong now is wrong at every start of a container.
    policy.load(arguments.config)
    found = _registration(arguments)
    launcher.compile_package()
    archive.write()
    for path, outcome in install.install(found).items():
        print(f"{outcome:<9} {path}")
    for text in install.findings(_needed(found, arguments.config)):
        report.warning(text, arguments.log_format == "json")
    if found.notes:
        print("\nWhat is left to do: add these lines, and restart containerd.\n")
        print("\n".join(found.notes))
    return 0


def _uninstall(arguments):
    found = registration.place(arguments.runtime, arguments.dest, arguments.launcher)
    removed = install.uninstall(found.kind, found.directory)
    for path in removed:
        print(f"removed   {path}")
    if not removed:
        print(f"nothing is installed in {found.directory}")
    return 0


def _registration(arguments):
    if arguments.runtime == "containerd" and arguments.when != "always":
        raise UsageError("--when", "", arguments.when, "containerd has no conditions for hooks")
    if arguments.runtime != "containerd" and arguments.base is not None:
        raise UsageError("--base", "", arguments.base, "is for containerd, runc and crun")
    base = _base(arguments.base) if arguments.runtime == "containerd" else None
    return registration.of(
        arguments.runtime, launcher.content(), arguments.dest, arguments.launcher,
        arguments.config, arguments.when == "annotated", base,
    )


def _base(path):
    """Return the spec to start from, parsed and checked: the file `path`, or containerd's own."""
    if path is not None:
        return load.load(os.path.dirname(path) or ".", config=path).document
    program = shutil.which("ctr", path="/usr/local/bin:/usr/bin:/usr/local/sbin:/usr/sbin")
    if program is None:
        raise SandboxError("", "run", "ctr", "is not installed",
                           hint="--base FILE names a spec to start from")
    done = subprocess.run([program, "oci", "spec"], capture_output=True, check=False)
    if done.returncode != 0:
        raise SandboxError("", "run", f"{program} oci spec",
                           os.fsdecode(done.stderr).strip() or f"exit status {done.returncode}")
    return load.load(text=done.stdout).document


def _needed(found, config):
    """Return the files and directories that a start of the hook comes by."""
    interpreter = launcher.interpreter()
    files = [config or policy.FILE, *map(archive.path, archive.SETS)]
    return [found.launcher, interpreter, *launcher.import_path(interpreter),
            os.path.dirname(os.path.dirname(os.path.realpath(__file__))),
            *filter(os.path.exists, files)]


# -- show -------------------------------------------------------------------------------


def _show(arguments):
    if arguments.runtime is None:
        sys.stdout.write(_policy_text(policy.load(arguments.config)))
    elif arguments.runtime in BUNDLES:
        path = registration.place("podman", arguments.dest, arguments.launcher).launcher
        document = {} if arguments.base is None else _base(arguments.base)
        print(json.dumps(registration.with_hooks(document, path, arguments.config), indent=2))
    else:
        found = _registration(arguments)
        for path, (content, mode) in found.files.items():
            print(f"# {path} (mode {mode:04o})")
            print(content.decode("ascii"))
        if found.notes:
            print("\n".join(found.notes))
    return 0


def _policy_text(rules):
    """Return the effective policy as the file that would say all of it."""
    unset = object()
    tables = {
        "overlay": {
            "mode": rules.overlay,
            "size": unset if rules.overlay_size is None else rules.overlay_size,
            "cap": unset if rules.overlay_cap_text is None else rules.overlay_cap_text,
        },
        "hints": {"size": rules.hint_size, "cap": rules.hint_cap_text},
        "annotations": {"honour": list(rules.annotations), "host-paths": rules.host_paths},
        "log": {"file": rules.log_path, "level": rules.log_level},
    }
    comments = {
        "overlay.size": "half of a container's memory limit, else half of all memory",
        "overlay.cap": "none",
    }
    source = rules.path or f"{policy.FILE} is not there: these are the defaults"
    lines = [f"# {source}"]
    for table, content in tables.items():
        lines += ["", f"[{table}]"]
        for key, value in content.items():
            name = f"{table}.{key}"
            if value is unset:
                lines.append(f"# {key}: {comments[name]}  (default)")
                continue
            # A string of JSON is one of TOML, and so are its lists and booleans.
            line = f"{key} = {json.dumps(value, ensure_ascii=False)}"
            lines.append(line if name in rules.given else f"{line}  # default")
    return "\n".join(lines) + "\n"
