"""``sandboxfs hooks``: register the hooks with an engine, take them away, show what there is."""

import json
import os
import sys

from sandboxfs import policy
from sandboxfs.cli import install, uninstall
from sandboxfs.engines import Wish, containerd, hooks, registration
from sandboxfs.errors import UsageError
from sandboxfs.hooks import registration as formats
from sandboxfs.spec import load

# These have no place for a registration: the hooks stand in every bundle.
BUNDLES = ("runc", "crun")


def add_arguments(parser):
    """Add this command's arguments to an argparse parser."""
    parser.add_argument("action", choices=("install", "uninstall", "show"),
                        help="show alone prints the effective policy; with --for, what install "
                        "would write, and writes nothing")
    parser.add_argument("--for", dest="engine", choices=(*hooks.ENGINES, *BUNDLES),
                        help="the engine; runc and crun have no registration, show prints the "
                        "hooks for a bundle's config.json")
    parser.add_argument("--dest", metavar="DIR", help="where everything goes, instead of the "
                        "engine's own directory and " + hooks.LAUNCHER_DIRECTORY)
    parser.add_argument("--engine-config", metavar="PATH",
                        help=f"containerd's config.toml, if it isn't {containerd.CONFIG}")
    parser.add_argument("--launcher", metavar="PATH", help="where the launcher goes")
    parser.add_argument("--config", metavar="FILE",
                        help=f"the operator's file, if it isn't {policy.FILE}")
    parser.add_argument("--when", choices=("always", "annotated"), default="always",
                        help="podman, cri-o: for all containers, or those with an annotation")
    parser.add_argument("--base", metavar="FILE", help="the spec to add the hooks to; containerd: "
                        "instead of what `ctr oci spec` prints")
    parser.add_argument("--force", action="store_true", help="uninstall: although it is in use")


def main(arguments):
    """Do what was asked; returns the exit status."""
    if arguments.config is not None:
        arguments.config = os.path.abspath(arguments.config)
    if arguments.action == "show":
        return _show(arguments)
    if arguments.engine is None:
        raise UsageError("", "hooks", arguments.action, "--for ENGINE is missing")
    if arguments.engine in BUNDLES:
        raise UsageError(
            "", "hooks", arguments.action, f"{arguments.engine} reads hooks from each bundle only",
            hint=f"sandboxfs hooks show --for {arguments.engine} prints them, for its config.json",
        )
    as_json = arguments.log_format == "json"
    if arguments.action == "uninstall":
        uninstall.perform(_wish(arguments), arguments.force, as_json)
        return 0
    # Wrong now is wrong at every start of a container.
    policy.load(arguments.config)
    install.perform(_wish(arguments, base=True), as_json)
    return 0


def _wish(arguments, base=False):
    """Return what is asked for, with the spec to start from if `base` is set."""
    if arguments.engine == "containerd" and arguments.when != "always":
        raise UsageError("--when", "", arguments.when, "containerd has no conditions for hooks")
    if arguments.engine != "containerd" and arguments.base is not None:
        raise UsageError("--base", "", arguments.base, "is for containerd, runc and crun")
    found = None
    if base and arguments.engine == "containerd":
        found = _base(arguments.base) if arguments.base else install.spec_of_containerd()
    return Wish(arguments.engine, True, arguments.dest, arguments.config, arguments.engine_config,
                arguments.launcher, arguments.when == "annotated", found)


def _base(path):
    """Return the spec in the file `path`, parsed and checked."""
    return load.load(os.path.dirname(path) or ".", config=path).document


# -- show -------------------------------------------------------------------------------


def _show(arguments):
    if arguments.engine is None:
        sys.stdout.write(_policy_text(policy.load(arguments.config)))
    elif arguments.engine in BUNDLES:
        wish = Wish("podman", True, arguments.dest, launcher=arguments.launcher)
        path = hooks.launcher_path(wish)
        document = {} if arguments.base is None else _base(arguments.base)
        print(json.dumps(formats.with_hooks(document, path, arguments.config), indent=2))
    else:
        wish = _wish(arguments, base=True)
        found = registration(wish)
        for path, (content, mode) in found.files.items():
            print(f"# {path} (mode {mode:04o})")
            print(content.decode("ascii"))
        for path, edit in found.edits.items():
            _content, added = edit.apply(path, wish.recorded.without_edit(path))
            print(f"# added to {path}\n{added.decode()}")
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
