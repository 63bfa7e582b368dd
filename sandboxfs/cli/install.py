"""``sandboxfs install``: register the runtime in front of the runtime, or the hooks."""

import os

from sandboxfs import archive, policy
from sandboxfs.cli import launcher, report
from sandboxfs.engines import (
    ENGINES,
    Wish,
    access,
    hooks,
    real_runtimes,
    record,
    registration,
    runtimes,
)
from sandboxfs.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace


def add_arguments(parser: "ArgumentParser") -> None:
    """Add this command's arguments to an argparse parser."""
    add_place(parser)
    parser.add_argument("--config", metavar="FILE",
                        help=f"the operator's file, if it isn't {policy.FILE}")


def add_place(parser: "ArgumentParser") -> None:
    """Add the arguments that say what is registered where: `uninstall` has the same."""
    parser.add_argument("--for", dest="engine", choices=tuple(ENGINES), required=True,
                        help="the engine")
    parser.add_argument("--hooks", action="store_true",
                        help="the hooks, not the runtime (`sandboxfs hooks` has more options)")
    parser.add_argument("--dest", metavar="DIR", help="where our programs go, instead of "
                        f"{runtimes.PROGRAMS} (a user's: ~/{runtimes.USERS_PROGRAMS}); with "
                        "--hooks everything")
    parser.add_argument("--engine-config", metavar="PATH", help="the engine's own configuration, "
                        "if it isn't the usual one: containerd's config.toml, Docker's "
                        "daemon.json, podman's and CRI-O's directory of drop-ins")
    parser.add_argument("--force", action="store_true",
                        help="uninstall: although it is in use")


def main(arguments: "Namespace") -> int:
    """Do it; returns the exit status."""
    config = None if arguments.config is None else os.path.abspath(arguments.config)
    # Wrong now is wrong at every start of a container.
    policy.load(config)
    base = spec_of_containerd() if arguments.hooks and arguments.engine == "containerd" else None
    perform(Wish(arguments.engine, place_of(arguments), arguments.dest, config,
                 arguments.engine_config, base=base), arguments.log_format == "json")
    return 0


def place_of(arguments: "Namespace") -> bool:
    """Return whether hooks are asked for; UsageError where there are none."""
    if arguments.hooks and arguments.engine not in hooks.ENGINES:
        raise UsageError("", "install", arguments.engine, "has no place for hooks",
                         hint="without --hooks, the runtime is registered")
    return bool(arguments.hooks)


def perform(wish: Wish, as_json: bool) -> None:
    """Write the registration, and say what was written, what is wrong and what is left to do."""
    found = registration(wish)
    launcher.compile_package()
    archive.write()
    for path, outcome in record.install(found).items():
        print(f"{outcome:<9} {path}")
    programs = [path for path, (_content, mode) in found.files.items() if mode == 0o755]
    for text in access.findings(_needed(programs, wish.config)):
        report.warning(text, as_json)
    if wish.hooks:
        for text in hooks.advice(real_runtimes(wish)):
            report.warning(text, as_json)
        print(f"\n`sandboxfs install --for {wish.engine}` registers the runtime instead of hooks: "
              "that is right with every runc and crun.")
    if found.notes:
        print("\n" + "\n".join(found.notes))


def _needed(programs: list[str], config: "str | None") -> list[str]:
    """Return the files and directories that a start of a container comes by."""
    interpreter = launcher.interpreter()
    files = [config or policy.FILE, *map(archive.path, archive.SETS)]
    return [*programs, interpreter, *launcher.import_path(interpreter),
            os.path.dirname(os.path.dirname(os.path.realpath(__file__))),
            *filter(os.path.exists, files)]


def spec_of_containerd() -> dict[str, object]:
    """Return the spec that containerd starts from by itself, parsed and checked."""
    import shutil
    import subprocess

    from sandboxfs.errors import SandboxError
    from sandboxfs.spec import load

    program = shutil.which("ctr", path=runtimes.PATH)
    if program is None:
        raise SandboxError("", "run", "ctr", "is not installed",
                           hint="hooks install --base FILE names a spec to start from")
    done = subprocess.run([program, "oci", "spec"], capture_output=True, check=False)
    if done.returncode != 0:
        raise SandboxError("", "run", f"{program} oci spec",
                           os.fsdecode(done.stderr).strip() or f"exit status {done.returncode}")
    document: dict[str, object] = load.load(text=done.stdout).document
    return document
